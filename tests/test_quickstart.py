"""What `make quickstart` concludes from a table of scores."""

import runpy
from pathlib import Path

import otdrg
import pytest


@pytest.fixture(scope="module")
def quickstart():
    return runpy.run_path(str(Path(otdrg.__file__).parent / "examples" / "quickstart.py"))


@pytest.fixture
def check(quickstart):
    """A function from the scores of the model, of shuffled images and of the best constant report to the status."""

    def run(model, shuffled, constant):
        rows = {"model": model, "images shuffled across studies": shuffled, "best constant report": constant}
        rows = {name: dict(zip(quickstart["COLUMNS"], scores, strict=True)) for name, scores in rows.items()}
        return quickstart["check"]({"studies": 9, "labeler": "rules", "rows": rows})

    return run


def test_quickstart_model_above_constant_passes(check, capsys):
    assert check([0.5] * 4, [0.1] * 4, [0.3] * 4) == 0
    assert "The model uses the image" in capsys.readouterr().out


def test_quickstart_one_score_below_constant_fails(check, capsys):
    assert check([0.5, 0.5, 0.2, 0.5], [0.1] * 4, [0.3] * 4) == 1
    assert "does not beat the best constant report in CIDEr" in capsys.readouterr().out


def test_quickstart_shuffled_images_above_constant_fails(check, capsys):
    assert check([0.5] * 4, [0.4, 0.1, 0.1, 0.1], [0.3] * 4) == 1
    assert "still beats the best constant report in BLEU-4" in capsys.readouterr().out
