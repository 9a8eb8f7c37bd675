"""Remove metadata (EXIF, XMP, ICC profiles, comments, text, thumbnails) from JPEG and PNG files.

The compressed pixels are kept byte for byte.
"""

from __future__ import annotations

import re
import struct

#: JPEG markers of segments needed for decoding: frames, tables, scans and the height of the image.
_JPEG_NEEDED = {*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD} - {0xC8}
#: The marker after the coded data of a scan; stuffed zeros and restarts belong to the data.
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def without_metadata(data: bytes) -> bytes | None:
    """A JPEG or PNG file, or the first image of an MPO file, without anything that decoding does not need.

    None if the file has another format or is damaged.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
        if data[:8] == _PNG_START:
            return _png(data)
    except (IndexError, struct.error):
        pass
    return None


def _jpeg(data: bytes) -> bytes | None:
    kept, place = [data[:2]], 2
    while True:
        if data[place] != 0xFF:
            return None
        while data[place + 1] == 0xFF:  # a marker may be padded
            place += 1
        marker = data[place + 1]
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        end = place + 2 + struct.unpack_from(">H", data, place + 2)[0]
        segment = data[place + 4 : end]
        if end > len(data):
            return None
        if marker in _JPEG_NEEDED:
            kept.append(data[place:end])
        elif marker == 0xE0 and segment[:5] == b"JFIF\0" and len(segment) >= 12:
            kept.append(b"\xff\xe0\x00\x10" + segment[:12] + b"\0\0")  # an empty thumbnail
        elif marker == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12:
            kept.append(b"\xff\xee\x00\x0e" + segment[:12])  # specifies the colour transform
        if marker == 0xDA:
            found = _END_OF_SCAN.search(data, end)
            if found is None:
                return None
            kept.append(data[end : found.start()])
            end = found.start()
        place = end


def _png(data: bytes) -> bytes | None:
    kept, place = [_PNG_START], 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            return None
        if kind in _PNG_NEEDED:
            kept.append(data[place:end])
        if kind == b"IEND":
            return b"".join(kept)
        place = end
