"""Images as they are stored in a dataset: the same pixels that [`read_view`] reads, without metadata."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ..image_processing_otdrg import is_dicom, read_file, read_view, reads_alike, shown_name
from ..runtime.interruptions import fault_of_study
from .chest import NOT_CHEST, dicom_chest_fault
from .metadata import without_metadata
from .source import SkipStudy

_JPEG_QUALITY = 95


def referenced_image(view: str | bytes | Image.Image) -> dict:
    """A view for a dataset in memory: an image file is referenced, and only its header is read.

    Files that `datasets` would decode to other pixels than [`read_view`] (DICOM, deep colour, TIFF with more than 8
    bits) are converted by [`stored_image`].

    Raises:
        SkipStudy: the file is missing or cannot be read.
    """
    if isinstance(view, str):
        _check_exists(view)
        try:
            if reads_alike(view):
                return {"bytes": None, "path": view}
        except ValueError as error:
            raise SkipStudy("unreadable image", str(error)) from None
    return stored_image(view)


def stored_image(view: str | bytes | Image.Image, shorter_side: int | None = None) -> dict:
    """A view for a dataset on disk: `{"bytes", "path"}` of an image that every library decodes as [`read_view`] does.

    The pixel data of JPEG and PNG files is kept byte for byte if it decodes to the same pixels; everything else becomes
    an 8-bit PNG. Metadata is removed, and `path` is None, because file names can hold names of patients.

    Args:
        view: a path (also of a DICOM file), the bytes of an image file, or an image.
        shorter_side: scale an image down to this shorter side, in pixels, if its shorter side is longer.

    Raises:
        SkipStudy: the file is missing, cannot be read, or is no chest radiograph according to its header.
    """
    data, name = view if isinstance(view, bytes) else None, "an image in memory"
    try:
        if isinstance(view, str):
            _check_exists(view)
            data, name = read_file(view), view
        picture = read_view(view if data is None else data, name=name)
    except ValueError as error:
        raise SkipStudy("unreadable image", str(error)) from None
    if data is not None and is_dicom(data, name):
        fault = dicom_chest_fault(data)
        if fault is not None:
            raise SkipStudy(NOT_CHEST, f"{shown_name(name)}: {fault}")
        data = None
    if shorter_side is not None and min(picture.size) > shorter_side:
        kind = "JPEG" if data is not None and data[:2] == b"\xff\xd8" else "PNG"
        encoded = _encoded(_scaled(_gray(picture), shorter_side), kind)
    else:
        encoded = _kept(data, picture) or _encoded(_gray(picture), "PNG")
    return {"bytes": encoded, "path": None}


def read_images(
    images: Sequence[str | bytes | Image.Image], image_form: Callable[[str | bytes | Image.Image], dict]
) -> tuple[dict[int, dict], list[tuple[str, str]]]:
    """The converted images by their positions, and (kind, reason) of those that cannot be used."""
    read, faults = {}, []
    for number, image in enumerate(images):
        try:
            read[number] = image_form(image)
        except SkipStudy as skip:
            faults.append((skip.kind, skip.reason))
        except Exception as error:  # decoders raise any exception for a damaged file
            name = image if isinstance(image, str) else f"view {number}"
            faults.append(("unreadable image", f"{name}: {fault_of_study(error)}"))
    return read, faults


def _check_exists(path: str) -> None:
    if not os.path.exists(path):
        raise SkipStudy("missing image", f"{shown_name(path)} does not exist")


def _kept(data: bytes | None, picture: Image.Image) -> bytes | None:
    """A JPEG or PNG file without metadata if it decodes to the picture, else None."""
    stripped = None if data is None else without_metadata(data)
    if stripped is None:
        return None
    if stripped == data and data[:2] == b"\xff\xd8":
        return data  # without EXIF, every library decodes a JPEG alike
    with Image.open(io.BytesIO(stripped), formats=("JPEG", "PNG")) as image:
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
            return None
        return stripped if np.array_equal(np.asarray(image.convert("RGB")), np.asarray(picture)) else None


def _gray(picture: Image.Image) -> Image.Image:
    """The picture with one channel if its three channels are equal."""
    red, green, blue = picture.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else picture


def _scaled(image: Image.Image, shorter_side: int) -> Image.Image:
    ratio = shorter_side / min(image.size)
    size = tuple(max(shorter_side, round(side * ratio)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "JPEG":
        image.save(file, format=kind, quality=_JPEG_QUALITY)
    else:
        # Noise hardly compresses: level 1 is 4 times as fast as the default.
        image.save(file, format=kind, compress_level=1)
    return file.getvalue()
