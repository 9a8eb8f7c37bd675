"""The split in which R2Gen published IU X-Ray, by study id; R2Gen itself has it only as a part of its annotation."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

#: Studies of R2Gen's split, and numbers that the collection's 3,955 studies are taken from.
IU_XRAY_COUNTS: dict[str, int] = {"train": 2_069, "validation": 296, "test": 590}
IU_XRAY_NUMBERS = range(1, 4_000)

_NUMBER = re.compile(r"CXR(\d+)(?:_|$)")


def r2gen_split_ids() -> dict[str, list[str]]:
    """Study ids of R2Gen's splits train and validation, as R2Gen writes them ("CXR2384_IM-0942")."""
    return {split: list(_listed()[split]) for split in ("train", "validation")}


def r2gen_split(study: str) -> str | None:
    """The split of R2Gen that a study of IU X-Ray is in, None where it is in none.

    Train, validation and the 1,000 studies that R2Gen leaves out are listed. Every other of the collection is of the
    test split, whose ids are not listed.

    Args:
        study: its id, or only the part before the image number ("CXR2384").
    """
    number = _NUMBER.match(study)
    if number is None or int(number[1]) not in IU_XRAY_NUMBERS:
        return None
    return _split_of_number().get(int(number[1]), "test")


@cache
def _listed() -> dict[str, list[str]]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@cache
def _split_of_number() -> dict[int, str | None]:
    names = {"train": "train", "validation": "validation", "left_out": None}
    return {int(_NUMBER.match(study)[1]): split for name, split in names.items() for study in _listed()[name]}


__all__ = ["IU_XRAY_COUNTS", "r2gen_split", "r2gen_split_ids"]
