"""JSON objects on disk, a line each, written as they come, so that what is broken off can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files_otdrg import read_json


class Journal:
    """A `.jsonl` file that is added to and survives being killed: a last line that was cut off is removed.

    Whoever keeps one sees to it that all its rows are of the same making ([`differing_settings`]).

    Args:
        path: the file; it need not be there.

    Attributes:
        rows: what is in it, in order.

    Raises:
        ValueError: a line is no JSON object.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        if not self.path.exists():
            return
        *lines, cut_off = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}, line {number}: no JSON object; delete the file to begin anew")
            self.rows.append(row)
        if cut_off:
            os.truncate(self.path, self.path.stat().st_size - len(cut_off))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, each a line; they are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.rows.append(row)


def differing_settings(path: Path, settings: dict[str, Any], digests: Iterable[str] = ()) -> str | None:
    """What of the settings kept in a JSON file differs from those of now, in a few words; None where nothing does.

    Args:
        path: of the file.
        settings: of now.
        digests: settings whose values say nothing to people.

    Raises:
        ValueError: the file is damaged.
        OSError: the file cannot be read.
    """
    before = read_json(path)
    differing = [name for name in settings if before.get(name) != settings[name]]
    return (
        ", ".join(name if name in digests else f"{name} {before.get(name)}, now {settings[name]}" for name in differing)
        or None
    )


__all__ = ["Journal", "differing_settings"]
