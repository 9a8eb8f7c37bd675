"""What the processor makes of studies, prompts and reports, and of what cannot be read.

Long because it follows one module that ships as one file, with every kind of image that people bring.
"""

import copy
import http.server
import io
import json
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import DEFAULT_PROMPT, FINDINGS, OTDRGProcessor
from otdrg.processing_otdrg import IMAGENET_MEAN, IMAGENET_STD, read_view
from otdrg.studies.cleaning import clean_report
from PIL import Image
from transformers import AutoModel, AutoProcessor, ViTImageProcessor

MARKERS = ("<image>", "<finding>", "<finding_text>")


def count(processor, ids):
    return tuple(ids.tolist().count(processor.tokenizer.convert_tokens_to_ids(marker)) for marker in MARKERS)


def text_of(processor, inputs, row=0):
    text = processor.tokenizer.decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()])
    for marker in MARKERS:
        text = text.replace(marker, "")
    return text


def processor_with(build_config, processor, chat_template=None, **fields):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = chat_template
    config = build_config(**fields)
    return OTDRGProcessor.from_config(config, tokenizer), config


@pytest.fixture
def save(tmp_path):
    """Writes an array or an image as a file and returns its path."""

    def write(name, image, **options):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(tmp_path / name, **options)
        return str(tmp_path / name)

    return write


# --- studies and views -----------------------------------------------------------------------------------------------


def test_processor_flat_list_is_studies_and_inner_list_is_one(processor, views):
    a, b = views[:2]
    two, one = processor(images=[a, b]), processor(images=[[a, b]])
    assert two["pixel_values"].shape == (2, 1, 3, 56, 56)
    assert one["pixel_values"].shape == (1, 2, 3, 56, 56)
    assert torch.equal(two["pixel_values"][:, 0], one["pixel_values"][0])
    assert two["view_mask"].tolist() == [[True], [True]]
    assert one["view_mask"].tolist() == [[True, True]]
    assert processor(images=a)["pixel_values"].shape == (1, 1, 3, 56, 56)
    assert torch.equal(processor(images=a)["pixel_values"][0], two["pixel_values"][0])


def test_processor_ragged_studies_are_padded_with_masked_views(processor, views):
    a, b, c, d, e, f = views
    inputs = processor(images=[[a, b, c], d, (e, f)])
    assert inputs["pixel_values"].shape == (3, 3, 3, 56, 56)
    assert inputs["view_mask"].dtype == torch.bool
    assert inputs["view_mask"].tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    for row, study in enumerate(([a, b, c], [d], [e, f])):
        for column, view in enumerate(study):
            alone = processor(images=view)["pixel_values"][0, 0]
            assert torch.equal(inputs["pixel_values"][row, column], alone)
    assert (inputs["pixel_values"][~inputs["view_mask"]] == 0).all()


def test_processor_views_are_scaled_and_normalised(processor):
    gray = np.random.default_rng(0).integers(0, 256, (56, 56), dtype=np.uint8)
    pixels = processor(images=gray)["pixel_values"][0, 0]
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert torch.allclose(pixels.double(), (torch.from_numpy(gray / 255.0) - mean) / std, atol=1e-5)
    assert processor(images=make_wide(gray))["pixel_values"].shape[-2:] == (56, 56)


def make_wide(gray):
    return np.concatenate((gray, gray, gray), axis=1)


def test_read_view_every_form_of_a_gray_view_gives_the_same(processor, views, save):
    gray = views[0]
    expected = processor(images=gray)["pixel_values"]
    path = save("gray.png", gray)
    with open(path, "rb") as file:
        data = file.read()
    forms = {
        "path": path,
        "bytes": data,
        "image": Image.fromarray(gray),
        "RGB image": Image.fromarray(gray).convert("RGB"),
        "RGB array": np.repeat(gray[..., None], 3, axis=2),
        "one channel": gray[..., None],
        "channels first": np.repeat(gray[None], 3, axis=0),
        "tensor": torch.from_numpy(gray),
        "tensor, channels first": torch.from_numpy(gray)[None].repeat(3, 1, 1),
        "floats to 1": gray / 255.0,
        "float16": torch.from_numpy(gray / 255.0).to(torch.float64),
    }
    for name, form in forms.items():
        assert torch.allclose(processor(images=[form])["pixel_values"], expected, atol=1e-6), name


def test_read_view_8_bit_gray_keeps_its_values(views, save):
    assert np.array_equal(np.asarray(read_view(save("gray.png", views[0])))[..., 1], views[0])


def test_read_view_16_bit_gray_is_scaled_from_its_own_range(save):
    gray = np.linspace(1000, 5000, 64 * 64).reshape(64, 64).astype(np.uint16)
    read = np.asarray(read_view(save("deep.png", gray)))[..., 0]
    assert (read.min(), read.max()) == (0, 255)
    assert len(np.unique(read)) == 256
    np.testing.assert_allclose(read, (gray - 1000.0) / 4000 * 255, atol=0.6)
    assert np.array_equal(np.asarray(read_view(gray))[..., 0], read)
    assert np.array_equal(np.asarray(read_view(Image.fromarray(gray)))[..., 0], read)


def test_read_view_colour_palette_and_transparency(views, save):
    gray = views[0]
    colour = np.stack([gray, gray // 2, 255 - gray], axis=-1)
    assert np.array_equal(np.asarray(read_view(save("rgb.png", colour))), colour)

    alpha = np.full_like(gray, 255)
    alpha[:10] = 0
    rgba = np.asarray(read_view(save("rgba.png", np.concatenate((colour, alpha[..., None]), axis=-1))))
    assert np.array_equal(rgba[10:], colour[10:])
    assert (rgba[:10] == 0).all()
    la = np.asarray(read_view(save("la.png", Image.fromarray(np.stack((gray, alpha), axis=-1), "LA"))))
    assert np.array_equal(la[10:, :, 0], gray[10:])
    assert (la[:10] == 0).all()

    palette = Image.fromarray(gray // 64 * 64).convert("P")
    assert np.array_equal(np.asarray(read_view(save("palette.png", palette)))[..., 0], gray // 64 * 64)
    one_bit = Image.fromarray(gray > 100)
    assert np.array_equal(np.asarray(read_view(save("bits.png", one_bit)))[..., 0], (gray > 100) * np.uint8(255))


def test_read_view_float_array_beyond_one_is_scaled_from_its_own_range():
    array = np.linspace(-1000, 3000, 32 * 32).reshape(32, 32)
    read = np.asarray(read_view(array))[..., 0]
    np.testing.assert_allclose(read, (array + 1000) / 4000 * 255, atol=0.6)
    halves = np.asarray(read_view(np.eye(32) / 2))
    assert np.unique(halves).tolist() == [0, 128]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_read_view_half_precision_tensors(dtype):
    ramp = torch.linspace(0, 1, 32).repeat(32, 1).to(dtype)
    np.testing.assert_allclose(np.asarray(read_view(ramp))[..., 0], ramp.float().numpy() * 255, atol=0.6)


def test_read_view_exif_orientation_is_undone(save, views):
    image = Image.fromarray(views[0][:, :40])
    exif = image.getexif()
    exif[0x0112] = 6
    assert read_view(save("turned.jpg", image, exif=exif)).size == (64, 40)


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a local server with /view.png, a /short.png that breaks off, and nothing else."""
    png = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)).save(png, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/view.png", "/short.png"):
                return self.send_error(404, "Not Found")
            body = png.getvalue()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.path == "/view.png" else body[:50])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_read_view_url_is_read(processor, server):
    gray = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
    found = processor(images=[f"{server}/view.png"])
    assert torch.equal(found["pixel_values"], processor(images=[gray])["pixel_values"])


@pytest.mark.parametrize("path", ["/missing.png", "/short.png", "/a view.png"])
def test_read_view_url_without_an_image_is_named(server, path):
    with pytest.raises(ValueError) as error:
        read_view(server + path)
    assert str(error.value).startswith(f"{server}{path}: ")
    assert "\n" not in str(error.value)


def test_read_view_missing_server_is_named(server):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/x.png: cannot be read \("):
        read_view("http://127.0.0.1:9/x.png")


# --- DICOM -----------------------------------------------------------------------------------------------------------


def ramp(low, high, dtype=np.uint16):
    return np.linspace(low, high, 48 * 40).reshape(48, 40).astype(dtype)


def test_read_view_dicom_is_scaled_and_monochrome1_inverted(dicom):
    pixels = ramp(300, 4000)
    read = np.asarray(read_view(dicom(pixels)))
    assert read.shape == (48, 40, 3)
    np.testing.assert_allclose(read[..., 0], (pixels - 300.0) / 3700 * 255, atol=0.6)
    inverted = np.asarray(read_view(dicom(pixels, "MONOCHROME1")))
    np.testing.assert_allclose(inverted[..., 0], 255 - (pixels - 300.0) / 3700 * 255, atol=0.6)


def test_read_view_dicom_rescale_and_window_are_applied(dicom):
    pixels = ramp(0, 2000, np.int16)
    scaled = {"RescaleSlope": 2, "RescaleIntercept": -1000}
    read = np.asarray(read_view(dicom(pixels, **scaled)))[..., 0]
    np.testing.assert_allclose(read, pixels / 2000 * 255, atol=0.6)
    # values are -1000 to 3000; the window shows 0 to 1000 of them
    window = {"WindowCenter": 500, "WindowWidth": 1000}
    read = np.asarray(read_view(dicom(pixels, **scaled, **window)))[..., 0]
    np.testing.assert_allclose(read, np.clip((pixels * 2.0 - 1000) / 1000, 0, 1) * 255, atol=1)


def shades(path):
    read = np.asarray(read_view(path))
    assert (read[..., 0] == read[..., 1]).all() and (read[..., 0] == read[..., 2]).all()
    return read[..., 0]


def test_read_view_dicom_window_is_the_range(dicom):
    pixels = ramp(1000, 1500)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_allclose(shades(dicom(pixels, **window)), pixels / 4095 * 255, atol=0.6)
    np.testing.assert_allclose(shades(dicom(pixels, "MONOCHROME1", **window)), 255 - pixels / 4095 * 255, atol=0.6)
    several = {"WindowCenter": [2048, 1200], "WindowWidth": [4096, 50]}
    np.testing.assert_array_equal(shades(dicom(pixels, **several)), shades(dicom(pixels, **window)))


def test_read_view_dicom_window_functions(dicom):
    pixels = ramp(0, 4095)
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    exact = shades(dicom(pixels, **window, VOILUTFunction="LINEAR_EXACT"))
    np.testing.assert_allclose(exact, np.clip((pixels - 2000.0) / 1000 + 0.5, 0, 1) * 255, atol=0.6)
    sigmoid = shades(dicom(pixels, **window, VOILUTFunction="SIGMOID"))
    np.testing.assert_allclose(sigmoid, 255 / (1 + np.exp(-4 * (pixels - 2000.0) / 1000)), atol=0.6)


def test_read_view_dicom_negative_slope_and_blank_elements(dicom):
    pixels = ramp(0, 4095)
    negative = {"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_allclose(shades(dicom(pixels, **negative)), 255 - pixels / 4095 * 255, atol=0.6)
    blank = dict.fromkeys(("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"))
    np.testing.assert_array_equal(shades(dicom(pixels, **blank)), shades(dicom(pixels)))


def lookup(table, first=0, bits=16, packed=False):
    import pydicom

    item = pydicom.Dataset()
    item.LUTDescriptor = [len(table), first, bits]
    item.add_new("LUTData", "OW", np.asarray(table).astype("u1" if packed else "<u2").tobytes())
    if first < 0:
        item["LUTDescriptor"].VR = "SS"
    return [item]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"VOILUTSequence": lookup(np.arange(4096) // 16, bits=8)}, lambda p: p // 16),
        ({"VOILUTSequence": lookup(np.arange(4096) // 16, bits=8, packed=True)}, lambda p: p // 16),
        ({"VOILUTSequence": lookup(np.arange(4096)[::-1], bits=12)}, lambda p: 255 - p / 4095 * 255),
        ({"VOILUTSequence": lookup(np.arange(256) * 257, first=1000)}, lambda p: np.clip(p - 1000.0, 0, 255)),
        ({"ModalityLUTSequence": lookup(np.arange(4096)[::-1], bits=12)}, lambda p: 255 - p / 4095 * 255),
        (
            {
                "RescaleSlope": 1,
                "RescaleIntercept": -2048,
                "VOILUTSequence": lookup(np.arange(4096) // 16, first=-2048, bits=8),
                "WindowCenter": 5,
                "WindowWidth": 2,
            },
            lambda p: p // 16,
        ),
    ],
)
def test_read_view_dicom_tables(dicom, fields, expected):
    pixels = ramp(0, 4095)
    np.testing.assert_allclose(shades(dicom(pixels, BitsStored=12, HighBit=11, **fields)), expected(pixels), atol=0.6)


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_read_view_dicom_padding_is_black_and_not_in_the_range(dicom, interpretation):
    pixels = ramp(3000, 4000)
    inside = (pixels - 3000.0) / 1000 * 255
    inside = 255 - inside if interpretation == "MONOCHROME1" else inside
    padded = np.pad(pixels, 8)
    read = shades(dicom(padded, interpretation, PixelPaddingValue=0))
    np.testing.assert_allclose(read[8:-8, 8:-8], inside, atol=0.6)
    assert (read[:8] == 0).all() and (read[:, -8:] == 0).all()
    padded[:8] = 20
    read = shades(dicom(padded, interpretation, PixelPaddingValue=0, PixelPaddingRangeLimit=20))
    np.testing.assert_allclose(read[8:-8, 8:-8], inside, atol=0.6)
    assert (read[:8] == 0).all()


def test_read_view_dicom_signed_values_and_unused_bits(dicom):
    pixels = ramp(0, 4095)
    stored = {"BitsStored": 12, "HighBit": 11}
    expected = shades(dicom(pixels, **stored))
    np.testing.assert_array_equal(shades(dicom(pixels | 0xA000, **stored)), expected)
    signed = pixels.astype(np.int16) - 2048
    np.testing.assert_array_equal(shades(dicom(signed, **stored)), expected)
    np.testing.assert_array_equal(shades(dicom(signed & 0x0FFF, **stored)), expected)
    np.testing.assert_allclose(shades(dicom(ramp(0, 65535))), pixels / 4095 * 255, atol=0.6)


def test_read_view_dicom_without_a_preamble(dicom, tmp_path):
    import pydicom

    path = dicom(ramp(0, 4095))
    expected = shades(path)
    dataset = pydicom.dcmread(path)
    del dataset.file_meta
    for implicit in (True, False):
        dataset.save_as(tmp_path / "bare.dcm", implicit_vr=implicit, little_endian=True)
        np.testing.assert_array_equal(shades(str(tmp_path / "bare.dcm")), expected)


COLOURS = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 240, 5)), -1)
COLOURS = np.concatenate([COLOURS, np.full_like(COLOURS[..., :1], 100)], -1).astype(np.uint8)  # (48, 40, 3)


@pytest.fixture
def colour_dicom(dicom, tmp_path):
    import pydicom

    def write(data, interpretation, planar=0, syntax=None):
        fields = {"SamplesPerPixel": 3, "PlanarConfiguration": planar, "PixelData": data}
        dataset = pydicom.dcmread(dicom(np.zeros((48, 40), np.uint8), interpretation, **fields))
        if syntax:
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.PixelData = pydicom.encaps.encapsulate([data])
            dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.save_as(tmp_path / "colour.dcm")
        return str(tmp_path / "colour.dcm")

    return write


def test_read_view_dicom_colours(colour_dicom):
    from pydicom.pixels import convert_color_space
    from pydicom.uid import JPEGBaseline8Bit

    np.testing.assert_array_equal(read_view(colour_dicom(COLOURS.tobytes(), "RGB")), COLOURS)
    planes = np.moveaxis(COLOURS, -1, 0).tobytes()
    np.testing.assert_array_equal(read_view(colour_dicom(planes, "RGB", planar=1)), COLOURS)
    ybr = convert_color_space(COLOURS, "RGB", "YBR_FULL").tobytes()
    np.testing.assert_allclose(read_view(colour_dicom(ybr, "YBR_FULL")), COLOURS, atol=2)
    jpeg = io.BytesIO()
    Image.fromarray(COLOURS).save(jpeg, "JPEG", quality=98, subsampling="4:4:4")
    read = np.asarray(read_view(colour_dicom(jpeg.getvalue(), "YBR_FULL_422", syntax=JPEGBaseline8Bit)))
    assert np.abs(read.astype(int) - COLOURS).mean() < 2


def transcoded(path, syntax):
    """A copy of a DICOM file in another transfer syntax, made by GDCM."""
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm, which encodes the file, is not installed")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(path)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(f"{path}.{syntax}.dcm")
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return f"{path}.{syntax}.dcm"


@pytest.mark.parametrize(
    "syntax",
    [
        "RLELossless",
        "JPEGLosslessProcess14",
        "JPEGLosslessProcess14_1",
        "JPEGLSLossless",
        "JPEGLSNearLossless",
        "JPEG2000Lossless",
        "JPEG2000",
    ],
)
@pytest.mark.parametrize(
    ("low", "high", "dtype", "bits"),
    [(0, 255, np.uint8, 8), (0, 4095, np.uint16, 12), (0, 65535, np.uint16, 16), (-2000, 2000, np.int16, 16)],
)
def test_read_view_dicom_compressed(dicom, syntax, low, high, dtype, bits):
    path = dicom(ramp(low, high, dtype), BitsStored=bits, HighBit=bits - 1)
    np.testing.assert_allclose(shades(transcoded(path, syntax)), shades(path), atol=2)


def test_read_view_dicom_jpeg_baseline(dicom):
    path = dicom(ramp(0, 255, np.uint8))
    np.testing.assert_allclose(shades(transcoded(path, "JPEGBaselineProcess1")).astype(int), shades(path), atol=4)


def test_read_view_dicom_rle_needs_only_pydicom(dicom, tmp_path):
    import pydicom

    path = dicom(ramp(0, 4095))
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless, encoding_plugin="pydicom")
    dataset.save_as(tmp_path / "rle.dcm")
    np.testing.assert_array_equal(shades(str(tmp_path / "rle.dcm")), shades(path))


def test_read_view_dicom_without_decoder_says_what_to_install(dicom, monkeypatch, tmp_path):
    import pydicom

    dataset = pydicom.dcmread(dicom(ramp(0, 4095)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 and so on"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "lossless.dcm")
    monkeypatch.setattr(type(pydicom.pixels.get_decoder(pydicom.uid.JPEGLosslessSV1)), "is_available", False)
    with pytest.raises(ValueError, match=r"JPEG Lossless.* needs a decoder: pip install python-gdcm"):
        read_view(str(tmp_path / "lossless.dcm"))


def test_read_view_dicom_frames_are_counted_before_decoding(dicom):
    path = dicom(ramp(0, 9), NumberOfFrames=10_000)
    with pytest.raises(ValueError, match="10000 frames, expected one radiograph"):
        read_view(path)


def test_read_view_dicom_by_content_dataset_and_batch(dicom, processor, tmp_path):
    import pydicom

    path = dicom(ramp(0, 255, np.uint8))
    expected = processor(images=path)["pixel_values"]
    unnamed = tmp_path / "IM0001"
    unnamed.write_bytes((tmp_path / "view.dcm").read_bytes())
    assert torch.equal(processor(images=[str(unnamed)])["pixel_values"], expected)
    assert torch.equal(processor(images=[unnamed])["pixel_values"], expected)
    assert torch.equal(processor(images=[pydicom.dcmread(path)])["pixel_values"], expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixels": None}, "the DICOM file has no pixels, expected a radiograph"),
        ({"pixels": ramp(0, 9).repeat(3, 0).reshape(3, 48, 40), "NumberOfFrames": 3}, "3 frames, expected one radio"),
        ({"pixels": ramp(0, 9), "Rows": 480}, "pixels cannot be decoded"),
        ({"pixels": ramp(0, 9), "WindowCenter": 5, "WindowWidth": 0}, "pixels cannot be decoded"),
        ({"pixels": ramp(0, 9)[:4]}, "40x4 pixels, expected at least 16 on each side"),
    ],
)
def test_read_view_dicom_that_is_no_radiograph_is_named(dicom, fields, message):
    path = dicom(**fields)
    with pytest.raises(ValueError) as error:
        read_view(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_read_view_dicom_larger_than_allowed_is_refused(dicom):
    path = dicom(ramp(0, 9))
    with pytest.raises(ValueError, match=r"view\.dcm: 40x48 pixels, expected at most 1000"):
        read_view(path, max_pixels=1000)


def test_read_view_text_named_dcm_is_refused(tmp_path):
    path = tmp_path / "note.dcm"
    path.write_text("This is a note about a patient, and no radiograph at all. " * 9)
    with pytest.raises(ValueError, match=r"note\.dcm: .*DICOM"):
        read_view(path)


# --- bad input -------------------------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that says it is `width` x `height` and holds a hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def encoded(image_format, shape=(64, 64)):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(data, image_format)
    return data.getvalue()


BAD_FILES = {
    "empty.png": (b"", "the file is empty, expected an image"),
    "empty.dcm": (b"", "the file is empty, expected an image"),
    "text.png": (b"The heart is normal in size.\n" * 20, "not an image, expected PNG, JPEG"),
    "half.png": (encoded("PNG")[:2000], "the image is damaged"),
    "half.jpg": (encoded("JPEG")[:2000], "the image is damaged"),
    "header.jpg": (encoded("JPEG")[:100], "the image is damaged"),
    "header.png": (encoded("PNG")[:20], "the image is damaged"),
    "one.png": (encoded("PNG", (1, 1)), "1x1 pixels, expected at least 16 on each side"),
    "thin.png": (encoded("PNG", (64, 15)), "15x64 pixels, expected at least 16 on each side"),
    "bomb.png": (png_header(100_000, 100_000), "expected at most 64000000 pixels"),
    "small bomb.png": (png_header(12_000, 12_000), "12000x12000 pixels, expected at most 64000000"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_read_view_file_that_is_no_radiograph_is_named_in_one_line(processor, tmp_path, name):
    data, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        processor(images=[str(path)])
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if data:
        with pytest.raises(ValueError, match=message):
            read_view(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it finds in the TIFF
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_read_view_truncated_file_raises_value_error_only(image_format):
    data = encoded(image_format)
    for length in [*range(1, 120, 7), *range(120, len(data) - 1, len(data) // 20)]:
        try:
            read_view(data[:length])  # some decoders are content with less
        except ValueError as error:
            assert str(error).startswith("image: "), length


def test_read_view_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png: cannot be read \(No such file or directory\)"):
        read_view(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_view(tmp_path)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (np.full((32, 32), np.nan), "array: the array holds NaN or infinite values, expected finite numbers"),
        (torch.full((3, 32, 32), torch.inf), "array: the array holds NaN or infinite values"),
        (np.zeros((2, 2, 32, 32)), r"array: shape \(2, 2, 32, 32\), expected \(height, width\)"),
        (np.zeros((32, 32, 2)), r"array: shape \(32, 32, 2\)"),
        (np.zeros((0, 32)), r"array: shape \(0, 32\)"),
        (np.zeros((1, 1)), r"array: 1x1 pixels, expected at least 16 on each side"),
        (np.zeros((32, 32), complex), "array: values of type complex128, expected numbers"),
        (Image.new("L", (8, 64)), "image: 8x64 pixels, expected at least 16 on each side"),
        (None, "a view is a NoneType: expected a path, URL, PIL image, array or DICOM dataset"),
        (7, "a view is a int: expected a path"),
        ({"image": "a.png"}, "a view is a dict: expected a path"),
    ],
)
def test_read_view_wrong_view_is_named(processor, view, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[view])


@pytest.mark.parametrize("images", [None, [], ()])
def test_processor_no_image_is_refused(processor, images):
    with pytest.raises(ValueError, match="no image: expected at least one view"):
        processor(images=images, text="<image> Describe it.")


def test_processor_study_without_views_is_named(processor, views):
    with pytest.raises(ValueError, match="no image: study 1 has no view"):
        processor(images=[views[0], []])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"report": ["a", "b", "c"]}, "report has 3 entries for 2 studies: expected one each"),
        ({"report": "a"}, "report has 1 entries for 2 studies"),
        ({"report": ["a <image>", "b"]}, "report holds '<image>'"),
        ({"report": ["a", None]}, "report is given for some studies and not for others"),
        ({"report": [None, "a"]}, "report is given for some studies and not for others"),
        ({"indication": ["cough"]}, "indication has 1 entries for 2 studies"),
        ({"indication": ["<finding_text>", None]}, "indication holds '<finding_text>'"),
        ({"text": ["a"]}, "text has 1 prompts for 2 studies: expected one each"),
        ({"text": ["a", "b"], "indication": ["c", "d"]}, "text and indication were both given"),
        ({"text": ["<image> <image>", "b"]}, "a prompt has 2 <image> for 1 views: expected 1 or 1"),
        ({"finding_states": {"heart": "positive"}}, "unknown finding 'heart': expected one of"),
        ({"finding_states": {"edema": "present"}}, "unknown finding state 'present'"),
        ({"finding_states": [{"edema": 1}]}, r"finding_states has shape \(1, 14\): expected \(2, 14\)"),
        ({"finding_states": [[0] * 13] * 2}, r"finding_states has shape \(2, 13\): expected \(2, 14\)"),
        (
            {"finding_states": [[5] * 14] * 2},
            r"finding_states has \[5\]: expected ids 0 to 3, 4 for not given, or -1 to",
        ),
        ({"finding_states": [[-2] * 14] * 2}, r"finding_states has \[-2\]"),
        ({"finding_states": [[0.5] * 14] * 2}, r"finding_states has \[0.5\]"),
        ({"findings": {"edema": 1}}, "unknown argument 'findings'"),
        ({"finding_states": [{"edema": 1}, None]}, "finding_states of study 1 is None: expected a dictionary"),
        ({"finding_states": {"edema": 1, "Edema": 2}}, "finding edema is given twice, the second time as 'Edema'"),
        ({"finding_states": "positive"}, "finding_states is 'positive': expected ids"),
        ({"indication": float("nan")}, "indication is nan: expected text"),
        ({"indication": ["cough", float("nan")]}, "indication of study 1 is nan: expected text, or None"),
        ({"report": [float("nan"), "a"]}, "report of study 0 is nan: expected text, or None"),
        ({"prior_report": [None, 5]}, "prior_report of study 1 is 5: expected text, or None"),
        ({"text": ["a", float("nan")]}, "text of study 1 is nan: expected a prompt"),
        ({"videos": ["a.mp4"]}, "videos and audio were given"),
        ({"return_tensors": "tf"}, "return_tensors='tf': expected 'pt', 'np' or None"),
    ],
)
def test_processor_wrong_arguments_are_named(processor, views, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(images=views[:2], **arguments)
    assert "\n" not in str(error.value)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
@pytest.mark.parametrize(
    ("fields", "findings", "finding_texts"),
    [
        ({"finding_text": "mentioned"}, 14, 1),
        ({"finding_text": "all"}, 14, 1),
        ({"finding_text": "none"}, 14, 0),
        ({"fiot": False}, 0, 1),
        ({"fiot": False, "finding_text": "none"}, 0, 0),
        ({"dle": False, "fiot": False}, 0, 0),
    ],
)
def test_processor_prompt_has_the_placeholders_of_its_study(
    build_config, processor, views, view_fusion, fields, findings, finding_texts
):
    processor, config = processor_with(build_config, processor, view_fusion=view_fusion, **fields)
    inputs = processor(images=[views[0], views[1:4]])
    three = 3 if view_fusion == "concat" else 1
    assert count(processor, inputs["input_ids"][0]) == (4, findings, finding_texts)
    assert count(processor, inputs["input_ids"][1]) == (4 * three, findings, finding_texts)
    # The configuration's own prompt is the one of a single view.
    assert config.prompt_token_ids == inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()


def test_default_prompt_plain_is_the_papers(processor, views):
    inputs = processor(images=views[0])
    assert text_of(processor, inputs) == f"<s>\n{DEFAULT_PROMPT}\n"
    # image tokens, label tokens, label text, instruction, as in the paper
    ids = inputs["input_ids"][0].tolist()
    markers = [processor.tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS]
    assert [token for token in ids if token in markers] == [markers[0]] * 4 + [markers[1]] * 14 + [markers[2]]


def test_default_prompt_indication_is_before_the_instruction(processor, views):
    inputs = processor(images=views[:2], indication=["  cough and fever ", None])
    assert text_of(processor, inputs, 0) == f"<s>\nIndication: cough and fever\n{DEFAULT_PROMPT}\n"
    assert text_of(processor, inputs, 1) == f"<s>\n{DEFAULT_PROMPT}\n"
    assert text_of(processor, processor(images=views[0], indication="pain")).startswith("<s>\nIndication: pain\n")


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
def test_processor_blank_indication_or_prior_report_is_none(build_config, processor, views, blank):
    processor, _ = processor_with(build_config, processor, indication_reader="both", priors="report")
    expected = processor(images=views[0])
    found = processor(images=views[0], indication=blank, prior_report=blank)
    assert found.keys() == expected.keys() and torch.equal(found["input_ids"], expected["input_ids"])
    assert processor.default_prompt(blank, blank) == processor.default_prompt()


CHAT = (
    "{% if messages[0]['role'] != 'system' %}[system]I am a helpful bot.{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT_WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "system"), [(CHAT, "[system]"), (CHAT_WITHOUT_SYSTEM, "")], ids=["system", "no system"]
)
def test_default_prompt_chat_template_has_an_empty_system_turn(build_config, processor, views, template, system):
    processor, _ = processor_with(build_config, processor, template)
    inputs = processor(images=[views[:2]])
    assert text_of(processor, inputs) == f"{system}[user]\n{DEFAULT_PROMPT}[assistant]"
    assert count(processor, inputs["input_ids"][0]) == (4, 14, 1)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Edema?"}]},
    ]
    if system:
        text = processor.apply_chat_template(messages, tokenize=False)
        assert text == "[system]Be brief.[user]<image>Edema?"


def test_default_prompt_of_several_chat_templates_is_that_of_the_default(build_config, processor):
    expected = processor_with(build_config, processor, CHAT)[0].default_prompt()
    templates = {"default": CHAT, "tool_use": CHAT_WITHOUT_SYSTEM}
    assert processor_with(build_config, processor, templates)[0].default_prompt() == expected
    with pytest.raises(ValueError, match=r"template names are \['rag', 'tool_use'\]"):
        processor_with(build_config, processor, {"rag": CHAT, "tool_use": CHAT})


def test_processor_text_replaces_the_prompt(processor, views):
    inputs = processor(images=[views[:2], views[2]], text=["Is <image> normal?", "Describe it."])
    assert text_of(processor, inputs, 0) == "Is  normal?"
    assert text_of(processor, inputs, 1) == "\nDescribe it."
    assert [count(processor, ids) for ids in inputs["input_ids"]] == [(4, 14, 1)] * 2
    each = processor(images=[views[:2]], text="Frontal: <image> Lateral: <image>")
    assert count(processor, each["input_ids"][0]) == (4, 14, 1)


def test_processor_flat_images_go_to_their_conversations(processor, views):
    inputs = processor(images=views[:3], text=["<image><image> Describe.", "<image> Describe."])
    assert inputs["view_mask"].tolist() == [[True, True], [True, False]]
    assert torch.equal(inputs["pixel_values"][1, 0], processor(images=views[2])["pixel_values"][0, 0])


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_processor_prompts_are_padded_left_and_reports_right(processor, views, reports):
    prompts = processor(images=views[:2], indication=["a long history of cough, and fever since Monday", None])
    assert "labels" not in prompts
    assert prompts["attention_mask"][0].all()
    assert prompts["attention_mask"][1].tolist() == sorted(prompts["attention_mask"][1].tolist())
    assert not prompts["attention_mask"][1, 0]

    training = processor(images=views[:2], report=[reports[0], reports[3]])
    lengths = training["attention_mask"].sum(dim=1)
    assert lengths[0] > lengths[1]
    assert training["attention_mask"][1].tolist() == sorted(training["attention_mask"][1].tolist(), reverse=True)
    assert (training["input_ids"][1, lengths[1] :] == processor.tokenizer.pad_token_id).all()


def test_processor_labels_are_the_report_and_the_end_of_text(processor, views, reports):
    training = processor(images=views[:2], report=reports[:2])
    prompt = processor(images=views[0])["input_ids"][0]
    for row, report in enumerate(reports[:2]):
        ids, labels = training["input_ids"][row], training["labels"][row]
        learned = labels != -100
        assert torch.equal(ids[: len(prompt)], prompt)
        assert not learned[: len(prompt)].any()
        assert torch.equal(ids[learned], labels[learned])
        assert labels[learned][-1] == processor.tokenizer.eos_token_id
        assert processor.decode(labels[learned][:-1]) == report
        assert not learned[~training["attention_mask"][row].bool()].any()
    assert processor.batch_decode(training["labels"][:1, len(prompt) :].clamp(min=0), skip_special_tokens=True) == [
        reports[0]
    ]


def test_processor_end_of_text_is_learned_if_it_is_the_padding(build_config, processor, views, reports):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    processor = OTDRGProcessor.from_config(build_config(), tokenizer)
    training = processor(images=views[:2], report=[reports[0], reports[3]])
    eos = tokenizer.eos_token_id
    for row in range(2):
        last = int(training["attention_mask"][row].sum()) - 1
        assert training["labels"][row, last] == training["input_ids"][row, last] == eos
        assert (training["labels"][row, last + 1 :] == -100).all()
    assert training["attention_mask"][1, -1] == 0
    assert training["input_ids"][1, -1] == eos


def test_processor_tokenizer_without_padding_works(build_config, processor, views, reports):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = None
    processor = OTDRGProcessor.from_config(build_config(), tokenizer)
    training = processor(images=views[:2], report=[reports[0], reports[3]])
    assert training["attention_mask"][1, -1] == 0
    assert (training["labels"][:, -1] == torch.tensor([tokenizer.eos_token_id, -100])).all()


def test_processor_max_report_tokens_cuts_reports(processor, views, reports):
    training = processor(images=views[:2], report=[reports[0], ""], max_report_tokens=5)
    assert (training["labels"] != -100).sum(dim=1).tolist() == [6, 1]
    assert training["labels"][1].max() == processor.tokenizer.eos_token_id


def test_processor_finding_states_by_name_or_id(processor, views):
    by_name = processor(images=views[:2], finding_states={"Edema": "positive", "pleural_effusion": "uncertain"})
    expected = torch.full((2, 14), -1)
    expected[:, FINDINGS.index("edema")] = 1
    expected[:, FINDINGS.index("pleural_effusion")] = 3
    assert torch.equal(by_name["finding_states"], expected)
    each = processor(images=views[:2], finding_states=[{"edema": 2}, {}])["finding_states"]
    assert each[0, FINDINGS.index("edema")] == 2
    assert (each[1] == -1).all()
    ids = processor(images=views[:2], finding_states=np.tile(np.arange(14) % 2, (2, 1)))["finding_states"]
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[0, 1] * 7] * 2
    # numpy does not read bfloat16, as it does not read tensors of an accelerator.
    for states in (ids.to(torch.bfloat16), ids.to(torch.int8), ids.tolist()):
        again = processor(images=views[:2], finding_states=states)["finding_states"]
        assert again.dtype == torch.int64 and torch.equal(again, ids)
    numpy = processor(images=views[:2], finding_states={"edema": np.int64(1), "fracture": np.int8(4)})
    assert torch.equal(
        numpy["finding_states"],
        processor(images=views[:2], finding_states={"edema": 1, "fracture": 4})["finding_states"],
    )


def test_processor_tokenizer_without_placeholders_is_refused(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.get_added_vocab = dict
    with pytest.raises(ValueError, match="the tokenizer has no '<image>'"):
        OTDRGProcessor(processor.image_processor, tokenizer)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("auto", [OTDRGProcessor, AutoProcessor])
def test_processor_saving_and_loading_keeps_everything(
    build_config, processor, views, reports, tmp_path, template, auto
):
    fields = {"view_fusion": "concat", "finding_text": "all", "fiot": False, "prompt": "Write the report."}
    original, config = processor_with(build_config, processor, template, **fields)
    original.max_image_pixels = 5000
    original.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    reloaded = auto.from_pretrained(tmp_path)
    assert isinstance(reloaded, OTDRGProcessor)
    for name in (*fields, "dle", "image_tokens", "max_image_pixels", "image_token", "image_token_id"):
        assert getattr(reloaded, name) == getattr(original, name), name
    arguments = {"images": [views[:2], views[2]], "indication": ["cough", None], "report": reports[:2]}
    before, after = original(**arguments), reloaded(**arguments)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert original.default_prompt() == reloaded.default_prompt()


WORDS = st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="<>"), min_size=1, max_size=8)


@given(reports=st.lists(st.lists(WORDS, min_size=1, max_size=8), min_size=1, max_size=5), rare=WORDS)
@settings(max_examples=25, deadline=None)
def test_word_tokenizer_gives_cleaned_reports_back(build_config, reports, rare):
    texts = [clean_report(" ".join(words), "r2gen_iu") for words in reports]
    processor = OTDRGProcessor.from_texts([*texts, *texts, rare], build_config(), tokenizer="words")
    tokenizer = processor.tokenizer
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.split())
    assert tokenizer.decode(tokenizer.encode(f"{texts[0]} {rare}s s{rare}", add_special_tokens=False)).endswith("<unk>")


# --- what trainers of other libraries ask for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior", [{"prior_report": "Clear."}, {"prior_images": [np.eye(32)]}], ids=["report", "images"]
)
def test_processor_text_with_a_prior_and_no_image_is_refused(processor, prior):
    with pytest.raises(ValueError, match="no image: expected at least one view"):
        processor(text="abc", **prior)


def test_processor_texts_alone_are_tokens(processor, reports):
    found = processor(text=reports[:2], padding_side="right")
    assert set(found) == {"input_ids", "attention_mask"}
    for row, report in enumerate(reports[:2]):
        ids = processor.tokenizer.encode(report, add_special_tokens=False)
        assert found["input_ids"][row, : len(ids)].tolist() == ids and found["attention_mask"][row].sum() == len(ids)
    assert processor(text=reports[0], padding=False, return_tensors=None)["input_ids"] == [
        processor.tokenizer.encode(reports[0], add_special_tokens=False)
    ]
    with pytest.raises(ValueError, match="no image: expected at least one view"):
        processor(text=reports[0], report=reports[0])


def test_processor_without_view_mask_pads_with_zeros_and_is_saved_so(processor, views, tmp_path):
    processor = copy.deepcopy(processor)
    expected = processor(images=[views[:2], views[2]])
    processor.return_view_mask = False
    processor.save_pretrained(tmp_path)
    for one in (processor, OTDRGProcessor.from_pretrained(tmp_path)):
        found = one(images=[views[:2], views[2]])
        assert "view_mask" not in found and "view_mask" not in one.model_input_names
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert not expected["pixel_values"][1, 1].any() and expected["view_mask"].tolist() == [[True, True], [True, False]]


def test_processor_conversation_with_an_answer_is_prompt_report_and_end(processor, views, reports):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{processor.prompt}"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": reports[0]}]}
    text = processor.apply_chat_template([user, answer], tokenize=False)
    found = processor(images=[views[0]], text=[text])
    assert torch.equal(found["input_ids"], processor(images=[views[0]], report=reports[:1])["input_ids"])


# --- backbones -------------------------------------------------------------------------------------------------------


def test_from_backbones_normalises_as_the_vision_encoder(build_backbones, build_config, tmp_path):
    backbones = build_backbones(tmp_path)
    stated = tmp_path / "vision" / "preprocessor_config.json"

    def found():
        image_processor = OTDRGProcessor.from_backbones(**backbones, config=build_config()).image_processor
        return tuple(image_processor.image_mean), tuple(image_processor.image_std)

    assert found() == (IMAGENET_MEAN, IMAGENET_STD)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "vision")
    assert found() == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for damaged in ('{"image_mean": [0.1', "[]", '{"image_processor_type": "Unheard"}'):
        stated.write_text(damaged)
        with pytest.raises(OSError, match=rf"vision backbone '{backbones['vision']}': its image processor") as error:
            found()
        assert "\n" not in str(error.value)


def test_from_texts_on_a_timm_encoder_built_from_a_configuration_normalises_as_imagenet(build_config, tmp_path):
    config = build_config()
    AutoModel.from_config(config.vision_config).save_pretrained(tmp_path)
    processor = OTDRGProcessor.from_texts(["Clear."], config, vision=str(tmp_path))
    assert tuple(processor.image_processor.image_mean) == IMAGENET_MEAN


def test_from_texts_on_a_hub_that_is_not_reached_is_refused(build_config, hub_server, tmp_path):
    """A repository without an image processor is known to have none, also when the Hub is not reached later."""
    files = {"config.json": b'{"model_type": "dinov2"}'}
    stated = json.dumps({"image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3}).encode()
    hub_server.add_repo("models", "org/plain", files)
    hub_server.add_repo("models", "org/stated", {**files, "preprocessor_config.json": stated})
    code = """
import json, sys
from otdrg import OTDRGConfig, OTDRGProcessor
found = {}
for name in ("org/plain", "org/stated", "org/unknown"):
    try:
        processor = OTDRGProcessor.from_texts(["Clear."], OTDRGConfig.from_preset("tiny"), vision=name)
        found[name] = processor.image_processor.image_mean[0]
    except OSError as error:
        found[name] = str(error)
print(json.dumps(found))
"""

    def run(**variables):
        environment = hub_server.environment(tmp_path / "home", **variables)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert run(HF_HUB_OFFLINE="1")["org/plain"].startswith("vision backbone 'org/plain': its image processor")
    online, offline = run(HF_HUB_OFFLINE="0"), run(HF_HUB_OFFLINE="1")
    for found in (online, offline):
        assert (found["org/plain"], found["org/stated"]) == (IMAGENET_MEAN[0], 0.1)
        assert found["org/unknown"].startswith("vision backbone 'org/unknown': its image processor")
