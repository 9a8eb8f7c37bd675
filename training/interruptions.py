"""What ends a run from outside: a signal, a full disk, the death of a process that loads studies."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What the system says when a file cannot grow: the disk, the user's share of it, or the file is at its limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, as from a cluster's scheduler; unwinds as Ctrl-C does."""


class RunInterruptedError(RuntimeError):
    """A run that was ended from outside, but not by its user; the message names the last good checkpoint."""


@contextmanager
def terminations() -> Iterator[None]:
    """Let SIGTERM raise [`Terminated`] in here."""

    def terminate(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interruption(error: BaseException, folder: str | os.PathLike) -> str | None:
    """What ended a run, said in a line; None where it was nothing from outside.

    Args:
        error: what was raised.
        folder: to which the run was writing.
    """
    if isinstance(error, Terminated):
        return "terminated (SIGTERM)"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return (
            f"a process that loads studies died: {' '.join(str(error).split())}; memory that ran out is the usual "
            "reason, and fewer workers need less"
        )
    reason = _why_not_written(error)
    if reason is None:
        return None
    space = shutil.disk_usage(folder).free / 2**20 if Path(folder).is_dir() else 0.0
    return f"cannot write to {folder}: {reason}; {space:,.1f} MB are free there"


def _why_not_written(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _FULL else None
    for number in _FULL:
        # safetensors gives the system's number in its text only.
        if type(error).__name__ == "SafetensorError" and f"(os error {number})" in str(error):
            return os.strerror(number)
    # torch's writer of archives knows that a write failed, and not why.
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return "a file could not be written to its end"
    return None


__all__ = ["RunInterruptedError", "Terminated", "interruption", "terminations"]
