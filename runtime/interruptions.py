"""How a command ends: its exit status, one line for errors and signals, and no process that outlives its parent."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .printable import one_line

#: The process that a process must not outlive, set in the environment of what `otdrg ablate` starts.
PARENT = "OTDRG_PARENT"

#: What the system says when a file cannot grow (the disk, the user's share of it, or the file is at its limit) or can
#: not be opened because too many are: errors that are no single file's fault.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYSTEM = (*FULL, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENOTCONN, errno.ESTALE)

_POLL_SECONDS = 0.5

_QUOTED = re.compile(r"""b?'[^']*(?:'|$)|b?"[^"]*(?:"|$)""")
_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>")
_LONGEST_REASON = 300


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


def exit_status(program: str, run: Callable[[], None], speaks: bool = True, traceback: bool = False) -> int:
    """Run a command to its exit status: 0, or 1 after one line on what is wrong, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        program: what the line begins with.
        run: the command. A `KeyboardInterrupt` that it raises says in its message what was kept.
        speaks: whether the line of an interruption is printed; of several processes only one prints it.
        traceback: raise errors instead of printing their line.
    """
    try:
        with terminations():
            run()
    except BrokenPipeError:
        # The reader has seen enough, as `| head` has. What is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        if speaks:
            print(f"{program}: {'; '.join(filter(None, (ended_by(stop), _one_line(stop))))}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    except Exception as error:
        line = _error_line(error)
        if traceback or line is None:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        return 1
    return 0


def ended_by(stop: KeyboardInterrupt) -> str:
    """The name of an interruption, for people."""
    return "terminated (SIGTERM)" if isinstance(stop, Terminated) else "interrupted"


def _error_line(error: Exception) -> str | None:
    """What is wrong in one line; None for an error that is a fault of the program."""
    if is_out_of_memory(error):
        reason = _one_line(error).partition(". ")[0] or "an allocation failed"
        return f"out of memory ({reason}): a smaller batch, fewer beams or shorter reports need less"
    if isinstance(error, (OSError, ValueError, ImportError, ArithmeticError, RunInterruptedError)):
        return _one_line(error) or type(error).__name__
    return None


def _one_line(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        # From a process that loads studies: its traceback, with the error itself last.
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return one_line(text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's or NumPy's `MemoryError`, or torch's errors on CPU and GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory"))


def is_system_fault(error: BaseException) -> bool:
    """Whether an error that came up in one study would come up in all: the disk is full, the file system is gone..."""
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return True
    return isinstance(error, RuntimeError) and (
        "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
    )


def fault_of_study(error: Exception, quotes: bool = True) -> str:
    """The type and the first line of an error that one study caused, for the list of studies that were left out.

    Args:
        error: what reading it raised.
        quotes: whether to keep what the error quotes, which may be text of a report.

    Raises:
        Exception: the error itself, where it is not the study's: the disk is full, a package is missing...
    """
    if isinstance(error, ImportError) or is_system_fault(error):
        raise error
    line = next((line.strip() for line in _ADDRESS.sub("", str(error)).splitlines() if line.strip()), "")
    if not quotes:
        line = _QUOTED.sub("'...'", line)
    line = line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
    # Those of ours say what is wrong and need no type.
    named = type(error) is ValueError and quotes
    return line if named and line else f"{type(error).__name__}: {line}".rstrip(": ")


def end_with_parent(parent: int | None = None) -> None:
    """End this process when the one that started it is gone: killed, it could not tell its children to end.

    Args:
        parent: id of the process that started this one; that of `OTDRG_PARENT` without it. Where neither is set,
            nothing is watched. A process between the two, such as a launcher's, is watched in its place.
    """
    parent = int(os.environ.get(PARENT, "0")) if parent is None else parent
    if not parent:
        return
    watched = os.getppid()
    if watched != parent and not _is_running(parent):
        os._exit(1)

    def watch():
        while os.getppid() == watched:
            time.sleep(_POLL_SECONDS)
        # At once: what is written here can be gone on with, and the restart waits for this process.
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


__all__ = [
    "FULL",
    "PARENT",
    "RunInterruptedError",
    "Terminated",
    "end_with_parent",
    "ended_by",
    "exit_status",
    "fault_of_study",
    "is_out_of_memory",
    "is_system_fault",
    "terminations",
]
