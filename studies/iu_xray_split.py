"""R2Gen's split of IU X-Ray by study id, which R2Gen only publishes as a part of its annotation."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

#: Number of studies in R2Gen's split, and the range of the study numbers in the collection.
IU_XRAY_COUNTS: dict[str, int] = {"train": 2_069, "validation": 296, "test": 590}
IU_XRAY_NUMBERS = range(1, 4_000)

_NUMBER = re.compile(r"CXR(\d+)(?:_|$)")


def r2gen_split_ids() -> dict[str, list[str]]:
    """Study ids of R2Gen's splits train and validation, as R2Gen writes them ("CXR2384_IM-0942")."""
    return {split: list(_listed()[split]) for split in ("train", "validation")}


def r2gen_split(study: str) -> str | None:
    """The split of a study of IU X-Ray ("CXR2384" or its whole id) in R2Gen; None if R2Gen does not use the study.

    The file lists train, validation and the 1,000 studies that R2Gen does not use; all others are the test split.
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
