"""Views as they are kept in a dataset: checked, and free of what a DICOM file says about the patient."""

from __future__ import annotations

import io
import os

from PIL import Image, UnidentifiedImageError

from .source import SkipStudy

#: Formats whose files are kept as they are; others become PNG.
_KEPT_FORMATS = {"JPEG", "PNG"}
_JPEG_QUALITY = 95


def referenced_image(view: str | bytes | Image.Image) -> dict:
    """A view for a dataset in memory: an image file stays on disk, unread; all else is as in [`stored_image`].

    Raises:
        SkipStudy: the file is missing, or what is not an image file cannot be read.
    """
    if isinstance(view, str) and not _is_dicom(view):
        if not os.path.isfile(view):
            raise SkipStudy("missing image", f"{view} does not exist")
        return {"bytes": None, "path": view}
    return stored_image(view)


def stored_image(view: str | bytes | Image.Image, shorter_side: int | None = None) -> dict:
    """A view for a dataset on disk: `{"bytes", "path"}` of an image that has been decoded to its end.

    JPEG and PNG files are kept byte for byte; DICOM becomes an 8-bit gray PNG that has no metadata.

    Args:
        view: a path, DICOM too; the bytes of an image file; or an image.
        shorter_side: an image whose shorter side is longer is scaled down to this many pixels.

    Raises:
        SkipStudy: the file is missing, or it cannot be read as an image.
    """
    name = view if isinstance(view, str) else "an image in memory"
    data = _read(view) if isinstance(view, str) else view if isinstance(view, bytes) else None
    file_name = os.path.basename(view) if isinstance(view, str) else None
    try:
        if data is None:
            image = view
        elif _is_dicom(name, data):
            image, data, file_name = _read_dicom(view), None, None
        else:
            image = Image.open(io.BytesIO(data))
            image.load()
        kind = image.format if image.format in _KEPT_FORMATS else "PNG"
        if shorter_side is not None and min(image.size) > shorter_side:
            image, data = _scaled(image, shorter_side), None
        if data is None or kind != image.format:
            data = _encoded(image, kind)
    except UnidentifiedImageError:
        raise SkipStudy("unreadable image", f"{name}: neither an image that Pillow reads nor DICOM") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise SkipStudy("unreadable image", f"{name}: {error}") from None
    return {"bytes": data, "path": file_name}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise SkipStudy("missing image", f"{path} does not exist") from None
    except OSError as error:
        raise SkipStudy("unreadable image", f"{path}: {error.strerror}") from None


def _is_dicom(name: str, data: bytes | None = None) -> bool:
    return name.lower().endswith((".dcm", ".dicom")) or (data is not None and data[128:132] == b"DICM")


def _read_dicom(view: str | bytes) -> Image.Image:
    # Imported here: it brings torch, which other sources do not need.
    from ..processing_otdrg import read_view

    return read_view(view).convert("L")


def _scaled(image: Image.Image, shorter_side: int) -> Image.Image:
    if image.mode == "P":
        image = image.convert("RGB")
    ratio = shorter_side / min(image.size)
    size = tuple(max(shorter_side, round(side * ratio)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "JPEG":
        image.save(file, format=kind, quality=_JPEG_QUALITY)
    else:
        # The noise of a radiograph hardly compresses: level 1 is 4 times as fast as the default.
        image.save(file, format=kind, compress_level=1)
    return file.getvalue()


__all__ = ["referenced_image", "stored_image"]
