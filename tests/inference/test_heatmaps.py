"""Maps at a view's resolution, and pictures of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from otdrg import FINDINGS
from otdrg.inference.heatmaps import draw_heatmaps, upsample_lift
from otdrg.processing_otdrg import read_view
from PIL import Image

GRAY = Image.new("L", (96, 96), 128)
#: Of a lift of 1 over that gray, by the colour map's middle and the overlay's opacity.
UNIFORM = (170, 170, 170)


def findings(**states):
    return {name: {"state": states.get(name, "negative"), "probability": 0.5} for name in FINDINGS}


def plans(value=1.0, views=1):
    return {name: np.full((views, 7, 7), value) for name in FINDINGS}


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def coloured(path):
    """The picture's pixels that are not gray, white or black, left of the colour bar."""
    picture = pixels(path)
    picture = picture[:, : int(picture.shape[1] * 0.82)]
    return picture[np.ptp(picture, axis=2) > 40]


def drawn(path, views=(GRAY,), names=("edema",), **more):
    """The picture of one finding over its views, without what is written around them."""
    draw_heatmaps(views, more.pop("heatmaps", plans(views=len(views))), findings(**more), path, names=names)
    return pixels(path)


def panel(picture, colour):
    """The rectangle, as rows and columns, over which a picture has a colour."""
    there = (np.abs(picture - colour) <= 2).all(axis=2)
    # Letters have that colour at their edges, too.
    places = [np.flatnonzero(there.sum(axis=axis) > 50) for axis in (1, 0)]
    return tuple(slice(place.min(), place.max() + 1) for place in places)


# --- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(112, 112), (30, 51), (64, 9)])
def test_upsample_lift_equals_torch_interpolation(size):
    lift = np.random.default_rng(0).random((7, 7), dtype=np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(lift)[None, None], size, mode="bilinear")[0, 0]
    np.testing.assert_allclose(upsample_lift(lift, size), expected, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (3, 3), elements=st.floats(0, 1000, width=32)), st.integers(3, 90), st.integers(3, 90))
def test_upsample_lift_stays_within_the_range(lift, height, width):
    found = upsample_lift(lift, (height, width))
    assert found.shape == (height, width)
    assert found.min() >= lift.min() and found.max() <= lift.max()
    assert (upsample_lift(np.ones((3, 3)), (height, width)) == 1).all()


def test_upsample_lift_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"lift has shape \(2, 7, 7\): expected \(rows, columns\)"):
        upsample_lift(np.ones((2, 7, 7)), (64, 64))


@pytest.mark.parametrize("size", [(60, 180), (180, 60), (97, 64)])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_upsample_lift_grid_covers_a_view_of_any_shape(processor, size, depth):
    """What lies in a cell of the view as it was given lies in that cell of the encoder's square."""
    view = np.zeros(size, dtype=depth)
    height, width = size
    view[: height // 4, 3 * width // 4 :] = np.iinfo(depth).max
    pixel_values = processor.encode_images([view])["pixel_values"][0, 0].mean(dim=0)
    grid = torch.nn.functional.adaptive_avg_pool2d(pixel_values[None], 4)[0].numpy()
    lift = upsample_lift(grid - grid.min(), size)
    assert lift.shape == size == read_view(view).size[::-1]
    bright = lift > lift.max() / 2
    assert (bright & (view > 0)).sum() / (bright | (view > 0)).sum() > 0.7


# --- pictures --------------------------------------------------------------------------------------------------------


def test_draw_heatmaps_draws_positive_and_unclear_findings(tmp_path):
    found = findings(edema="positive", fracture="unclear", no_finding="unmentioned")
    assert draw_heatmaps([GRAY], plans(), found, tmp_path / "a.png") == ["edema", "fracture"]
    assert draw_heatmaps([GRAY], plans(), findings(no_finding="positive"), tmp_path / "b.png") == ["no_finding"]


def test_draw_heatmaps_uniform_plan_has_one_colour(tmp_path):
    picture = drawn(tmp_path / "a.png")
    for colour in (UNIFORM, (128, 128, 128)):
        rows, columns = panel(picture, colour)
        assert rows.stop - rows.start > 200 and columns.stop - columns.start > 200
        inside = picture[rows, columns][2:-2, 2:-2]
        assert (np.abs(inside - colour) <= 2).all()


def test_draw_heatmaps_colour_scale_is_fixed(tmp_path):
    """A peak elsewhere changes no colour where the lift is 1, and nothing is above the end of the scale."""
    rows, columns = panel(drawn(tmp_path / "a.png"), UNIFORM)
    peak, higher = plans(), plans()
    peak["edema"][0, 1, 1], higher["edema"][0, 1, 1] = 40.0, 4000.0
    reds = []
    for name, lift in {"b": peak, "c": higher}.items():
        picture = drawn(tmp_path / f"{name}.png", heatmaps=lift)[rows, columns]
        half = picture.shape[0] // 2
        assert (np.abs(picture[half:, half:][:-2, :-2] - UNIFORM) <= 2).all()
        reds.append(picture[int(half * 3 / 7), int(half * 3 / 7)])
    assert reds[0][0] > reds[0][1] + 60
    assert (reds[0] == reds[1]).all()


def test_draw_heatmaps_map_covers_a_view_that_is_not_square(tmp_path):
    corner = plans(0.0)
    corner["edema"][0] = 1.0
    corner["edema"][0, 0, -1] = 40.0
    picture = drawn(tmp_path / "a.png", [Image.new("L", (160, 80), 128)], heatmaps=corner)
    rows, columns = panel(picture, UNIFORM)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    red = (picture[..., 0] > picture[..., 1] + 60) & (np.arange(picture.shape[1]) < columns.stop + 4)
    reddest = np.argwhere(red)
    assert reddest[:, 0].max() < rows.start + height * 0.4
    assert reddest[:, 1].min() > columns.start + width * 0.6


def test_draw_heatmaps_finding_without_mass_has_a_note(tmp_path):
    """The lowest mass is blue; none at all is not a low one."""
    draw_heatmaps([GRAY], plans(0.0), findings(), tmp_path / "none.png", names=["edema"])
    draw_heatmaps([GRAY], plans(1e-6), findings(), tmp_path / "low.png", names=["edema"])
    assert len(coloured(tmp_path / "none.png")) == 0
    assert len(coloured(tmp_path / "low.png")) > 10_000
    black = (pixels(tmp_path / "none.png") < 10).all(axis=2).sum()
    assert black > (pixels(tmp_path / "low.png") < 10).all(axis=2).sum() + 1000


def test_draw_heatmaps_shared_plan_has_a_note(tmp_path):
    """In the line below the views, which is otherwise the same."""
    own = plans(views=2)
    own["fracture"][1] = 1.001
    shared, separate = (
        drawn(tmp_path / f"{name}.png", [GRAY, GRAY], heatmaps=lift)
        for name, lift in (("a", plans(views=2)), ("b", own))
    )
    assert shared.shape == separate.shape
    differs = np.argwhere((shared != separate).any(axis=2))
    assert len(differs) and differs[:, 0].min() > shared.shape[0] * 0.95


def test_draw_heatmaps_views_have_rows_and_masks_outlines(tmp_path):
    mask = np.zeros((96, 96), dtype=bool)
    mask[20:60, 20:60] = True
    one = drawn(tmp_path / "one.png")
    draw_heatmaps(
        [GRAY, GRAY], plans(views=2), findings(), tmp_path / "two.png", names=["edema"], masks={"edema": [mask, mask]}
    )
    assert pixels(tmp_path / "two.png").shape[0] > 1.8 * one.shape[0]
    assert pixels(tmp_path / "two.png").shape[1] == one.shape[1]
    green = [pixel for pixel in coloured(tmp_path / "two.png") if pixel[1] > 200 and pixel[0] < 120]
    assert len(green) > 50


def test_draw_heatmaps_many_findings_wrap_into_rows(tmp_path):
    few = drawn(tmp_path / "few.png", names=FINDINGS[:4])
    many = drawn(tmp_path / "many.png", names=FINDINGS)
    assert many.shape[1] == few.shape[1] and many.shape[0] > 3 * few.shape[0]
    area = (np.abs(few - UNIFORM) <= 2).all(axis=2).sum() / 4
    assert (np.abs(many - UNIFORM) <= 2).all(axis=2).sum() / area == pytest.approx(14, abs=1)
    for picture in (few, many):
        assert (picture[:, -3:] == 255).all() and (picture[-3:] == 255).all()


def test_draw_heatmaps_report_is_above(tmp_path):
    plain = drawn(tmp_path / "plain.png")
    draw_heatmaps([GRAY], plans(), findings(), tmp_path / "text.png", names=["edema"], report="No edema. " * 40)
    assert pixels(tmp_path / "text.png").shape[0] > plain.shape[0] + 100


def test_draw_heatmaps_maps_of_other_views_are_refused(tmp_path):
    with pytest.raises(ValueError, match="heatmaps of edema have 1 views: expected 2"):
        draw_heatmaps([GRAY, GRAY], plans(), findings(), tmp_path / "a.png", names=["edema"])


def test_heatmap_of_a_finding_that_is_not_given_is_drawn(tmp_path):
    states = {name: {"state": "not_given", "probability": None} for name in FINDINGS}
    draw_heatmaps([GRAY], plans(0.0), states, tmp_path / "map.png")
    assert not len(coloured(tmp_path / "map.png"))
