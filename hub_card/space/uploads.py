"""Views that visitors bring: read at once, kept small in memory, and deleted from the disk."""

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

#: Views of a study that the page takes: one projection, or two.
MAX_VIEWS = 2
#: Largest upload. A radiograph of 4,000 x 4,000 pixels of 16 bits, uncompressed, is 32 MB.
MAX_FILE_SIZE = "64mb"
#: Bytes of one request: two such files, and what is around them.
MAX_REQUEST = (MAX_VIEWS * 64 + 1) * 2**20
#: Bytes of all visitors' uploads that are arriving or wait to be read.
MAX_UPLOADS = 256 * 2**20
#: Seconds in which an upload has to arrive.
UPLOAD_SECONDS = 120
#: Seconds after which a file that nobody reads is deleted; more than `UPLOAD_SECONDS`.
KEPT_UNREAD = 300

#: Longest side in pixels of a view in the page.
_SHOWN_SIDE = 480

#: Title, projections and findings of the phantoms to try.
_EXAMPLES = (
    ("Normal, frontal", ("frontal",), ()),
    ("Pleural effusion, frontal and lateral", ("frontal", "lateral"), ("pleural_effusion",)),
    ("Pneumothorax, frontal", ("frontal",), ("pneumothorax",)),
)

Resize = Callable[[Image.Image], Image.Image]


class View(NamedTuple):
    """A view of a study: two small pictures of it, because a full one takes up to 256 MB."""

    #: The file's, without its folder.
    name: str
    #: For the page.
    image: Image.Image
    #: As the model's image processor resizes it.
    model_input: Image.Image
    #: Width and height in pixels as uploaded.
    size: tuple[int, int]


class Example(NamedTuple):
    """A procedural study."""

    title: str
    views: list[View]


class NoRoomError(RuntimeError):
    """The uploads that arrive or wait to be read leave no room for another."""


class UploadFolder:
    """The folder where Gradio writes uploads: how much may lie in it, and for how long.

    Args:
        path: the folder, of this server alone.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._arriving = 0

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Keep `size` bytes for an upload while it arrives.

        Raises:
            NoRoomError: for now.
        """
        waiting = sum(found.st_size for _, found in self._files())
        if waiting + self._arriving + size > MAX_UPLOADS:
            raise NoRoomError(
                f"the uploads that arrive now leave no room for {size / 1e6:.0f} MB more: try again in a minute"
            )
        self._arriving += size
        try:
            yield
        finally:
            self._arriving -= size
            if not self._arriving:
                self._delete_parts()

    def make_private(self, path: str) -> str:
        """Move an upload into a folder of its own: Gradio gives two visitors who upload the same file one path."""
        folder = self.path / secrets.token_hex(16)
        folder.mkdir()
        moved = Path(path).rename(folder / Path(path).name)
        with contextlib.suppress(OSError):
            Path(path).parent.rmdir()
        return str(moved)

    def delete_unread(self, age: float = KEPT_UNREAD) -> None:
        """Delete files that nobody has read, whole or not.

        Args:
            age: in seconds, since the file was last written to.
        """
        for path, found in self._files():
            if time.time() - found.st_mtime > age:
                _delete(path, self.path)

    def _delete_parts(self) -> None:
        """Delete what Gradio leaves of uploads that broke off; whole ones are in folders of their own."""
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
    """The study's views, those of `before` and then what was uploaded; the uploaded files are deleted, read or not.

    Args:
        paths: files as they were uploaded, images or DICOM.
        before: views that the study has.
        max_pixels: larger images are refused.
        resize: makes a view what the model takes; without it, the view itself.

    Raises:
        ValueError: more than `MAX_VIEWS` in all, or a file that cannot be read, by its name.
        ImportError: DICOM without pydicom.
    """
    try:
        total = len(before) + len(paths)
        if total > MAX_VIEWS:
            already = f", {len(before)} of them here already" if before else ""
            raise ValueError(f"{total} views{already}: a study has one or two here, clear it to start another")
        # One at a time: of the one before, only the small pictures are left.
        return [*before, *(_read(path, max_pixels, resize) for path in paths)]
    finally:
        for path in paths:
            _delete(Path(path))


def phantom_examples(image_size: int) -> list[Example]:
    """Procedural studies to try, made when they are asked for; no patient's.

    Args:
        image_size: height and width in pixels.
    """
    examples = []
    for index, (title, projections, positive) in enumerate(_EXAMPLES):
        states = ["positive" if finding in positive else "negative" for finding in FINDINGS[:-1]]
        phantom = make_phantom(0, index, image_size, projections, states)
        views = [
            View(f"phantom, {view}", image, image, image.size)
            for view, image in zip(phantom.views, phantom.images, strict=True)
        ]
        examples.append(Example(title, views))
    return examples


def _read(path: str, max_pixels: int, resize: Resize | None) -> View:
    name = Path(path).name
    try:
        image = read_view(path, max_pixels)
    except ValueError as error:
        # The folder is the server's and tells a visitor nothing.
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


__all__ = [
    "KEPT_UNREAD",
    "MAX_FILE_SIZE",
    "MAX_REQUEST",
    "MAX_UPLOADS",
    "MAX_VIEWS",
    "UPLOAD_SECONDS",
    "Example",
    "NoRoomError",
    "UploadFolder",
    "View",
    "phantom_examples",
    "read_uploads",
]
