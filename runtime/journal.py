"""Unfinished work on disk: finished items, a line each, and the settings under which they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..files_otdrg import read_json, write_json


class Journal:
    """A `.jsonl` file of finished items that is added to; if the process is killed, only a line cut off is lost.

    Args:
        path: the file; it need not exist. It is not changed by reading.

    Attributes:
        rows: its items in order, each a JSON object.
        cut_off: number of bytes of a line cut off at the end; [`add`] removes it, unless another process has ended it.

    Raises:
        ValueError: a line is no JSON object.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self.cut_off = 0
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        *lines, last = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}, line {number}: no JSON object; delete the file to start again")
            self.rows.append(row)
        self.cut_off, self._size = len(last), len(content)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add items, each a line; they are on disk when this returns."""
        rows = list(rows)
        if self.cut_off and self.path.stat().st_size == self._size:
            os.truncate(self.path, self._size - self.cut_off)
        self.cut_off = 0
        append_rows(self.path, rows)
        self.rows += rows


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a `.jsonl` file, each a line; they are on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class WorkSettings:
    """The settings and inputs that work depends on; unfinished work is continued only under the same ones.

    Args:
        work: file or folder of the work, for error messages.
        settings: values that JSON can hold; others are converted to text.
        digests: names of settings whose values are digests, which errors do not show.
        defaults: values of settings that did not exist when older work was begun.
    """

    def __init__(
        self,
        work: str | os.PathLike,
        settings: dict[str, Any],
        digests: Collection[str] = (),
        defaults: dict[str, Any] | None = None,
    ):
        self.work = work
        # Through JSON, so that values compare equal to those read from a file.
        self.settings, self.defaults = json.loads(json.dumps([settings, defaults or {}], default=str))
        self.digests = digests

    def check(self, before: dict[str, Any], anew: str = "--overwrite") -> None:
        """Refuse to continue work that was begun with other settings.

        Args:
            before: the settings it was begun with.
            anew: how the user starts anew, for the error.

        Raises:
            ValueError: `before` differs; the message names the settings and both values.
        """
        before = {**self.defaults, **before}
        changes = [
            name if name in self.digests else f"{name}={before.get(name)!r}, now {self.settings.get(name)!r}"
            for name in {**self.settings, **before}
            if before.get(name) != self.settings.get(name)
        ]
        if changes:
            raise ValueError(
                f"{self.work} was made with other settings ({'; '.join(changes)}): expected the same, another "
                f"--output, or {anew}, which starts anew"
            )

    def keep(self, path: str | os.PathLike) -> None:
        """Write the settings to a JSON file; if it is there, compare them first.

        Raises:
            ValueError: the file is damaged or holds other settings.
            OSError: the file cannot be read or written.
        """
        if os.path.isfile(path):
            self.check(read_json(path))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.settings)
