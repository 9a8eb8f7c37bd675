"""The folder of a server's uploads: deleted when the server ends, or by the next server if it was killed."""

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
#: A file that a running server keeps locked; the lock ends with the process, also if it is killed.
_LOCK = "lock"


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """An empty folder for this process, deleted on exit; folders of killed processes are deleted first."""
    _delete_leftovers()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with open(folder / "locking", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Renamed when locked: another server that starts now ignores folders without a lock file.
            (folder / "locking").rename(folder / _LOCK)
            (folder / "uploads").mkdir()
            yield folder / "uploads"


def _delete_leftovers() -> None:
    """Delete the folders of this user's servers that no longer run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, or deleted by another server meanwhile
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)
