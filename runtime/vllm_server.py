"""A vLLM server as a child process, from an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

#: Environment variable with the path of the program `vllm`.
PROGRAM = "OTDRG_VLLM"

#: Seconds that the server has to end by itself.
_GRACE_SECONDS = 10

#: The line that names an error; the last line of vLLM's output only says that there is one above.
_ERROR = re.compile(r"(?:^|\s)(\w+(?:\.\w+)*(?:Error|Exception): .*)")


class Server(NamedTuple):
    """A server that was started.

    Args:
        url: its address.
        process: the child process.
        log: file with its output.
    """

    url: str
    process: subprocess.Popen
    log: Path

    def failure(self) -> str | None:
        """Why it has ended, in one line; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        named = next((found[1] for found in map(_ERROR.search, lines) if found), None)
        return f"vllm serve ended with status {status}: {named or (lines or ['it printed nothing'])[-1]}"


def vllm_program() -> str:
    """Path of the program `vllm`: the value of `OTDRG_VLLM`, or the one on PATH.

    Raises:
        ValueError: there is none.
    """
    named = os.environ.get(PROGRAM)
    found = shutil.which(named or "vllm")
    if found is None:
        where = f"{PROGRAM}={named}" if named else "vllm on PATH"
        raise ValueError(
            f"--engine vllm: {where} is not a program, expected that of vLLM, which is installed in an environment of "
            f"its own; {PROGRAM} names it, or --engine-url a running server"
        )
    return found


def serve_arguments(folder: str | Path, name: str) -> list[str]:
    """Arguments of the program `vllm` that serve an LLM for this package.

    Args:
        folder: of the LLM.
        name: by which clients recognise it.
    """
    # Without the folder's own settings of sampling: each request has all of them.
    settings = ["--generation-config", "vllm"]
    return ["serve", str(folder), "--served-model-name", name, "--enable-prompt-embeds", *settings]


@contextmanager
def vllm_server(arguments: list[str], log: Path) -> Iterator[Server]:
    """Run `vllm` with arguments on a free port of this machine, until the body ends, however it ends.

    Args:
        arguments: those of [`serve_arguments`], and more.
        log: file for its output.

    Raises:
        ValueError: there is no such program.
        OSError: it cannot be started.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [vllm_program(), *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches this process alone, which ends the server and the server's children.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(_GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


__all__ = ["PROGRAM", "Server", "serve_arguments", "vllm_program", "vllm_server"]
