"""What ends a training run from outside: a signal, a full disk, too little memory, a dead worker."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..runtime.interruptions import FULL, ended_by, is_out_of_memory


def interruption(error: BaseException, folder: str | os.PathLike) -> str | None:
    """What ended a run, in a line; None where it was nothing from outside.

    Args:
        error: what was raised.
        folder: to which the run was writing.
    """
    if isinstance(error, KeyboardInterrupt):
        return ended_by(error)
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return (
            f"a process that loads studies died: {' '.join(str(error).split())}; memory that ran out is the usual "
            "reason, and fewer workers need less"
        )
    if is_out_of_memory(error):
        reason = " ".join(str(error).split()).partition(". ")[0]
        return f"out of memory ({reason}): a smaller batch_size with more gradient_accumulation needs less"
    reason = _why_not_written(error)
    if reason is None:
        return None
    space = shutil.disk_usage(folder).free / 2**20 if Path(folder).is_dir() else 0.0
    return f"cannot write to {folder}: {reason}; {space:,.1f} MB are free there"


def _why_not_written(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in FULL else None
    for number in FULL:
        # safetensors gives the system's number in its text only.
        if type(error).__name__ == "SafetensorError" and f"(os error {number})" in str(error):
            return os.strerror(number)
    # torch's writer of archives knows that a write failed, and not why.
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return "a file could not be written to its end"
    return None


__all__ = ["interruption"]
