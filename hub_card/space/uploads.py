"""Views that visitors bring: read at once, kept in memory for their session, and deleted from the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...findings_otdrg import FINDINGS
from ...processing_otdrg import read_view
from ...studies.phantom import make_phantom

#: Views of a study that the page takes: one projection, or two.
MAX_VIEWS = 2
#: Largest upload. A radiograph of 4,000 x 4,000 pixels of 16 bits, uncompressed, is 32 MB.
MAX_FILE_SIZE = "64mb"

#: Title, projections and findings of the phantoms to try.
_EXAMPLES = (
    ("Normal, frontal", ("frontal",), ()),
    ("Pleural effusion, frontal and lateral", ("frontal", "lateral"), ("pleural_effusion",)),
    ("Pneumothorax, frontal", ("frontal",), ("pneumothorax",)),
)


class View(NamedTuple):
    """A view and what it is called: the name of its file, without its folder."""

    name: str
    image: Image.Image


class Example(NamedTuple):
    """A procedural study."""

    title: str
    views: list[View]


def read_uploads(paths: Sequence[str], before: Sequence[View], max_pixels: int) -> list[View]:
    """The study's views, those of `before` and then what was uploaded; the uploaded files are deleted, read or not.

    Args:
        paths: files as they were uploaded, images or DICOM.
        before: views that the study has.
        max_pixels: larger images are refused.

    Raises:
        ValueError: more than `MAX_VIEWS` in all, or a file that cannot be read, by its name.
        ImportError: DICOM without pydicom.
    """
    try:
        total = len(before) + len(paths)
        if total > MAX_VIEWS:
            already = f", {len(before)} of them here already" if before else ""
            raise ValueError(f"{total} views{already}: a study has one or two here, clear it to start another")
        return [*before, *(View(Path(path).name, _read(path, max_pixels)) for path in paths)]
    finally:
        for path in map(Path, paths):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder of this upload, unless it holds another
                path.parent.rmdir()


def phantom_examples(image_size: int) -> list[Example]:
    """Procedural studies to try, made when they are asked for; no patient's.

    Args:
        image_size: height and width in pixels.
    """
    examples = []
    for index, (title, projections, positive) in enumerate(_EXAMPLES):
        states = ["positive" if finding in positive else "negative" for finding in FINDINGS[:-1]]
        phantom = make_phantom(0, index, image_size, projections, states)
        views = [View(f"phantom, {view}", image) for view, image in zip(phantom.views, phantom.images, strict=True)]
        examples.append(Example(title, views))
    return examples


def _read(path: str, max_pixels: int) -> Image.Image:
    try:
        return read_view(path, max_pixels)
    except ValueError as error:
        # The folder is the server's and tells a visitor nothing.
        raise ValueError(str(error).replace(path, Path(path).name)) from error


__all__ = ["MAX_FILE_SIZE", "MAX_VIEWS", "Example", "View", "phantom_examples", "read_uploads"]
