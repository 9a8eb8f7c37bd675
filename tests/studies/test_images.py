"""The picture that a dataset keeps is the one that `generate` sees, of files of every format, mode, depth and turn."""

import io
import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from otdrg.image_processing_otdrg import read_view
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.studies.images import referenced_image, stored_image
from otdrg.studies.source import SkipStudy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# --- files, written without Pillow where it cannot write them --------------------------------------------------------


def png(array, gray, orientation=1, key=None):
    """A PNG of values (H, W) or (H, W, C) of 8 or 16 bits, with every kind of filter; LA if `gray`, else RGB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    array = array if array.ndim == 3 else array[..., None]
    channels, bits = array.shape[2], 8 * array.itemsize
    kind = (0 if channels < 3 else 2) + (4 if channels in (2, 4) else 0)
    assert gray == (channels < 3)
    rows = array.astype(">u2" if bits == 16 else "u1").tobytes()
    stride = len(rows) // array.shape[0]
    left, lines = channels * bits // 8, []
    for place in range(array.shape[0]):
        row = np.frombuffer(rows[place * stride : (place + 1) * stride], np.uint8)
        above = np.frombuffer(rows[(place - 1) * stride : place * stride], np.uint8) if place else np.zeros_like(row)
        before = np.concatenate([np.zeros(left, np.uint8), row[:-left]])
        filtered = [row, row - before, row - above][place % 3]
        lines.append(bytes([place % 3]) + filtered.tobytes())
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, kind, 0, 0, 0)
    key = b"" if key is None else chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">H", orientation) + bytes(6)
    parts = [chunk(b"IHDR", header), key, chunk(b"eXIf", exif), chunk(b"tEXt", b"Patient\0Musterfrau^Erika")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [*parts, chunk(b"IDAT", zlib.compress(b"".join(lines))), chunk(b"IEND", b"")]
    )


def tiff(array, photometric, order="<", deflate=False, orientation=1, alpha=None):
    """A TIFF of values (H, W) or (H, W, C) of any numbers, in two strips."""
    array = array if array.ndim == 3 else array[..., None]
    height, width, channels = array.shape
    form = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    half = height // 2
    strips = [strip.astype(array.dtype.newbyteorder(order)).tobytes() for strip in (array[:half], array[half:])]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    name = b"Musterfrau^Erika\0"
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [8 * array.itemsize] * channels)]
    tags += [(259, 3, [8 if deflate else 1]), (262, 3, [photometric]), (270, 2, name)]
    offset = 8
    tags += [(273, 4, [offset, offset + len(strips[0])]), (274, 3, [orientation]), (277, 3, [channels])]
    tags += [(278, 4, [half]), (279, 4, [len(strip) for strip in strips]), (284, 3, [1])]
    tags += [(338, 3, [alpha])] if alpha is not None else []
    tags += [(339, 3, [form] * channels)]
    assert height == 2 * half
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    start = offset + len(body)
    values_at = start + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, kind, content in tags:
        data = content if kind == 2 else struct.pack(f"{order}{len(content)}{'H' if kind == 3 else 'I'}", *content)
        entries += struct.pack(f"{order}HHI", tag, kind, len(content))
        if len(data) <= 4:
            entries += data.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", values_at + len(values))
            values += data + bytes(len(data) % 2)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return magic + struct.pack(f"{order}I", start) + body + directory


def pillow(array, mode, kind, orientation=1, **options):
    """A file that Pillow writes, with EXIF in which a name stands."""
    file, image, exif = io.BytesIO(), Image.fromarray(array).convert(mode), Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "Musterfrau^Erika"
    image.save(file, kind, exif=exif, **options)
    return file.getvalue()


# --- what they look like ---------------------------------------------------------------------------------------------


def turned(array, orientation):
    """An array (H, W, ...) as EXIF has it shown."""
    turns = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(orientation, 0)
    array = np.rot90(array, turns)
    return array[:, ::-1] if orientation in (2, 4, 5, 7) else array


def scaled(array):
    array = array.astype(np.float64)
    low, high = array.min(), array.max()
    return (array - low) * 255 / (high - low)


def rgb(gray):
    return np.stack([gray] * 3, axis=-1) if gray.ndim == 2 else gray


@dataclass
class File:
    """A file and the picture (H, W, 3) that is right, with how far from it a shade may be."""

    name: str
    data: bytes
    picture: np.ndarray
    tolerance: float = 0.51


TIFFS = ("<r", "<d", ">r", ">d")  # little and big endian, raw and deflated
KINDS = [
    *(f"png{bits} {mode}" for bits in (8, 16) for mode in ("L", "LA", "RGB", "RGBA", "L key", "RGB key")),
    *(f"tiff{numbers} {how}" for numbers in ("u1", "u2", "i2", "u4", "i4", "f4", "i1") for how in TIFFS),
    *(f"tiff{bits} {mode} {how}" for bits in (8, 16) for mode in ("RGB", "RGBA", "RGBa") for how in TIFFS),
    *(f"white {numbers} {how}" for numbers in ("u1", "u2", "f4") for how in TIFFS),
    *("JPEG L", "JPEG RGB", "JPEG CMYK", "MPO RGB", "WEBP RGB", "TIFF CMYK", "TIFF LAB", "PNG P", "PNG 1", "GIF P"),
]  # fmt: skip

#: TIFF that the installed Pillow cannot distinguish from others: an error is right, a wrong picture is not.
REFUSED = {"tiffu4 >r", "tiffu4 >d", "white u2 >r", "white u2 >d"}


def make(kind, seed, orientation):
    """A file of a kind, of noise over a slope that does not fill the range of its numbers."""
    random = np.random.default_rng(seed)
    size = (int(random.integers(9, 20)) * 2, int(random.integers(17, 40)))
    shades = np.linspace(0, 1, size[0] * size[1]).reshape(size) * 0.7 + random.random(size) * 0.3
    colours = np.stack([shades, shades[::-1], 1 - shades], axis=-1)
    name, mode, *rest = kind.split()
    if name in ("png8", "png16", "tiff8", "tiff16"):
        deep = name.endswith("16")
        dtype, base, span, full = (np.uint16, 300, 3700, 65535) if deep else (np.uint8, 20, 200, 255)
        gray = mode.startswith("L")
        values = (base + (shades if gray else colours) * span).astype(dtype)
        alpha = np.full(size, full, dtype)
        alpha[: size[0] // 3] = 0
        shown, key = alpha > 0, None
        if rest == ["key"]:
            values[: size[0] // 3] = 17
            key, shown = (17,) * (1 if gray else 3), (values != 17) if gray else (values != 17).any(axis=-1)
        elif mode not in ("LA", "RGBA", "RGBa"):
            shown = np.ones(size, bool)
        if mode == "RGBa":
            values[~shown] = 0
        stored = np.dstack([values, alpha]) if mode in ("LA", "RGBA", "RGBa") else values
        low, high = (values[shown] if mode != "RGBa" else values).min(), values[shown].max()
        picture = (values.astype(float) - low) * 255 / (high - low) if deep else values.astype(float)
        picture = rgb(picture).clip(0, 255) * shown[..., None]
        if name.startswith("png"):
            data = png(stored, gray, orientation, key)
        else:
            extra = {"RGBA": 2, "RGBa": 1}.get(mode)
            data = tiff(stored, 2, rest[0][0], rest[0][1] == "d", orientation, extra)
        return File(kind, data, turned(picture, orientation))
    if kind.startswith(("tiff", "white")):
        dtype = np.dtype(name[4:] if kind.startswith("tiff") else mode)
        how = mode if kind.startswith("tiff") else rest[0]
        low, high = {"u1": (3, 250), "i1": (-100, 90), "u2": (500, 4000), "i2": (-1024, 3071)}.get(
            dtype.str[1:], (2**31 - 9000, 2**31 + 90000) if dtype.kind == "u" else (-70000, 409500)
        )
        values = (low + shades * (high - low)).astype(dtype)
        picture = values.astype(float) if dtype == np.uint8 else scaled(values)
        white = kind.startswith("white")
        picture = rgb(255 - picture if white else picture)
        return File(
            kind, tiff(values, 0 if white else 1, how[0], how[1] == "d", orientation), turned(picture, orientation)
        )
    array = (20 + colours * 200).astype(np.uint8)
    if mode == "LAB":
        file = io.BytesIO()
        lab = Image.merge("LAB", Image.fromarray(array).split())
        lab.save(file, "TIFF", tiffinfo={274: orientation, 270: "Musterfrau^Erika"})
        return File(kind, file.getvalue(), turned(np.asarray(lab.convert("RGB")), orientation))
    if mode == "CMYK" and name == "TIFF":
        inks = np.dstack([array, array[..., 0] // 2])
        black = 255 - inks[..., 3:].astype(float)
        data = tiff(inks, 5, orientation=orientation)
        return File(kind, data, turned(black * (1 - inks[..., :3] / 255), orientation), 1.5)
    data = pillow(
        array, mode, name, 1 if name == "GIF" else orientation, **({"lossless": True} if name == "WEBP" else {})
    )
    if name == "MPO":
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = orientation, "Musterfrau^Erika"
        pages = [Image.fromarray(array[::-1])]
        Image.fromarray(array).save(file, "MPO", save_all=True, append_images=pages, exif=exif)
        data = file.getvalue()
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # Pillow alone does not turn it
    return File(kind, data, turned(plain, 1 if name == "GIF" else orientation))


def check(file, folder):
    """The three sides of it: the file as `generate` reads it, as it is stored, and as it is referred to."""
    path = folder / f"{file.name.replace(' ', '_').replace('<', 'little').replace('>', 'big')}.img"
    path.write_bytes(file.data)
    if file.name in REFUSED:
        with pytest.raises(ValueError, match=r"^\S+: .*expected") as error:
            read_view(path)
        assert "\n" not in str(error.value)
        with pytest.raises(SkipStudy, match="unreadable image"):
            stored_image(str(path))
        return
    seen = np.asarray(read_view(path))
    assert seen.shape == file.picture.shape, file.name
    assert np.abs(seen - file.picture).max() <= file.tolerance, file.name
    stored = stored_image(str(path))
    assert b"Musterfrau" not in stored["bytes"], file.name
    np.testing.assert_array_equal(read_view(stored["bytes"]), seen, file.name)
    with Image.open(io.BytesIO(stored["bytes"])) as image:
        np.testing.assert_array_equal(image.convert("RGB"), seen, file.name)
        assert not image.getexif() and not image.info.keys() & {"exif", "xmp", "icc_profile", "comment", "Patient"}
    referenced = referenced_image(str(path))
    np.testing.assert_array_equal(read_view(ImageFeature().decode_example(referenced)), seen, file.name)
    np.testing.assert_array_equal(read_view(Image.open(path)), seen, file.name)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_view_of_every_kind_is_what_read_view_sees(kind, tmp_path):
    for seed, orientation in ((0, 1), (1, 6)):
        check(make(kind, seed, orientation), tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), orientation=st.integers(1, 8))
def test_stored_view_of_any_file_is_what_read_view_sees(kind, seed, orientation, tmp_path):
    check(make(kind, seed, orientation), tmp_path)


# --- whole builds ----------------------------------------------------------------------------------------------------

GRAY = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)


@pytest.fixture
def prepare(tmp_path):
    """Builds a dataset of files by their names; returns its rows by id, what was skipped by id, and its bytes."""

    def build(files, **options):
        lines = ["image,study_id,report,split"]
        for name, data in files.items():
            if data is not None:
                (tmp_path / name).write_bytes(data)
            lines.append(f"{name},{name},The heart is normal.,train")
        (tmp_path / "table.csv").write_text("\n".join(lines))
        output = tmp_path / "built"
        prepare_studies("csv", output, build=BuildOptions(**options), table=tmp_path / "table.csv")
        rows = {row["id"]: row for row in load_from_disk(output)["train"]}
        skipped = [json.loads(line) for line in (output / "skipped.jsonl").open(encoding="utf-8")]
        # Arrow files are not compressed: what they hold can be looked for in their bytes.
        written = b"".join(path.read_bytes() for path in output.rglob("*.arrow"))
        return rows, {fault["id"]: fault for fault in skipped}, written

    return build


def with_every_metadata(kind):
    """A file with a name in all that its format has for text."""
    secret, file = "Musterfrau^Erika", io.BytesIO()
    image = Image.fromarray(GRAY)
    exif = image.getexif()
    exif[0x010E] = secret
    options = {"exif": exif, "icc_profile": secret.encode(), "xmp": secret.encode(), "comment": secret}
    if kind == "PNG":
        text = PngInfo()
        text.add_text("Patient", secret)
        text.add_text("Packed", secret, zip=True)
        text.add_itxt("XML:com.adobe.xmp", secret)
        options = {"exif": exif, "icc_profile": secret.encode(), "pnginfo": text}
    image.save(file, kind, **options)
    data = file.getvalue()
    if kind == "JPEG":
        # A JFIF thumbnail and extension, a segment of another kind, and what lies behind the end.
        thumb = secret.encode().ljust(3 * 2 * 3, b" ")
        jfif = b"\xff\xe0" + struct.pack(">H", 16 + len(thumb)) + b"JFIF\0\1\1\0\0\1\0\1\2\3" + thumb
        other = b"".join(b"\xff%c\0\x12" % marker + secret.encode() for marker in (0xE0, 0xE5, 0xED, 0xFE))
        data = data[:2] + jfif + other + data[2:] + secret.encode()
    return data + secret.encode() if kind == "PNG" else data


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("options", [{}, {"shorter_side": 32}], ids=["whole", "scaled"])
def test_prepare_keeps_no_metadata(prepare, kind, options):
    data = with_every_metadata(kind)
    assert b"Musterfrau" in data
    rows, _, written = prepare({"a.img": data}, **options)
    assert len(rows) == 1 and b"Musterfrau" not in written
    if not options:
        np.testing.assert_array_equal(read_view(rows["a.img"]["images"][0]), read_view(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_prepare_keeps_the_pixel_data_of_plain_files(prepare, kind):
    file = io.BytesIO()
    Image.fromarray(GRAY).save(file, kind, **({"quality": 60} if kind == "JPEG" else {}))
    _, _, written = prepare({"a.img": file.getvalue()})
    assert file.getvalue() in written


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "MPO", "TIFF", "PNG"])
def test_prepare_scales_upright_images(prepare, kind):
    rows, _, _ = prepare({"a.img": pillow(GRAY, "L", kind, orientation=6)}, shorter_side=24)
    (image,) = rows["a.img"]["images"]
    assert image.size == (32, 24)
    expected = Image.fromarray(turned(GRAY, 6)).resize((32, 24), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(image.convert("L"), float) - np.asarray(expected)).max() < 12


def test_prepare_file_name_is_not_in_the_dataset(tmp_path):
    for name in ("Musterfrau.png", "Musterfrau.tiff", "Musterfrau_prior.jpg"):
        Image.fromarray(GRAY).save(tmp_path / name)
    table = tmp_path / "table.csv"
    cells = "Musterfrau_prior.jpg,Clear."
    table.write_text(
        "image,study_id,report,split,prior_image,prior_report\n"
        f"Musterfrau.png,s1,Clear.,train,{cells}\nMusterfrau.tiff,s2,Clear.,train,{cells}\n"
    )
    prepare_studies("csv", tmp_path / "built", table=table)
    for row in load_from_disk(tmp_path / "built")["train"]:
        assert [image.size for image in (*row["images"], *row["prior_images"])] == [(48, 64)] * 2
    files = [path for path in (tmp_path / "built").rglob("*") if path.suffix in (".parquet", ".arrow", ".md")]
    assert len(files) == 3 and not any(b"Musterfrau" in path.read_bytes() for path in files)


def test_prepare_unreadable_images_are_skipped_and_counted(prepare, tmp_path):
    whole = io.BytesIO()
    Image.fromarray(GRAY).save(whole, "PNG")
    large = png(np.zeros((1, 1), np.uint8), True)[:16] + struct.pack(">II", 9000, 9000)
    header = png(np.zeros((1, 1), np.uint8), True)[24:29]
    large += header + struct.pack(">I", zlib.crc32(large[12:] + header)) + whole.getvalue()[33:]
    (tmp_path / "folder.png").mkdir()
    files = {
        "good.png": whole.getvalue(),
        "tiny.png": png(GRAY[:8, :8], True),
        "large.png": large,
        "blank.png": png(np.full((32, 32), 9, np.uint8), True),
        "half.png": whole.getvalue()[: len(whole.getvalue()) // 2],
        "empty.png": b"",
        "gone.png": None,
        "folder.png": None,
        "note.dcm": whole.getvalue(),
    }
    rows, skipped, _ = prepare(files)
    assert list(rows) == ["good.png"] and set(skipped) == set(files) - {"good.png"}
    for name, fault in skipped.items():
        assert fault["kind"] == ("missing image" if name == "gone.png" else "unreadable image")
        assert name in fault["reason"] and "\n" not in fault["reason"]
    reasons = {"tiny": "8x8 pixels", "large": "9000x9000 pixels", "blank": "one shade", "note": "a PNG file"}
    for name, reason in reasons.items():
        assert any(reason in fault["reason"] for study, fault in skipped.items() if study.startswith(name))


def test_load_studies_refused_images_are_skipped_by_header(tmp_path, caplog):
    files = {"good.png": png(GRAY, True), "tiny.png": png(GRAY[:8, :8], True), "page.png": pillow(GRAY, "L", "EPS")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "table.csv").write_text("\n".join(["image,report,split", *(f"{name},Clear.,train" for name in files)]))
    assert load_studies("csv", table=tmp_path / "table.csv")["train"]["id"] == ["good"]
    assert "tiny.png: 8x8 pixels" in caplog.text and "PostScript" in caplog.text
