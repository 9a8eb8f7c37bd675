"""The folder of a server's uploads: deleted when the server ends, or by the next server where it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "otdrg-demo-"
#: A file that a living server holds locked; the system lets go of it however the process ends.
_LOCK = "lock"


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """An empty folder for this process alone, deleted on leaving; those of killed processes are deleted first."""
    _delete_leftovers()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with open(folder / "locking", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # It gets its name once it is held: another server that starts now takes no folder without a lock.
            (folder / "locking").rename(folder / _LOCK)
            (folder / "uploads").mkdir()
            yield folder / "uploads"


def _delete_leftovers() -> None:
    """Delete the folders of this user's servers that run no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another server deletes it, or it is locked
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


__all__ = ["upload_folder"]
