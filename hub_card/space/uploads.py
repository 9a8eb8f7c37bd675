"""Uploaded views: read at once, kept in memory as small pictures, and deleted from the disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...findings_otdrg import FINDINGS
from ...processing_otdrg import read_view
from ...studies.phantom import make_phantom

#: Most views of a study.
MAX_VIEWS = 2
#: Largest file. A radiograph of 4,000 x 4,000 pixels with 16 bits, uncompressed, has 32 MB.
MAX_FILE_SIZE = "64mb"
#: Bytes of one request: two such files and the headers around them.
MAX_REQUEST = (MAX_VIEWS * 64 + 1) * 2**20
#: Bytes of all visitors' uploads that are arriving or waiting to be read.
MAX_UPLOADS = 256 * 2**20
#: Most seconds an upload may take.
UPLOAD_SECONDS = 120
#: Seconds after which an unread file is deleted; more than `UPLOAD_SECONDS`.
KEPT_UNREAD = 300

#: Longest side in pixels of a view on the page.
_SHOWN_SIDE = 480

#: Title, projections and findings of the example phantoms.
_EXAMPLES = (
    ("Normal, frontal", ("frontal",), ()),
    ("Pleural effusion, frontal and lateral", ("frontal", "lateral"), ("pleural_effusion",)),
    ("Pneumothorax, frontal", ("frontal",), ("pneumothorax",)),
)

Resize = Callable[[Image.Image], Image.Image]


class View(NamedTuple):
    """Two small pictures of a view, because a full one takes up to 256 MB.

    Args:
        name: file name, without the folder.
        image: picture for the page.
        model_input: picture resized by the model's image processor.
        size: width and height in pixels as uploaded.
    """

    name: str
    image: Image.Image
    model_input: Image.Image
    size: tuple[int, int]


class NoRoomError(RuntimeError):
    """There is no room for another upload at the moment."""


class UploadFolder:
    """Limits the size and the age of uploads in the folder where Gradio writes them.

    Args:
        path: the folder, used by this server only.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._arriving = 0

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes for an upload while it arrives.

        Raises:
            NoRoomError: too many bytes are reserved or unread.
        """
        waiting = sum(found.st_size for _, found in self._files())
        if waiting + self._arriving + size > MAX_UPLOADS:
            raise NoRoomError(
                f"no room for an upload of {size / 1e6:.0f} MB while others are arriving: try again in a minute"
            )
        self._arriving += size
        try:
            yield
        finally:
            self._arriving -= size
            if not self._arriving:
                self._delete_parts()

    def make_private(self, path: str) -> str:
        """Move an upload into a folder of its own: for Gradio, the same file of two visitors has the same path."""
        folder = self.path / secrets.token_hex(16)
        folder.mkdir()
        moved = Path(path).rename(folder / Path(path).name)
        with contextlib.suppress(OSError):
            Path(path).parent.rmdir()
        return str(moved)

    def delete_unread(self, age: float = KEPT_UNREAD) -> None:
        """Delete files that were last written more than `age` seconds ago and not read since."""
        for path, found in self._files():
            if time.time() - found.st_mtime > age:
                _delete(path, self.path)

    def _delete_parts(self) -> None:
        """Delete what Gradio leaves of interrupted uploads; complete ones are in folders of their own."""
        for path in self.path.glob("*"):
            if not path.is_dir():
                _delete(path, self.path)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder, _, names in os.walk(self.path):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):  # read and deleted meanwhile
                    yield path, path.lstat()


def read_uploads(
    paths: Sequence[str], before: Sequence[View], max_pixels: int, resize: Resize | None = None
) -> list[View]:
    """Read uploaded views and append them to a study's; the files are deleted, whether they could be read or not.

    `resize` makes the model's input of a view; by default a copy of the view.

    Raises:
        ValueError: more than `MAX_VIEWS` in all, or a file cannot be read; the message has its name.
        ImportError: a DICOM file without pydicom.
    """
    try:
        total = len(before) + len(paths)
        if total > MAX_VIEWS:
            already = f", {len(before)} of them already in the study" if before else ""
            raise ValueError(f"{total} views{already}: expected one or two; Clear starts another study")
        # One full picture at a time is in memory.
        return [*before, *(_read(path, max_pixels, resize) for path in paths)]
    finally:
        for path in paths:
            _delete(Path(path))


def phantom_examples(image_size: int) -> dict[str, list[View]]:
    """Phantom studies of `image_size` x `image_size` pixels, by title."""
    examples = {}
    for index, (title, projections, positive) in enumerate(_EXAMPLES):
        states = ["positive" if finding in positive else "negative" for finding in FINDINGS[:-1]]
        phantom = make_phantom(0, index, image_size, projections, states)
        examples[title] = [
            View(f"phantom, {view}", image, image, image.size)
            for view, image in zip(phantom.views, phantom.images, strict=True)
        ]
    return examples


def _read(path: str, max_pixels: int, resize: Resize | None) -> View:
    name = Path(path).name
    try:
        image = read_view(path, max_pixels)
    except ValueError as error:
        # The folder is a path of the server.
        raise ValueError(str(error).replace(path, name)) from error
    size, model_input = image.size, resize(image) if resize else image.copy()
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return View(name, image, model_input, size)


def _delete(path: Path, root: Path | None = None) -> None:
    """Delete a file and its folder, unless that holds another file or is `root`."""
    with contextlib.suppress(OSError):
        path.unlink()
        if path.parent != root:
            path.parent.rmdir()
