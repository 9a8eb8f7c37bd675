"""The outputs of a command: whether they exist, and locks, so that two processes never write the same one at once."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


def new_results(folder: Path, name: str, suffixes: Sequence[str], overwrite: bool) -> dict[str, Path]:
    """The paths of a command's results in a folder, by suffix; the folder is created.

    Raises:
        ValueError: one exists and `overwrite` is false.
        OSError: the folder cannot be created.
    """
    paths = {suffix: folder / f"{name}{suffix}" for suffix in suffixes}
    for path in paths.values():
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: --overwrite replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    return paths


class OutputLockedError(ValueError):
    """Another process is writing this output; the message names the process."""


class OutputLock:
    """A context manager that locks an output for this process.

    It holds a lock of the operating system on the file `.NAME.lock` beside the output, which a killed process releases.
    `.NAME.lock.json` names the process. Both files are removed at the end.

    Args:
        output: file or folder that is written; it need not exist. A link means its target. Missing folders above it are
            created, and removed again if nothing was written to them.
        wait: seconds to wait for another process.

    Raises:
        OutputLockedError: on entry, another process holds the lock.
        OSError: on entry, the folder cannot be created or written to.
    """

    def __init__(self, output: str | os.PathLike, wait: float = 0.0):
        self.output = Path(output)
        self.wait = wait
        self._made: list[Path] = []

    def __enter__(self) -> OutputLock:
        self._find_place()
        deadline = time.monotonic() + self.wait
        while not self._acquire():
            if time.monotonic() >= deadline:
                holder = self._holder()
                self._remove_made()
                raise OutputLockedError(
                    f"{self.output} is being written by {holder}: wait for it, end it, or choose another output"
                )
            time.sleep(0.1)
        holder = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self._record.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        return self

    def __exit__(self, *error) -> None:
        # Windows cannot remove an open file; there an empty file remains.
        for path in (self._record, self._file):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._lock.release()
        self._remove_made()

    def _find_place(self) -> None:
        real = Path(os.path.realpath(self.output))
        folder = real.parent
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = missing
        if real.is_dir() and not os.access(folder, os.W_OK):
            folder = real
        self._file = folder / f".{real.name}.lock"
        self._record = folder / f".{real.name}.lock.json"
        self._lock = FileLock(str(self._file), timeout=0)

    def _acquire(self) -> bool:
        """Acquire the lock, and check that other processes will open the same file."""
        with suppress(FileExistsError):
            os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        before = _inode(self._file)
        try:
            self._lock.acquire()
        except Timeout:
            return False
        if before is not None and _inode(self._file) == before:
            return True
        # The previous holder removed the file after it was opened here.
        self._lock.release()
        return False

    def _holder(self) -> str:
        try:
            holder = json.loads(self._record.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
