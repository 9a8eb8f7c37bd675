"""Reading one view: a file, URL, array or DICOM dataset becomes an upright 8-bit RGB picture.

Long, because it reads every common kind of image without other packages: it ships beside the weights.
"""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import io
import ipaddress
import os
import re
import socket
import stat
import struct
import sys
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: Most pixels of a view, unless the caller allows more.
MAX_PIXELS = 64_000_000
#: Smallest side of a view in pixels.
MINIMUM_SIDE = 16
#: Formats that Pillow is allowed to open. Others are refused by name: EPS, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "QOI")

_EXPECTED = "expected PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, JPEG 2000, AVIF, QOI or DICOM"
#: Upper limit of what callers can allow; Pillow has the same limit.
_MOST_PIXELS = 178_956_970
#: Time limits in seconds: for a whole download, and for one answer of the server.
_URL_SECONDS, _ANSWER_SECONDS = 60.0, 20.0
#: Maximum number of items in DICOM sequences: each becomes an object of about a kilobyte.
_MOST_ITEMS = 100_000
_DICOM_NAMES = (".dcm", ".dicom")

#: Formats by their first bytes, a dot for any byte.
_SIGNATURES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WebP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "GIF": rb"GIF8",
    "PPM": rb"P[1-7fFy][\s#]",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(?:hei|hev|mif|msf)",
    "QOI": rb"qoif",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "zip": rb"PK\x03\x04",
    "gzip": rb"\x1f\x8b",
    "Photoshop": rb"8BPS",
    "NIfTI": rb"\x5c\x01\0\0|\0\0\x01\x5c",
    "HTML": rb"\s*<(?:!DOCTYPE|!doctype|html|HTML)",
}

#: Markers of JPEG and JPEG-LS frames.
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}

_DECODERS = "pip install python-gdcm pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
_ONE_SHADE = "all pixels have one shade, expected a radiograph"


class _Refusal(ValueError):
    """The reason why a view cannot be read, in one line, without the name of the view."""


def read_view(view, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """One view as an upright 8-bit RGB image.

    Images of more than 8 bits per channel, and floats outside 0 to 1, are scaled from their own range. Transparent
    pixels are blended with black. For DICOM, the modality transformation and the VOI LUT or first window are applied
    (unless all values are outside of the window); padding is black, and MONOCHROME1 is inverted. Only the first frame
    of an animation or page of a file is read; DICOM with several frames is refused.

    Args:
        view: a path, an http(s) URL, a data URL (`data:image/png;base64,...`), the bytes of a file, a PIL image, an
            array or tensor (H, W), (H, W, C) or (C, H, W), or a pydicom dataset. The pixels of a decoded PIL image are
            used unchanged, and the type that a data URL names is ignored.
        max_pixels (`int`): larger images are refused before they are decoded, and so are files too large for an image.
        name (`str`, *optional*): name of the view in error messages; by default its path or URL.

    Raises:
        ValueError: the view cannot be read, has a side below 16 pixels or one shade only; one line, begins with its
            name.
        ImportError: a DICOM file without pydicom.
    """
    path = os.fsdecode(view) if isinstance(view, (str, os.PathLike)) and not is_data_url(view) else None
    kind, read = _reader(view)
    name = shown_name(name or (kind if path is None else path))
    try:
        with warnings.catch_warnings():
            # Warnings of Pillow and pydicom quote the content of a file.
            warnings.simplefilter("ignore")
            picture = read(view, name if path is None else path, min(max_pixels, _MOST_PIXELS))
        if picture.getcolors(1) is not None:
            raise _Refusal(_ONE_SHADE)
        picture.info = {}  # texts and profiles, which would be saved with the picture
        return picture
    except ImportError:
        raise
    except _Refusal as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # parsers raise errors of any type for a damaged file
        raise ValueError(f"{name}: cannot be read ({_line(error)})") from error


def read_file(path: str) -> bytes:
    """The bytes of an image file, if it is not larger than an image of `MAX_PIXELS` can be.

    Raises:
        ValueError: it cannot be read, is larger, or is not a regular file; one line, begins with the path.
    """
    try:
        return _file_bytes(path, _most_bytes(MAX_PIXELS))
    except _Refusal as error:
        raise ValueError(f"{shown_name(path)}: {error}") from error


def shown_name(name: str) -> str:
    """A path or URL for error messages: without control characters, a URL's user, password and query, or its data."""
    if is_data_url(name):
        return "data URL"
    name = re.sub(r"^(https?://[^?#]*)[?#].*", r"\1", without_credentials(name), flags=re.IGNORECASE | re.DOTALL)
    return name if name.isprintable() and name else repr(name)[1:-1] or "''"


def without_credentials(name: str) -> str:
    """A path or URL without a URL's user and password."""
    # The second alternative: a password with a slash in it.
    return re.sub(r"^(https?://)(?:[^/?#]*@|[^/?#:]*:(?!\d*(?:[/?#]|$)).*@)", r"\1", name, flags=re.IGNORECASE)


def is_dicom(data: bytes, name: str = "") -> bool:
    """Whether the content or the file name is that of a DICOM file."""
    path = urlsplit(name).path if _is_url(name) else name
    return data[128:132] == b"DICM" or path.lower().endswith(_DICOM_NAMES)


def is_data_url(view) -> bool:
    """Whether a view is a text that begins with `data:`, in any case of letters."""
    return isinstance(view, str) and view[:5].lower() == "data:"


def reads_alike(path: str) -> bool:
    """Whether Pillow decodes a file to the same picture as [`read_view`], judged by its header.

    Raises:
        ValueError: the file is no image that [`read_view`] reads; one line, begins with the path.
    """
    try:
        _check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                _check_image_size(image, MAX_PIXELS)
                if image.format == "TIFF":
                    return _tiff_depth(image) == ("unsigned", 8)
                if image.format == "PNG":
                    with open(path, "rb") as file:
                        return not _is_deep_png(file.read(32))
                return image.format not in ("PPM", "JPEG2000", "AVIF")
    except _Refusal as error:
        raise ValueError(f"{shown_name(path)}: {error}") from error
    except Exception:  # [`read_view`] says what is wrong
        return False


def _reader(view) -> tuple[str, Callable[..., Image.Image]]:
    """The name for views of this kind in error messages, and the function that reads them."""
    if is_data_url(view):
        return "data URL", _from_data_url
    torch, pydicom = sys.modules.get("torch"), sys.modules.get("pydicom")  # without them there is no such view
    if isinstance(view, (str, os.PathLike)):
        return "file", _from_path
    if isinstance(view, (bytes, bytearray)):
        return "image", _from_bytes
    if isinstance(view, Image.Image):
        return str(getattr(view, "filename", "") or "image"), _from_pillow
    if isinstance(view, np.ndarray) or (torch is not None and isinstance(view, torch.Tensor)):
        return "array", _from_array
    if pydicom is not None and isinstance(view, pydicom.Dataset):
        return "DICOM dataset", _from_dicom
    raise ValueError(f"a view is a {type(view).__name__}: expected a path, URL, PIL image, array or DICOM dataset")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _Refusal(f"{width}x{height} pixels, expected at most {max_pixels} in total")
    if min(width, height) < MINIMUM_SIDE:
        raise _Refusal(f"{width}x{height} pixels, expected at least {MINIMUM_SIDE} on each side")


def _line(error: Exception | str) -> str:
    """The message of an error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:300]}..."


# --- files and URLs --------------------------------------------------------------------------------------------------


def _from_path(view, path: str, max_pixels: int) -> Image.Image:
    limit = _most_bytes(max_pixels)
    data = _download(path, limit) if _is_url(path) else _file_bytes(path, limit)
    return _from_bytes(data, path, max_pixels)


def _from_data_url(view, name: str, max_pixels: int) -> Image.Image:
    header, comma, content = view.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _Refusal("a data URL without base64, expected data:image/png;base64,...")
    if len(content) * 3 // 4 > _most_bytes(max_pixels):
        raise _Refusal(f"the file has more than {_most_bytes(max_pixels):,} bytes, expected a smaller image")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Refusal(f"the data URL is not base64 ({_line(error)}), expected data:image/png;base64,...") from error
    return _from_bytes(data, name, max_pixels)


def _is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _most_bytes(max_pixels: int) -> int:
    """Maximum size of a file: 4 bytes per pixel and a large header."""
    return 4 * max_pixels + 16 * 2**20


def _check_regular(path: str) -> None:
    """Refuse what is not a regular file: opening a pipe without a writer would block forever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise _Refusal("cannot be read (a pipe, socket or device), expected a file")


def _file_bytes(path: str, limit: int) -> bytes:
    try:
        _check_regular(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""  # files in /proc can be larger than their size
    except OSError as error:
        raise _Refusal(f"cannot be read ({error.strerror or type(error).__name__})") from error
    except ValueError as error:
        if isinstance(error, _Refusal):
            raise
        raise _Refusal(f"cannot be read ({_line(error)})") from error
    if max(size, len(data)) > limit:
        raise _Refusal(f"the file has more than {limit:,} bytes, expected a smaller image")
    return data


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to public addresses only: a server must not reach a private network through this machine."""

    def redirect_request(self, request, response, code, message, headers, url):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            return None
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
            public = all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)
        except (OSError, ValueError) as error:
            raise _Refusal("redirects to an unknown address, which is not followed") from error
        if not public:
            raise _Refusal("redirects to a private address, which is not followed")
        return super().redirect_request(request, response, code, message, headers, url)


class _TimedStream(io.RawIOBase):
    """Reads from a socket until a deadline, however slowly data arrives."""

    def __init__(self, stream: io.RawIOBase, connection: socket.socket, until: float):
        self._stream, self._connection, self._until = stream, connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(min(left, _ANSWER_SECONDS))
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, connection, *args, until: float, **kwargs):
        super().__init__(connection, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedStream(self.fp.detach(), connection, until))


class _TimedHTTP(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens URLs; the answer, including its headers, must arrive before a deadline."""

    def __init__(self, until: float):
        super().__init__()
        self._until = until

    def _connection(self, kind: type[http.client.HTTPConnection], host: str, **kwargs) -> http.client.HTTPConnection:
        connection = kind(host, **kwargs)
        connection.response_class = partial(  # type: ignore[assignment]
            _TimedResponse, until=self._until
        )
        return connection

    def http_open(self, request):
        return self.do_open(partial(self._connection, http.client.HTTPConnection), request)

    def https_open(self, request):
        return self.do_open(partial(self._connection, http.client.HTTPSConnection), request)


def _download(url: str, limit: int) -> bytes:
    try:
        scheme, rest = url.split("://", 1)
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        user, at, host = authority.rpartition("@")
        request = urllib.request.Request(f"{scheme}://{host}{rest[len(authority) :]}")
        if at:
            # Not sent to the target of a redirect.
            credentials = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {credentials}")
        opener = urllib.request.build_opener(_TimedHTTP(time.monotonic() + _URL_SECONDS), _Redirects)
        with opener.open(request, timeout=_ANSWER_SECONDS) as response:
            data = response.read(limit + 1)
            expected = int(response.headers.get("Content-Length") or 0)
    except _Refusal:
        raise
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            raise _Refusal("redirects too often, or to an address other than an http(s) URL, not followed") from error
        # The error's own text may contain a URL with a password.
        status = http.client.responses.get(error.code, "")
        raise _Refusal(f"cannot be read (HTTP status {error.code} {status})".replace(" )", ")")) from error
    except http.client.InvalidURL as error:
        raise _Refusal("cannot be read (not a URL: spaces, control characters or a wrong port)") from error
    except TimeoutError as error:
        raise _Refusal(f"cannot be read (not downloaded within {_URL_SECONDS:g} seconds)") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        text = _line(getattr(reason, "strerror", None) or reason)
        if isinstance(reason, TimeoutError):
            text = f"no answer within {_ANSWER_SECONDS:g} seconds"
        raise _Refusal(f"cannot be read ({text})") from error
    except Exception as error:
        raise _Refusal(f"cannot be read (not a URL: {type(error).__name__})") from error
    if len(data) > limit or expected > limit:
        raise _Refusal(f"the file has more than {limit:,} bytes, expected a smaller image")
    if len(data) < expected:
        raise _Refusal(f"cannot be read (it ends after {len(data):,} of {expected:,} bytes)")
    return data


# --- image files -----------------------------------------------------------------------------------------------------


def _from_bytes(view, name: str, max_pixels: int) -> Image.Image:
    data = bytes(view)
    if not data:
        raise _Refusal("the file is empty, expected an image")
    if is_dicom(data, name):
        kind = _kind(data)
        if data[128:132] != b"DICM" and kind:
            raise _Refusal(f"a {kind} file with the name of a DICOM file: rename it")
        return _from_dicom(_dicom_dataset(data, max_pixels), name, max_pixels)
    try:
        return _decoded(_opened(data), data, max_pixels)
    except (ImportError, _Refusal):
        raise
    except UnidentifiedImageError as error:
        raise _Refusal(_unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise _Refusal(f"the image is too large, expected at most {max_pixels} pixels") from error
    except MemoryError as error:
        raise _Refusal("the image does not fit into memory") from error
    except Exception as error:
        raise _Refusal(f"the image is damaged ({_line(error)})") from error


def _from_pillow(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    file = getattr(image, "fp", None)
    if getattr(image, "tile", None) and file is not None and image.tell() == 0:
        # Not decoded yet: Pillow would decode less than some files hold.
        _check_image_size(image, max_pixels)
        place = file.tell()
        file.seek(0)
        data = file.read(_most_bytes(max_pixels) + 1)
        file.seek(place)
        return _from_bytes(data[: _most_bytes(max_pixels)], "", max_pixels)
    try:
        return _decoded(image, None, max_pixels)
    except (ImportError, _Refusal):
        raise
    except Exception as error:
        raise _Refusal(f"the image is damaged ({_line(error)})") from error


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_formats())


def _kind(data: bytes) -> str | None:
    """The format of a file by its first bytes."""
    return next((name for name, first in _SIGNATURES.items() if re.match(first, data[:64], re.DOTALL)), None)


def _unidentified(data: bytes) -> str:
    """The reason why Pillow does not recognise a file as an image."""
    kind = _kind(data)
    frame = _frame_header(data) if kind == "JPEG" else None
    if frame is not None and frame.bits != 8:
        return f"a JPEG of {frame.bits} bits, expected 8 bits: convert it to PNG"
    readable = {"PNG", "JPEG", "TIFF", "WebP", "BMP", "GIF", "PPM", "JPEG 2000", "AVIF", "QOI"}
    if kind in readable:
        return f"the image is damaged, or {kind} of a kind that the installed Pillow does not read; {_EXPECTED}"
    return f"{'not an image' if kind is None else f'not an image but {kind}'}, {_EXPECTED}"


def _check_image_size(image: Image.Image, max_pixels: int) -> None:
    _check_size(image.width, image.height, max_pixels)
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(322, 0), tags.get(323, 0)]  # of a TIFF in tiles, which are decoded whole
    if all(isinstance(side, int) for side in tile) and tile[0] * tile[1] > max_pixels:
        raise _Refusal(f"tiles of {tile[0]}x{tile[1]} pixels, expected at most {max_pixels} in total")


def _decoded(image: Image.Image, data: bytes | None, max_pixels: int) -> Image.Image:
    """The picture of an image; `data` are the bytes of its file, None if it is decoded already."""
    _check_image_size(image, max_pixels)
    if image.format == "TIFF":
        return _from_tiff(image, data)
    if data is not None:
        if _is_deep_png(data):
            return _from_deep_png(data)
        bits = _colour_bits(image, data)
        if bits > 8:
            raise _Refusal(f"{bits}-bit colour {image.format}, expected 8 bits a channel, or 16-bit PNG or TIFF")
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image)
        key = image.info.get("transparency")
        return _scaled(array, None if not isinstance(key, int) else (array != key).astype(np.float32))
    return _opaque(image)


def _upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned by its EXIF orientation."""
    image.load()
    # Without orientation the other function would copy it.
    return image if image.getexif().get(274, 1) == 1 else ImageOps.exif_transpose(image)


def _opaque(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def _colour_bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of a colour image, in the formats for which Pillow keeps only the upper 8."""
    if image.format == "PPM" and image.mode == "RGB":
        # The second argument of the decoder is the largest value.
        arguments = image.tile[0][3]
        return arguments[1].bit_length() if isinstance(arguments, tuple) and isinstance(arguments[1], int) else 8
    if image.format == "JPEG2000" and len(image.getbands()) > 1:
        frame = _frame_header(data)
        return frame.bits if frame is not None else 8
    if image.format == "AVIF":
        place = data.find(b"av1C", 0, 2**16)
        deep = 0 <= place < len(data) - 6 and data[place + 6] & 0x40
        return 12 if deep and data[place + 6] & 0x20 else 10 if deep else 8
    return 8


def _is_deep_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits a channel and more than one channel."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24] == 16 and data[25] in (2, 4, 6)


def _from_deep_png(data: bytes) -> Image.Image:
    if data[25] == 4:
        # Gray and alpha of 16 bits each are laid out as 4 channels of 8 bits.
        header = data[12:24] + b"\x08\x06" + data[26:29]
        image = _opened(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
        array = np.ascontiguousarray(np.asarray(_upright(image))).view(">u2")
    else:
        array = _both_bytes(data)
    colour, alpha = array[..., : 1 if data[25] == 4 else 3], None
    key = _opened(data).info.get("transparency")
    if data[25] in (4, 6):
        alpha = array[..., -1] / np.float32(2**16 - 1)
    elif isinstance(key, tuple):
        alpha = (array != np.array(key)).any(axis=-1).astype(np.float32)
    return _scaled(colour[..., 0] if data[25] == 4 else colour, alpha)


def _both_bytes(data: bytes) -> np.ndarray:
    """The values (H, W, C) of an image with 16 bits per channel, which Pillow decodes one byte at a time."""
    halves = {}
    for order in "BL":
        image = _opened(data)
        arguments = image.tile[0][3]
        raw_mode = arguments if isinstance(arguments, str) else arguments[0]
        channels, _, own = raw_mode.partition(";16")
        other = f"{channels.replace('a', 'A')};16{order}"
        image.tile = [
            _with_arguments(tile, other if isinstance(tile[3], str) else (other, *tile[3][1:])) for tile in image.tile
        ]
        halves[order] = np.asarray(_upright(image))
    big_endian = own == "B" or (own == "N" and sys.byteorder == "big")
    high, low = (halves["B"], halves["L"]) if big_endian else (halves["L"], halves["B"])
    return high.astype(np.uint16) << 8 | low


def _with_arguments(tile: tuple, arguments: str | tuple) -> tuple:
    """A tile of an image file with other arguments for its decoder."""
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _tiff_depth(image: Image.Image) -> tuple[str, int]:
    """The kind of numbers in a TIFF, and their bits."""
    formats, bits = image.tag_v2.get(339, (1,)), image.tag_v2.get(258, (1,))
    formats, bits = (value if isinstance(value, tuple) else (value,) for value in (formats, bits))
    return {1: "unsigned", 2: "signed", 3: "float"}.get(max(formats), "unknown"), 8 if max(bits) <= 8 else max(bits)


def _from_tiff(image: Image.Image, data: bytes | None) -> Image.Image:
    numbers, bits = _tiff_depth(image)
    if numbers == "unknown":
        raise _Refusal("a TIFF of complex or undefined numbers, expected integers or floats")
    white_is_zero = image.tag_v2.get(262) == 0
    if len(image.getbands()) > 1 and bits > 8:
        premultiplied = 1 in image.tag_v2.get(338, ())
        if data is None:
            raise _Refusal(f"{bits}-bit colour that Pillow has reduced to 8 bits, expected the file")
        if bits != 16 or image.mode not in ("RGB", "RGBA") or image.tag_v2.get(284, 1) != 1:
            raise _Refusal(f"a TIFF of {bits}-bit {image.mode}, expected gray, or RGB in one plane")
        array = _both_bytes(data)
        alpha = array[..., 3] / np.float32(2**16 - 1) if array.shape[-1] == 4 and not premultiplied else None
        return _scaled(array[..., :3], alpha)
    if data is not None and image.tile and image.tile[0][0] == "libtiff":
        # libtiff returns the machine's own byte order, which Pillow corrects only for unsigned 16 bits.
        native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"} if sys.byteorder == "little" else {}
        raw_mode, *arguments = image.tile[0][3]
        image.tile = [_with_arguments(image.tile[0], (native.get(raw_mode, raw_mode), *arguments))]
    image = _upright(image)
    if bits == 8 and numbers == "unsigned":
        return _opaque(image)
    array = np.asarray(image)
    if (numbers, bits) == ("unsigned", 32):
        array = array.view(np.uint32)  # Pillow has signed integers only
    elif (numbers, bits) == ("signed", 8):
        array = array.view(np.int8)
    picture = _scaled(array)
    return ImageOps.invert(picture) if white_is_zero else picture


# --- arrays ----------------------------------------------------------------------------------------------------------


def _from_array(array, name: str, max_pixels: int) -> Image.Image:
    if not isinstance(array, np.ndarray):
        array = array.detach().cpu()
        array = (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or array.size == 0:
        raise _Refusal(f"shape {array.shape}, expected (height, width) or (height, width, 1, 3 or 4)")
    _check_size(array.shape[1], array.shape[0], max_pixels)
    if array.dtype.kind not in "buif":
        raise _Refusal(f"values of type {array.dtype}, expected numbers")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return _opaque(Image.fromarray(np.ascontiguousarray(array)))
    if array.ndim == 2 or array.shape[-1] == 3:
        return _scaled(array)
    _check_finite(array)
    # The alpha value of an opaque pixel: the maximum of uint16, or the smallest of these values that fits all alphas.
    fulls = [2**16 - 1] if array.dtype == np.uint16 else [1, 2**8 - 1, 2**16 - 1, array[..., 3].max()]
    full = next(full for full in fulls if array[..., 3].max() <= full)
    return _scaled(array[..., :3], np.clip(array[..., 3] / full, 0, 1))


def _check_finite(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _Refusal("the array holds NaN or infinite values, expected finite numbers")


def _scaled(array: np.ndarray, alpha: np.ndarray | None = None) -> Image.Image:
    """An array (H, W) or (H, W, 3), scaled from 0 to 1 or else from its range where alpha > 0, blended with black."""
    _check_finite(array)
    low, high = array.min(), array.max()
    if alpha is not None and (alpha > 0).any():
        shown = (alpha > 0).reshape(alpha.shape + (1,) * (array.ndim - 2))
        low, high = array.min(where=shown, initial=high), array.max(where=shown, initial=low)
    low, high = low.item(), high.item()
    low, high = (0, 1) if low >= 0 and high <= 1 else (low, high)
    if not np.isfinite(float(high) - float(low)):
        raise _Refusal(f"values from {low:g} to {high:g}, expected a range that a double holds")

    def shades(values: np.ndarray) -> np.ndarray:
        picture = np.empty(values.shape, np.uint8)
        for rows in _blocks(values):
            scaled = (values[rows].astype(np.float64) - low) * (255 / max(high - low, 1e-12))
            picture[rows] = scaled.clip(0, 255).round()
        return picture

    picture = _by_value(array, shades)
    for rows in _blocks(picture):
        if alpha is None:
            break
        opacity = alpha[rows].reshape(alpha[rows].shape + (1,) * (array.ndim - 2))
        picture[rows] = (picture[rows] * opacity).round()
    return Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")


def _blocks(array: np.ndarray) -> list[slice]:
    """Slices of 256 rows, so that no float copy of a whole large array is needed."""
    return [slice(row, row + 256) for row in range(0, len(array), 256)]


def _by_value(array: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of an array's values, as uint8; integers in a narrow range are mapped once each."""
    if array.dtype.kind not in "iu":
        return function(array)
    low, high = int(array.min()), int(array.max())
    if high - low >= 2**16:
        return function(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # Unsigned, because differences of signed numbers can overflow.
    places = (array - array.dtype.type(low)).view(f"u{array.itemsize}").astype(np.uint16)
    held = np.zeros(high - low + 1, bool)
    held[places] = True
    table = np.zeros(held.shape, np.uint8)
    table[held] = function(np.flatnonzero(held) + low)
    return table[places]


# --- DICOM -----------------------------------------------------------------------------------------------------------


def _pydicom():
    if find_spec("pydicom") is None:
        raise ImportError("reading DICOM needs pydicom: pip install pydicom")
    return import_module("pydicom"), import_module("pydicom.pixels")


def _dicom_dataset(data: bytes, max_pixels: int):
    pydicom, _ = _pydicom()
    try:
        _check_dicom_size(data, _most_bytes(max_pixels))
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # a file from before Part 10, without a preamble
            implicit, little_endian = dataset.original_encoding
            explicit = pydicom.uid.ExplicitVRLittleEndian if little_endian else pydicom.uid.ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
        return dataset
    except _Refusal:
        raise
    except Exception as error:  # pydicom raises errors of any type for a damaged file
        raise _Refusal(f"not a DICOM file that can be read ({_line(error)})") from error


def _check_dicom_size(data: bytes, limit: int) -> None:
    """Refuse a deflated file that inflates to too many bytes, and a file with too many items."""
    items, tail = 0, b""
    for block in _dicom_blocks(data, limit):
        block = tail + block
        items += sum(block.count(tag) for tag in (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"))
        tail = block[-3:]
    if items > _MOST_ITEMS:
        raise _Refusal(f"the DICOM file holds {items:,} items, expected at most {_MOST_ITEMS:,}")


def _dicom_blocks(data: bytes, limit: int):
    """The content of a DICOM file in blocks, inflated if its transfer syntax is Deflated Explicit VR Little Endian."""
    start = place = 132 if data[128:132] == b"DICM" else 0
    while data[place : place + 2] == b"\x02\x00" and place + 12 <= len(data):  # the file's meta information
        long = data[place + 4 : place + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR")
        length = struct.unpack_from("<I", data, place + 8) if long else struct.unpack_from("<H", data, place + 6)
        place += (12 if long else 8) + length[0]
    if b"1.2.840.10008.1.2.1.99" not in data[start:place]:
        yield data
        return
    inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    rest = data[place:]
    while rest and not inflate.eof:
        block = inflate.decompress(rest, 2**22)
        rest = inflate.unconsumed_tail
        total += len(block)
        if total > limit:
            raise _Refusal(f"the deflated DICOM file inflates to more than {limit:,} bytes, expected fewer")
        yield block


def _from_dicom(dataset, name: str, max_pixels: int) -> Image.Image:
    _, pixels = _pydicom()
    if "PixelData" not in dataset:
        raise _Refusal("the DICOM file has no pixels, expected a radiograph")
    _check_size(_whole(dataset, "Columns", 0), _whole(dataset, "Rows", 0), max_pixels)
    frames = _whole(dataset, "NumberOfFrames", 1)
    if frames != 1:
        raise _Refusal(f"{frames} frames, expected one radiograph")
    array = _dicom_values(dataset, pixels, max_pixels)
    try:
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            array = pixels.apply_color_lut(array, dataset)
        if array.ndim == 2:
            return Image.fromarray(_dicom_shades(array, dataset)).convert("RGB")
    except _Refusal:
        raise
    except Exception as error:
        raise _Refusal(f"the DICOM file's pixels cannot be decoded ({_line(error)})") from error
    return _from_array(array, name, max_pixels)


def _whole(dataset, keyword: str, default: int) -> int:
    """The value of an element that must be one whole number."""
    try:
        value = dataset.get(keyword)
        return default if value is None or value == "" else int(value)
    except Exception as error:
        value = dataset.get_item(keyword).value
        shown = value.decode("ascii", "replace").strip() if isinstance(value, bytes) else value
        raise _Refusal(f"{keyword} is {_line(repr(shown))}, expected one whole number") from error


def _dicom_values(dataset, pixels, max_pixels: int) -> np.ndarray:
    """The stored values, (H, W) or (H, W, 3)."""
    codec, frame = "", None
    try:
        syntax = dataset.file_meta.TransferSyntaxUID
        codec = syntax.name
        if not pixels.get_decoder(syntax).is_available:
            raise _Refusal(f"{codec} needs a decoder: {_DECODERS}")
        if syntax.is_encapsulated:
            coded = import_module("pydicom.encaps").get_frame(dataset.PixelData, 0, number_of_frames=1)
            frame = _frame_header(coded)
        if frame is not None:
            _check_size(frame.width, frame.height, max_pixels)
        allocated, stored = _whole(dataset, "BitsAllocated", 16), _whole(dataset, "BitsStored", 16)
        high = _whole(dataset, "HighBit", stored - 1)
        unused = high + 1 - stored
        if unused and (unused < 0 or high >= allocated or syntax.is_encapsulated):
            raise _Refusal(f"HighBit is {high} with {stored} of {allocated} bits stored, expected {stored - 1}")
        return pixels.pixel_array(dataset, bits_stored=stored + unused) >> unused if unused else dataset.pixel_array
    except _Refusal:
        raise
    except Exception as error:  # decoders raise errors of any type
        text = _line(error)
        if codec and dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            bits = f" of {frame.bits} bits" if frame is not None else ""
            text = f"{codec}{bits}: {text}; expected a decoder that reads it: {_DECODERS}"
        raise _Refusal(f"the DICOM file's pixels cannot be decoded ({text})") from error


def _dicom_shades(array: np.ndarray, dataset) -> np.ndarray:
    """Stored values (H, W) as shades from 0, black, to 255 (DICOM PS3.3 C.11.1, C.11.2).

    `pydicom.pixels.apply_voi_lut` is not used: its lookup overflows for 8-bit tables, its windows are inverted for a
    negative slope, and it does not return the range in which its output is to be shown.
    """

    def first(element):  # the first of several windows; None for an empty element
        value = dataset.get(element)
        value = value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else value
        return None if value is None or value == "" or isinstance(value, Sequence) else float(value)

    limits = [first("PixelPaddingValue"), first("PixelPaddingRangeLimit")]
    limits = [_as_stored(limit, dataset) for limit in limits if limit is not None] if limits[0] is not None else []
    slope, intercept, center, width = map(first, ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"))

    def shades(stored: np.ndarray) -> np.ndarray:
        padding = (stored >= min(limits)) & (stored <= max(limits)) if limits else np.zeros(stored.shape, bool)
        shown = slice(None) if padding.all() else ~padding
        values = stored.astype(np.float64)
        if dataset.get("ModalityLUTSequence"):
            values, _ = _dicom_lookup(values, dataset.ModalityLUTSequence[0], dataset)
        elif slope is not None and intercept is not None:
            values = values * slope + intercept
        windowed = None
        if dataset.get("VOILUTSequence"):
            windowed, table = _dicom_lookup(values, dataset.VOILUTSequence[0], dataset)
            windowed = _between(windowed, table.min(), table.max())
        elif center is not None and width is not None:
            windowed = _dicom_window(values, center, width, str(dataset.get("VOILUTFunction") or "LINEAR").upper())
        if windowed is None or _one_shade(windowed[shown]):  # no window, or all values are outside of it
            windowed = _between(values, values[shown].min(), values[shown].max())
        if _one_shade(windowed[shown]):
            raise _Refusal(_ONE_SHADE)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            windowed = 1.0 - windowed
        windowed[padding] = 0
        return (windowed * 255).round().astype(np.uint8)

    return _by_value(array, shades)


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from 0 at the lower limit to 1 at the higher one."""
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def _one_shade(values: np.ndarray) -> bool:
    """Whether values from 0 to 1 are one of 256 shades."""
    return round(values.min() * 255) == round(values.max() * 255)


def _as_stored(limit: float, dataset) -> float:
    """A padding value as pixels store it, also if one of the two types is signed and the other is not."""
    bits = _whole(dataset, "BitsStored", 16)
    if _whole(dataset, "PixelRepresentation", 0):
        half = 2 ** (bits - 1)
        return (limit + half) % 2**bits - half if limit >= half else limit
    return limit % 2**bits if limit < 0 else limit


def _dicom_lookup(values: np.ndarray, item, dataset) -> tuple[np.ndarray, np.ndarray]:
    """Values looked up in a modality or VOI table, clipped to its ends, and the table."""
    entries, start, _ = (int(number) for number in item.LUTDescriptor)
    entries, data = entries or 2**16, item.LUTData
    if isinstance(data, bytes):  # 8-bit entries may be packed, or have 16 bits each
        wide = "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
        data = np.frombuffer(data, wide if len(data) >= 2 * entries else np.uint8)
    table = np.asarray(data, np.float64)[:entries]
    return table[np.clip(np.rint(values - start), 0, len(table) - 1).astype(np.intp)], table


def _dicom_window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values mapped by a window to 0 to 1."""
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise ValueError(f"its window is {width:g} wide, expected {'at least 1' if width > 0 else 'more than 0'}")
    if function == "LINEAR":
        return np.clip((values - (center - 0.5)) / max(width - 1, 1e-12) + 0.5, 0, 1)
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -60, 60)))
    raise ValueError(f"its VOI LUT function is {function}, expected LINEAR, LINEAR_EXACT or SIGMOID")


# --- JPEG and JPEG 2000 ----------------------------------------------------------------------------------------------


class _Frame(NamedTuple):
    """Size and bits per channel, from the header of a compressed image."""

    width: int
    height: int
    bits: int


def _frame_header(data: bytes) -> _Frame | None:
    """The frame of a JPEG, JPEG-LS or JPEG 2000 image; None if there is none."""
    place = data.find(b"\xff\x4f\xff\x51", 0, 2**20)
    try:
        if place >= 0:
            right, bottom, left, top = struct.unpack_from(">IIII", data, place + 8)
            channels = struct.unpack_from(">H", data, place + 40)[0]
            depths = data[place + 42 : place + 42 + 3 * channels : 3]
            return _Frame(right - left, bottom - top, max((depth & 0x7F) + 1 for depth in depths))
        place = data.find(b"\xff\xd8") + 2
        while place >= 2 and data[place] == 0xFF:
            marker = data[place + 1]
            if marker in _FRAME_MARKERS:
                bits, height, width = struct.unpack_from(">BHH", data, place + 4)
                return _Frame(width, height, bits)
            place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, place + 2)[0]
    except (IndexError, ValueError, struct.error):
        pass
    return None


__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "MINIMUM_SIDE",
    "is_data_url",
    "is_dicom",
    "read_file",
    "read_view",
    "reads_alike",
    "shown_name",
    "without_credentials",
]
