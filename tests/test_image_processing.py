"""What is refused of the files, URLs and DICOM objects that people bring, and what odd ones look like."""

import base64
import http.server
import io
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from otdrg import image_processing_otdrg as image_processing
from otdrg.image_processing_otdrg import FORMATS, read_view, shown_name
from PIL import EpsImagePlugin, Image

GRAY = np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)


def encoded(kind, array=GRAY, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def refused(view, **options):
    """What is said of a view that cannot be read: one line that begins with its name."""
    with pytest.raises(ValueError) as error:
        read_view(view, **options)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    if isinstance(view, (str, os.PathLike)):
        assert str(error.value).startswith(f"{shown_name(os.fspath(view))}: ")
    return str(error.value)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_read_view_of_a_pipe_or_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "view.png")
    for path in (tmp_path / "view.png", "/dev/zero", "/dev/null"):
        assert "a pipe, socket or device), expected a file" in refused(path)


def test_read_view_of_a_file_larger_than_any_image_is_refused(tmp_path):
    with open(tmp_path / "view.png", "wb") as file:
        file.write(encoded("PNG"))
        file.truncate(2**40)  # a terabyte of nothing
    assert "the file has more than" in refused(tmp_path / "view.png")


def test_read_view_of_a_data_url_is_the_file_in_it(monkeypatch):
    def data_url(content, kind="image/png"):
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    for kind in ("PNG", "TIFF"):
        for name in (data_url(encoded(kind)), data_url(encoded(kind), "").replace("data:", "DATA:")):
            assert np.array_equal(np.asarray(read_view(name)), np.asarray(read_view(encoded(kind))))
    assert refused(data_url(b"a text")) == "data URL: " + refused(b"a text").removeprefix("image: ")
    for name in (data_url(encoded("PNG"))[:-3] + "!", "data:image/png,abc", "data:image/png;base64", "data:"):
        line = refused(name)
        assert line.startswith("data URL: ") and "expected data:image/png;base64,..." in line and len(line) < 150
    monkeypatch.setattr(image_processing, "_most_bytes", lambda _: 10)
    assert refused(data_url(encoded("PNG"))) == "data URL: the file has more than 10 bytes, expected a smaller image"


@pytest.mark.parametrize("name", ["view\0.png", "view\n.png", "view\x1b[31m.png", "\udcff.png", ""])
def test_read_view_of_an_odd_name_is_one_printable_line(tmp_path, name):
    assert "cannot be read" in refused(f"{tmp_path}/{name}" if name else name)


@pytest.mark.parametrize("name", ["view.eps", "view.png", "view.jpg", "view.dcm", "view"])
def test_read_view_of_postscript_never_starts_ghostscript(tmp_path, monkeypatch, name):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    path = tmp_path / name
    path.write_bytes(encoded("EPS"))
    assert "PostScript" in refused(path)
    with Image.open(path) as image:
        assert "PostScript" in refused(image)


def test_read_view_reads_no_other_format_than_listed(tmp_path):
    Image.init()
    others = [kind for kind in ("PCX", "TGA", "ICNS", "SGI", "IM", "SPIDER", "PDF") if kind in Image.SAVE]
    assert not set(others) & set(FORMATS)
    for kind in others:
        array = GRAY.astype(np.float32) if kind == "SPIDER" else np.resize(GRAY, (64, 64))
        assert "not an image" in refused(encoded(kind, array))


def test_read_view_of_a_png_called_dicom_says_so(tmp_path):
    path = tmp_path / "view.dcm"
    path.write_bytes(encoded("PNG"))
    assert refused(path).endswith("a PNG file with the name of a DICOM file: rename it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM", "BMP", "AVIF", "QOI"])
def test_read_view_of_a_damaged_file_raises_nothing_but_a_line(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    whole = encoded(kind, np.dstack([GRAY] * 3))
    random = np.random.default_rng(1)
    damaged = [whole[:length] for length in range(1, len(whole), max(1, len(whole) // 40))]
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, min(len(whole), 400), 3):
            content[place] = random.integers(256)
        damaged.append(bytes(content))
    for data in damaged:
        try:
            read_view(data)
        except ValueError as error:
            assert str(error).startswith("image: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), struct.error("short"), KeyError("x"), zlib.error()]
)
def test_read_view_turns_any_error_of_a_decoder_into_a_line(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    refused(encoded("PNG"))


def test_read_view_of_deep_colour_that_pillow_cuts_is_refused():
    deep = np.dstack([GRAY.astype(">u2") * 16] * 3)
    assert "12-bit colour PPM" in refused(b"P6 40 48 4095\n" + deep.tobytes())
    frame = bytearray(encoded("JPEG2000", np.dstack([GRAY] * 3)))
    place = frame.index(b"\xff\x4f\xff\x51") + 42
    frame[place : place + 9 : 3] = bytes([15, 15, 15])
    assert "16-bit colour JPEG2000" in refused(bytes(frame))
    jpeg = bytearray(encoded("JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    assert "a JPEG of 12 bits, expected 8 bits: convert it to PNG" in refused(bytes(jpeg))


def test_read_view_of_several_frames_takes_the_first():
    frames = [Image.fromarray(np.roll(GRAY, step)) for step in (0, 7)]
    for kind in ("TIFF", "GIF", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(np.asarray(read_view(file.getvalue()))[..., 0], GRAY)


@pytest.mark.parametrize(
    "view",
    [
        np.full((32, 32), 0.5),
        np.zeros((32, 32, 3), np.uint8),
        np.full((32, 32), 900, np.int32),
        Image.new("RGB", (64, 64), "red"),
        Image.new("I;16", (64, 64), 4000),
        Image.new("RGBA", (64, 64), (9, 9, 9, 0)),
    ],
)
def test_read_view_of_one_shade_is_refused(view):
    assert "all pixels have one shade, expected a radiograph" in refused(view)


def test_read_view_of_arrays_scales_colour_without_alpha():
    gray = GRAY.astype(np.uint16) * 10 + 100
    expected = np.asarray(read_view(gray))
    alpha = np.full_like(gray, 65535)
    np.testing.assert_array_equal(read_view(np.dstack([gray] * 3 + [alpha])), expected)
    np.testing.assert_array_equal(read_view(np.dstack([gray] * 3 + [alpha // 65535]).astype(np.float64)), expected)
    wide = np.array([[-(2**40), 2**40]] * 16 * 16).reshape(16, 32)
    assert np.unique(read_view(wide)).tolist() == [0, 255]
    assert "expected a range that a double holds" in refused(np.array([[-1.7e308, 1.7e308]] * 256).reshape(16, 32))


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """The address of a server whose answers are slow, endless, or elsewhere."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/slow headers":
                path = path.replace(" ", "-")
            if path in ("/to-loopback", "/to-metadata", "/to-file", "/to-name"):
                targets = {
                    "/to-loopback": f"http://127.0.0.1:{self.server.server_port}/view.png?secret",
                    "/to-metadata": "http://169.254.169.254/latest/secret",
                    "/to-file": "file:///etc/secret",
                    "/to-name": f"http://localhost:{self.server.server_port}/view.png?secret",
                }
                self.send_response(302)
                self.send_header("Location", targets[path])
                return self.end_headers()
            if path == "/slow-headers":
                return self.drip(b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n" * 100)
            if path == "/private.png" and self.headers.get("Authorization") != "Basic dXNlcjpwYSBzcw==":
                return self.send_error(401)
            if path not in ("/view.png", "/private.png", "/slow-body", "/endless"):
                return self.send_error(404, f"no {self.path}")
            self.send_response(200)
            self.end_headers()
            if path == "/slow-body":
                self.drip(encoded("PNG"))
            elif path == "/endless":
                while self.send(bytes(2**20)):
                    pass
            else:
                self.send(encoded("PNG"))

        def drip(self, data):
            for byte in data:
                if not self.send(bytes([byte])):
                    return
                time.sleep(0.1)

        def send(self, data):
            try:
                self.wfile.write(data)
                self.wfile.flush()
                return True
            except OSError:
                return False

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("path", ["to-loopback", "to-name", "to-metadata", "to-file"])
def test_read_view_follows_no_redirect_to_a_private_address(server, path):
    message = refused(f"http://{server}/{path}")
    assert "not followed" in message and "secret" not in message


@pytest.mark.parametrize("path", ["slow-headers", "slow-body"])
def test_read_view_of_a_slow_url_ends_at_its_time(server, monkeypatch, path):
    monkeypatch.setattr(image_processing, "_URL_SECONDS", 0.5)
    begin = time.monotonic()
    assert "not downloaded within 0.5 seconds" in refused(f"http://{server}/{path}")
    assert time.monotonic() - begin < 5


def test_read_view_of_an_endless_url_ends_at_its_size(server):
    assert "the file has more than" in refused(f"http://{server}/endless", max_pixels=1000)


def test_read_view_never_shows_passwords_of_urls(server):
    secrets = f"user:pa%20ss@{server}"
    np.testing.assert_array_equal(np.asarray(read_view(f"http://{secrets}/private.png"))[..., 0], GRAY)
    for url in (
        f"http://user:wrong-ss@{server}/private.png?token=pa-ss",
        f"HTTP://user:pa-ss@{server}/nowhere.png?token=pa-ss#pa-ss",
        f"http://user:pa-ss@{server}/a view.png?token=pa-ss",
        "http://user:pa-ss@127.0.0.1:9/x.png",
        "http://user:pa/ss@127.0.0.1:9/x.png",
        "http://user:pa-ss@127.0.0.1:port/x.png",
        "http://user:pa-ss@[::1/x.png",
    ):
        message = refused(url)
        assert "ss" not in message.replace("address", ""), message
        assert "user" not in message and "token" not in message


# --- DICOM -----------------------------------------------------------------------------------------------------------


def ramp(low, high, dtype=np.uint16):
    return np.linspace(low, high, 48 * 40).reshape(48, 40).astype(dtype)


def shades(path):
    return np.asarray(read_view(path))[..., 0]


@pytest.mark.parametrize("high", [12, 13, 15])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_read_view_shifts_dicom_whose_high_bit_is_higher(dicom, high, dtype):
    low = -2048 if dtype == np.int16 else 0
    values = ramp(low, low + 4095, dtype)
    expected = shades(dicom(values, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(shades(dicom(values << (high - 11), BitsStored=12, HighBit=high)), expected)
    junk = np.where(np.indices(values.shape).sum(axis=0) % 2, (1 << (high - 11)) - 1, 0).astype(dtype)
    np.testing.assert_array_equal(shades(dicom(values << (high - 11) | junk, BitsStored=12, HighBit=high)), expected)


def test_read_view_refuses_dicom_whose_high_bit_cannot_be(dicom):
    message = refused(dicom(ramp(0, 4095), BitsStored=12, HighBit=8))
    assert "HighBit is 8 with 12 of 16 bits stored, expected 11" in message


@pytest.mark.parametrize(
    ("dtype", "bits", "padding", "representation"),
    [
        (np.int16, 16, -2000, "US"),
        (np.int16, 12, -2000, "US"),
        (np.uint16, 16, 63536, "SS"),
        (np.int16, 16, -2000, "SS"),
    ],
)
def test_read_view_knows_padding_of_another_sign(dicom, tmp_path, dtype, bits, padding, representation):
    import pydicom

    values = np.pad(ramp(0, 1000, dtype), 8, constant_values=padding)
    dataset = pydicom.dcmread(dicom(values, BitsStored=bits, HighBit=bits - 1))
    other = {"US": padding % 2**16, "SS": padding - 2**16 if padding >= 2**15 else padding}[representation]
    dataset.add_new("PixelPaddingValue", representation, other)
    dataset.save_as(tmp_path / "padded.dcm")
    read = shades(tmp_path / "padded.dcm")
    np.testing.assert_allclose(read[8:-8, 8:-8], ramp(0, 1000) / 1000 * 255, atol=0.6)
    assert (read[:8] == 0).all()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("center", [20_000, -20_000])
def test_read_view_gives_up_a_dicom_window_that_misses_every_value(dicom, function, center):
    window = {"WindowCenter": center, "WindowWidth": 100, "VOILUTFunction": function}
    for interpretation in ("MONOCHROME1", "MONOCHROME2"):
        expected = shades(dicom(ramp(0, 4095), interpretation))
        np.testing.assert_array_equal(shades(dicom(ramp(0, 4095), interpretation, **window)), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"pixels": np.full((48, 40), 7, np.uint16)},
        {"pixels": np.full((48, 40), 7, np.uint16), "interpretation": "MONOCHROME1"},
        {"pixels": np.pad(np.full((32, 24), 7, np.uint16), 8), "PixelPaddingValue": 0},
        {"pixels": ramp(0, 4095), "RescaleSlope": 0, "RescaleIntercept": 5},
        {"pixels": ramp(0, 4095), "RescaleSlope": 0, "RescaleIntercept": 5, "WindowCenter": 5, "WindowWidth": 10},
    ],
)
def test_read_view_of_dicom_of_one_shade_is_refused(dicom, fields):
    assert refused(dicom(**fields)).endswith("all pixels have one shade, expected a radiograph")


def changed(path, old, new):
    with open(path, "rb") as file:
        data = file.read()
    assert old in data and len(old) == len(new)
    with open(path, "wb") as file:
        file.write(data.replace(old, new, 1))
    return path


def test_read_view_of_dicom_with_odd_elements_names_them(dicom):
    path = changed(dicom(ramp(0, 9), NumberOfFrames=1), b"IS\x02\x001 ", b"IS\x02\x001A")
    assert "NumberOfFrames is '1A', expected one whole number" in refused(path)
    rows = b"\x28\x00\x10\x00US\x02\x00"
    import pydicom

    dataset = pydicom.dcmread(dicom(ramp(0, 9)))
    dataset.Rows = [48, 48]
    assert "Rows is [48, 48], expected one whole number" in refused(dataset)
    for vr in (b"ZZ", b"SQ", b"\0\0", b"UN"):
        try:
            read_view(changed(dicom(ramp(0, 4095)), rows, rows[:4] + vr + rows[6:]))
        except ValueError as error:
            assert "view.dcm: " in str(error) and "\n" not in str(error)


def test_read_view_of_deflated_dicom_is_bounded(dicom, tmp_path):
    import pydicom

    dataset = pydicom.dcmread(dicom(ramp(0, 4095)))
    expected = shades(dataset)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    path = tmp_path / "deflated.dcm"
    dataset.save_as(path)
    np.testing.assert_array_equal(shades(path), expected)
    head = path.read_bytes()
    meta = 144 + struct.unpack("<I", head[140:144])[0]
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    body = deflate.compress(b"\x28\x00\x10\x00US\x02\x00\x30\x00\xe0\x7f\x10\x00OW\0\0\xf0\xff\xff\xff")
    block = bytes(2**20)
    body += b"".join(deflate.compress(block) for _ in range(40)) + deflate.flush()
    path.write_bytes(head[:meta] + body)
    assert "the deflated DICOM file inflates to more than" in refused(path, max_pixels=10_000)
    path.write_bytes((head[:meta] + body)[132:])  # without a preamble
    assert "the deflated DICOM file inflates to more than" in refused(path, max_pixels=10_000)
    items = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 200_000
    path.write_bytes(head[:meta] + zlib.compress(items)[2:-4])
    assert "items, expected at most" in refused(path)


def test_read_view_of_dicom_refuses_frames_larger_than_it_says(dicom, tmp_path):
    import pydicom

    dataset = pydicom.dcmread(dicom(ramp(0, 255, np.uint8)))
    frame = bytearray(encoded("JPEG2000", no_jp2=True))
    frame[8:16] = struct.pack(">II", 60_000, 60_000)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(frame)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "frame.dcm")
    assert "60000x60000 pixels, expected at most 64000000 in total" in refused(tmp_path / "frame.dcm")


def test_read_view_of_12_bit_jpeg_in_dicom_names_codec_and_decoder(dicom, tmp_path):
    import pydicom

    jpeg = bytearray(encoded("JPEG"))
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 1], jpeg[place + 4] = 0xC1, 12
    dataset = pydicom.dcmread(dicom(ramp(0, 4095), BitsStored=12, HighBit=11))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(jpeg)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "extended.dcm")
    message = refused(tmp_path / "extended.dcm")
    assert "JPEG Extended (Process 2 and 4) of 12 bits" in message and "pip install" in message
