"""Pictures of transport plans."""

import numpy as np
import pytest
from otdrg import FINDINGS
from otdrg.heatmaps import draw_heatmaps
from PIL import Image

GRAY = Image.new("L", (96, 96), 128)


def findings(**states):
    return {name: {"state": states.get(name, "negative"), "probability": 0.5} for name in FINDINGS}


def plans(value=1.0, views=1):
    return {name: np.full((views, 7, 7), value) for name in FINDINGS}


def colours(path):
    """The picture's pixels that are not gray, white or black."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    return pixels[np.ptp(pixels, axis=2) > 60]


def test_what_is_there_or_may_be_is_drawn(tmp_path):
    found = findings(edema="positive", fracture="unclear", no_finding="unmentioned")
    assert draw_heatmaps([GRAY], plans(), found, tmp_path / "a.png") == ["edema", "fracture"]
    assert draw_heatmaps([GRAY], plans(), findings(no_finding="positive"), tmp_path / "b.png") == ["no_finding"]


def test_a_uniform_plan_is_colourless_and_a_peak_is_not(tmp_path):
    found, peak = findings(edema="positive"), plans()
    draw_heatmaps([GRAY], plans(), found, tmp_path / "uniform.png")
    peak["edema"][0, 2, 2] = 30.0
    draw_heatmaps([GRAY], peak, found, tmp_path / "peak.png")
    assert len(colours(tmp_path / "peak.png")) > len(colours(tmp_path / "uniform.png")) + 200


def test_every_view_has_a_row_and_masks_an_outline(tmp_path):
    found, mask = findings(edema="positive"), np.zeros((96, 96), dtype=bool)
    mask[20:60, 20:60] = True
    draw_heatmaps([GRAY], plans(), found, tmp_path / "one.png")
    draw_heatmaps([GRAY, GRAY], plans(views=2), found, tmp_path / "two.png", masks={"edema": [mask, mask]})
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height == pytest.approx(2 * one.height, abs=2)
    green = [pixel for pixel in colours(tmp_path / "two.png") if pixel[1] > 200 and pixel[0] < 120]
    assert len(green) > 50
