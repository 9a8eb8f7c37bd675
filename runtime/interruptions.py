"""The exit of a command: status, one line for errors and signals, and the end of its child processes."""

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
from pathlib import Path

from .printable import one_line

#: Environment variable with the process id of the parent, set by `otdrg ablate` for the processes it starts.
PARENT = "OTDRG_PARENT"

#: Error numbers of a file that cannot grow: the disk, the quota or the size limit is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Error numbers that do not depend on a single file.
_SYSTEM = (*FULL, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENOTCONN, errno.ESTALE)

_POLL_SECONDS = 0.5

_QUOTED = re.compile(r"""b?'[^']*(?:'|$)|b?"[^"]*(?:"|$)""")
_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>")
_LONGEST_REASON = 300


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, as from a cluster's scheduler; handled like Ctrl-C."""


class RunInterruptedError(RuntimeError):
    """A run was ended from outside, but not by its user; the message names the last good checkpoint."""


class EngineError(OSError):
    """A server that writes the reports of all studies failed; the message names it."""


@contextmanager
def terminations() -> Iterator[None]:
    """Raise [`Terminated`] on SIGTERM."""

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
    """Run a command and return its exit status: 0, 1 after a line about an error, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        program: beginning of the line.
        run: the command. The message of a `KeyboardInterrupt` it raises says what is kept.
        speaks: whether to print the line of an interruption; one of several processes prints it.
        traceback: raise errors instead of printing a line.
    """
    try:
        with terminations():
            run()
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does; the rest of the output is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        if speaks:
            print(f"{program}: {'; '.join(filter(None, (ended_by(stop), _one_line(stop))))}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    except Exception as error:
        line = error_line(error)
        if traceback or line is None:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        return 1
    return 0


def ended_by(stop: KeyboardInterrupt) -> str:
    """The name of an interruption, for messages."""
    return "terminated (SIGTERM)" if isinstance(stop, Terminated) else "interrupted"


def error_line(error: Exception) -> str | None:
    """The message of an error in one line; None for an error of the program itself."""
    if is_out_of_memory(error):
        reason = _one_line(error).partition(". ")[0] or "an allocation failed"
        return (
            f"out of memory ({reason}): use a smaller batch, fewer beams or candidates, shorter reports, or a smaller "
            "dtype or quantization of the weights"
        )
    if isinstance(error, (OSError, ValueError, ImportError, ArithmeticError, RunInterruptedError)):
        return _one_line(error) or type(error).__name__
    return None


def _one_line(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        # From a data loader process: its traceback, with the error in the last line.
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return one_line(text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: `MemoryError`, or torch's errors on CPU and GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory"))


def is_system_fault(error: BaseException) -> bool:
    """Whether an error in one study would occur in all studies: the disk is full, the file system is gone..."""
    if isinstance(error, EngineError) or (isinstance(error, OSError) and error.errno in _SYSTEM):
        return True
    return isinstance(error, RuntimeError) and (
        "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
    )


def fault_of_study(error: Exception, quotes: bool = True) -> str:
    """The type and the first line of an error in one study, for the list of skipped studies.

    Quoted text, which may be from a report, is removed unless `quotes`. An error that does not depend on the study (the
    disk is full, a package is missing...) is raised again.
    """
    if isinstance(error, ImportError) or is_system_fault(error):
        raise error
    line = next((line.strip() for line in _ADDRESS.sub("", str(error)).splitlines() if line.strip()), "")
    if not quotes:
        line = _QUOTED.sub("'...'", line)
    line = line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
    # Our own messages do not need the type.
    named = type(error) is ValueError and quotes
    return line if named and line else f"{type(error).__name__}: {line}".rstrip(": ")


def end_with_parent(parent: int | None = None) -> None:
    """End this process when its parent is gone; a killed parent cannot end its children.

    Args:
        parent: process id of the parent; by default the value of `OTDRG_PARENT`. Without both, nothing is watched. A
            process between the two, such as a launcher, is watched instead.
    """
    parent = int(os.environ.get(PARENT, "0")) if parent is None else parent
    if not parent:
        return
    watched = os.getppid()
    if watched != parent and not _is_running(parent):
        os._exit(1)

    def watch():
        while os.getppid() == watched and (watched == parent or _is_running(parent)):
            time.sleep(_POLL_SECONDS)
        # Immediately: the files written so far can be continued, and a restart waits for this process.
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _is_running(process: int) -> bool:
    """Whether a process runs; one that has ended, but whose parent has not noticed, does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except ProcessLookupError:
        return False
    except (FileNotFoundError, PermissionError):
        return True  # without /proc, as on macOS, or a process of another user
