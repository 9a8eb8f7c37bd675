"""Read text and JSON files within limits of size and depth; write files atomically."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Maximum size of a file that is read as a whole; the tokenizer.json of a large vocabulary has 35 MB.
MAXIMUM_BYTES = 2**27
#: Maximum depth of nested lists and objects.
MAXIMUM_DEPTH = 100

_KINDS: dict[type, str] = {dict: "a JSON object", object: "JSON"}


def read_text(path: str | os.PathLike, what: str = "UTF-8 text", limit: int = MAXIMUM_BYTES) -> str:
    """The text of a file in UTF-8; `what` names the expected content in errors.

    Raises:
        ValueError: the file has more than `limit` bytes, or is not UTF-8.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes: expected {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): expected {what}") from None


def read_json(
    path: str | os.PathLike, kind: type = dict, parse: Callable[[Any], Any] | None = None, limit: int = MAXIMUM_BYTES
) -> Any:
    """The content of a JSON file, which must be of the type `kind`, converted by `parse`.

    Raises:
        ValueError: the file is not JSON of this kind, is too large or nested too deeply, or `parse` failed.
        OSError: the file cannot be read.
    """
    expected = _KINDS[kind]
    text = read_text(path, expected, limit)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
        raise ValueError(f"{path} is {problem}") from None
    if not isinstance(content, kind):
        found = "null" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {found}: expected {expected}")
    if _is_deep(content):
        raise ValueError(f"{path} is nested too deeply: expected up to {MAXIMUM_DEPTH} levels")
    if parse is None:
        return content
    return interpret(path, parse, content)


def interpret(path: str | os.PathLike, parse: Callable[..., Any], *arguments) -> Any:
    """`parse(*arguments)` for the content of a file.

    Raises:
        ValueError: it failed with an error that wrong content causes; the message names the file.
    """
    try:
        return parse(*arguments)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """The message of an error in one line."""
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else error!r} is missing"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    if isinstance(error, (TypeError, AttributeError, IndexError, OverflowError)) or not text:
        return f"a value of the wrong kind ({text or type(error).__name__})"
    return text


def _is_deep(content: Any) -> bool:
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAXIMUM_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file in UTF-8 atomically: if the process is killed, the file has either its old or its new content."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, sort_keys: bool = False) -> None:
    """Write a JSON file as [`write_text`] does."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    # File names from other systems can contain lone surrogates, which UTF-8 cannot encode: they become JSON escapes.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def follow_umask(path: str | os.PathLike) -> None:
    """Give a file that safetensors has written (mode 0600) the permissions of a new file; other modes are kept."""
    if os.name == "posix" and stat.S_IMODE(os.stat(path).st_mode) == 0o600:
        umask = os.umask(0o077)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)


__all__ = ["describe", "follow_umask", "interpret", "read_json", "read_text", "write_json", "write_text"]
