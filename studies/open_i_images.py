"""File names of the images of the Indiana University collection, and Kaggle's table of their projections."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .csv_rows import read_columns

_EXTENSIONS = (".png", ".jpg", ".jpeg")


class ImageNames:
    """Finds images under any of their common names.

    Args:
        folder: folder of the images.

    Attributes:
        found: number of images found.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.names = set(os.listdir(folder))
        self.found = 0
        self._in_study: dict[str, set[str]] = {}
        files = [name for name in self.names if name.endswith(_EXTENSIONS)]
        self._kaggle = any(re.fullmatch(r"\d+_IM-.*\.dcm\.png", name) for name in files)
        self._flat = not self._kaggle and any(re.fullmatch(r"CXR\d+_.*-.*", name) for name in files)

    def find(self, study: str, image: str, place: int) -> str:
        """The path of an image in the folder; if it is missing, the expected path.

        `image` is its name in the report ("CXR1_1_IM-0001-3001"), `place` its position in the report's list, from 0.
        """
        for name in (*(image + extension for extension in _EXTENSIONS), kaggle_name(image)):
            if name in self.names:
                self.found += 1
                return name
        study = self._study_folder(study)
        inside = self._inside(study) if study in self.names else set()
        for extension in _EXTENSIONS:
            if f"{place}{extension}" in inside:
                self.found += 1
                return f"{study}/{place}{extension}"
        if self._kaggle or self._flat:
            return kaggle_name(image) if self._kaggle else f"{image}.png"
        extensions = {os.path.splitext(name)[1] for name in inside} & set(_EXTENSIONS)
        return f"{study}/{place}{min(extensions, default='.png')}"

    def _study_folder(self, study: str) -> str:
        # R2Gen names it after the study. Some copies omit "-0001" for studies that R2Gen does not have.
        short = re.match(r".*_[A-Za-z]+-[0-9]+", study)
        names = [study] + ([short[0]] if short else [])
        return next((name for name in names if name in self.names), study)

    def _inside(self, study: str) -> set[str]:
        if study not in self._in_study:
            path = os.path.join(self.folder, study)
            self._in_study = {study: set(os.listdir(path)) if os.path.isdir(path) else set()}
        return self._in_study[study]


def kaggle_name(image: str) -> str:
    """ "CXR1_1_IM-0001-3001" → "1_IM-0001-3001.dcm.png"; only CXR1 has two numbers."""
    return re.sub(r"^CXR(\d+)_(?:\d+_)?", r"\1_", image) + ".dcm.png"


def read_projections(path: str) -> dict[str, str]:
    """Read Kaggle's indiana_projections.csv: `{file name: "frontal", "lateral" or "unknown"}`.

    Raises:
        ValueError: another file; the message names the line or column.
    """
    views = {"frontal": "frontal", "lateral": "lateral", "": "unknown"}
    found = {}
    for line, (name, projection) in read_columns(Path(path), ("filename", "projection")):
        if projection.lower() not in views:
            raise ValueError(f"{path}, line {line}: projection is {projection!r}, expected Frontal or Lateral")
        found[name] = views[projection.lower()]
    return found
