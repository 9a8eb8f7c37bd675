"""Check that a chat template can be rendered within limits of time and memory."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

#: A template may take this long for one short message, this much memory, and write this many characters.
_SECONDS, _BYTES, _CHARACTERS = 3, 2**29, 2**20
_CHECKED: set[str] = set()
_MESSAGE = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "\nIndication: cough\nWrite the report."}],
}


def check_chat_template(template: str, render: Callable[..., str]) -> None:
    """Render a chat template once in another process with limited time and memory.

    jinja2's sandbox limits what a template can access, but not how long it runs. On systems without `fork` nothing is
    checked.

    Args:
        template: the template.
        render: `apply_chat_template`, called with messages, `chat_template` and `tokenize=False`.

    Raises:
        ValueError: it exceeded a limit.
    """
    if template in _CHECKED:
        return
    if hasattr(os, "fork"):
        fault = _fault(lambda: render([_MESSAGE], chat_template=template, tokenize=False))
        if fault is not None:
            raise ValueError(f"the chat template {fault}")
    _CHECKED.add(template)


def _fault(render: Callable[[], str]) -> str | None:
    with suppress(ImportError):
        import_module("jinja2.sandbox")  # so that the other process need not

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.write(writer, _limited(render).encode("utf-8", "replace")[:2000])
        finally:
            os._exit(0)
    os.close(writer)
    ready: list = []
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            ready = selector.select(_SECONDS)
        answer = os.read(reader, 4096).decode("utf-8", "replace") if ready else f"takes more than {_SECONDS} s"
    finally:
        os.close(reader)
        # With SIGCHLD ignored, a process that has ended is gone at once. One that has answered ends by itself.
        with suppress(ProcessLookupError, ChildProcessError):
            if not ready:
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not answer:
        answer = "ends the process that renders it"
    return None if answer == "ok" else answer


def _limited(render: Callable[[], str]) -> str:
    """Run in the other process: "ok", or the limit that was exceeded."""
    try:
        # Not imported by name: transformers refuses code whose imports are missing, and Windows has no such module.
        resource = import_module("resource")
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, hard))
    except (ImportError, OSError, ValueError):
        pass  # not Linux: the time is limited all the same
    try:
        began = time.monotonic()
        text = render()
        if len(text) > _CHARACTERS:
            return f"writes {len(text):,} characters for a short message, expected up to {_CHARACTERS:,}"
        return "ok" if time.monotonic() - began <= _SECONDS else f"takes more than {_SECONDS} s"
    except MemoryError:
        return f"needs more than {_BYTES >> 20} MB"
    except BaseException:
        return "ok"  # it ends, by an error that is raised again where the template is used


__all__ = ["check_chat_template"]
