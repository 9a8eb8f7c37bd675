"""Unpack the images of a tar archive that is published in parts; the parts are read as one stream, never joined."""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from PIL import Image
from tqdm.auto import tqdm

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_NUMBER = re.compile(r"\.part([0-9]+)")
#: Bytes that are read at once. A fault is noticed up to a few of these blocks after its place.
_BLOCK = 2**18
#: Larger members are no images.
_MOST_BYTES = 2**28


class Unpacked(NamedTuple):
    """What was done with the wanted images of an archive.

    Args:
        written: number of images that were written.
        damaged: names of images that are damaged in the archive; they are not written.
    """

    written: int
    damaged: list[str]


def find_parts(folder: Path, name: str) -> list[Path]:
    """The files `NAME.part00`, `NAME.part01` … of a folder, in the order of their numbers; empty if there are none."""
    parts = [path for path in folder.glob(f"{name}.part*") if _NUMBER.fullmatch(path.suffix) and path.is_file()]
    return sorted(parts, key=_number)


def unpack_images(parts: list[Path], wanted: Collection[str], top: str, folder: Path) -> Unpacked:
    """Write the wanted PNG images of an archive to a folder; images that are there with their size are kept.

    Each image is checked against its checksums and written under another name first, so that an interruption leaves
    whole images only, and the next call continues.

    Args:
        parts: the files of [`find_parts`]: one tar archive, compressed by zstd, gzip, bzip2, xz or not at all.
        wanted: names of the images, relative to the folder `top` of the archive. Other members are ignored.
        top: folder of the archive.
        folder: where the images are written, each under its name in `wanted`.

    Raises:
        ValueError: a part is missing, empty, damaged or half downloaded; one line that names it. The images before it
            are kept.
        OSError: an image cannot be written.
    """
    _check_numbers(parts)

    def is_needed(name: str, size: int) -> bool:
        if name not in wanted:
            return False
        path = folder / name
        return not path.is_file() or path.stat().st_size != size

    written, damaged = 0, []
    sizes = sum(part.stat().st_size for part in parts)
    with tqdm(total=sizes, unit="B", unit_scale=True, desc=f"unpacking {top}", disable=None) as bar:
        for name, data in _members(parts, top, is_needed, bar.update):
            if _is_whole(data):
                _write(folder / name, data)
                written += 1
            else:
                damaged.append(name)
    return Unpacked(written, damaged)


def _number(part: Path) -> int:
    return int(part.suffix.removeprefix(".part"))


def _check_numbers(parts: list[Path]) -> None:
    for number, part in enumerate(parts):
        if _number(part) != number:
            digits = len(part.suffix) - len(".part")
            missing = part.with_suffix(f".part{number:0{digits}}")
            raise ValueError(f"{missing} is missing, and {part.name} exists: download it")
        if part.stat().st_size == 0:
            raise ValueError(f"{part} is empty: download it again")


class _Parts(io.RawIOBase):
    """Consecutive files as one stream. `progress` is called with the number of bytes of each read."""

    def __init__(self, paths: list[Path], progress: Callable[[int], object]):
        self._paths = paths
        self._progress = progress
        self._place = 0
        self._read_here = 0
        self._file: io.FileIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while self._place < len(self._paths):
            if self._file is None:
                self._file, self._read_here = io.FileIO(self._paths[self._place]), 0
            count = self._file.readinto(buffer)
            if count:
                self._read_here += count
                self._progress(count)
                return count
            self._file.close()
            self._file, self._place = None, self._place + 1
        return 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def fault(self, error: Exception) -> str:
        """One line that names the part that an error of the stream comes from."""
        sizes = [path.stat().st_size for path in self._paths]
        # All parts but the last have the size at which the archive was split.
        for path, size in zip(self._paths[: min(self._place + 1, len(sizes) - 1)], sizes, strict=False):
            if size < max(sizes):
                longest = self._paths[sizes.index(max(sizes))].name
                return (
                    f"{path} has {size:,} bytes and {longest} {max(sizes):,}: it is half downloaded, download it again"
                )
        if self._place == len(self._paths):
            last = self._paths[-1]
            return f"{last} ends before the archive: it is half downloaded, or the part after it is missing ({error})"
        names = str(self._paths[self._place])
        if self._place and self._read_here < 8 * _BLOCK:
            names += f", or {self._paths[self._place - 1].name} before it,"
        return f"{names} is damaged ({error}): download it again"


def _members(
    parts: list[Path], top: str, is_needed: Callable[[str, int], bool], progress: Callable[[int], object]
) -> Iterator[tuple[str, bytes]]:
    """Name, relative to `top`, and content of the files of an archive that are needed by name and size."""
    with _Parts(parts, progress) as joined:
        try:
            with _open_tar(joined) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # which would grow by the header of each member
                    name = member.name.removeprefix("./").removeprefix(f"{top}/")
                    if member.isreg() and member.size <= _MOST_BYTES and is_needed(name, member.size):
                        yield name, archive.extractfile(member).read()
        except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{joined.fault(error)}; what was unpacked before is kept") from None


def _open_tar(joined: _Parts) -> tarfile.TarFile:
    """The archive, in a mode that never seeks; `tarfile` itself knows zstd from Python 3.14 on."""
    stream = io.BufferedReader(joined, _BLOCK)
    if stream.peek(4)[:4] != _ZSTD_MAGIC:
        return tarfile.open(fileobj=stream, mode="r|*", bufsize=_BLOCK)
    unpacked = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
    return tarfile.open(fileobj=unpacked, mode="r|", bufsize=_BLOCK)


def _is_whole(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()
    except Exception:  # Pillow raises any exception for a damaged file
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
