"""The checkpoint in the repository loads as users load it, and writes what it wrote when it was published."""

import json
from pathlib import Path

import otdrg
import pytest
import torch
from otdrg.hub_card.card import build_card
from otdrg.studies.phantom import make_phantom
from transformers import pipeline

ROOT = Path(otdrg.__file__).parent
CHECKPOINT = ROOT / "checkpoints" / "otdrg-iu-xray"
pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="an installed package has no checkpoints")


def test_checkpoint_is_small_and_carries_the_code_of_the_repository():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 64 * 2**20
    code = {path.name for path in ROOT.glob("*_otdrg.py")}
    assert {path.name for path in CHECKPOINT.glob("*_otdrg.py")} == code
    for name in code:
        assert (CHECKPOINT / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_checkpoint_card_is_what_the_template_gives(tmp_path):
    build_card(CHECKPOINT, "otdrg/otdrg-iu-xray").save(tmp_path / "README.md")
    assert (CHECKPOINT / "README.md").read_text(encoding="utf-8") == (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )


def test_checkpoint_reports_of_five_phantoms_are_unchanged():
    # In float32, because 16-bit arithmetic differs between processors.
    pipe = pipeline("image-to-text", model=str(CHECKPOINT), trust_remote_code=True, dtype=torch.float32)
    assert pipe.model.generation_config.consensus["candidates"] == 32
    studies = [[make_phantom(7, index, image_size=256).images[0]] for index in range(5)]
    found = [record[0] for record in pipe(studies, candidates=1, batch_size=5)]
    expected = json.loads((Path(__file__).parent / "checkpoint_reports.json").read_text(encoding="utf-8"))
    assert [record["generated_text"] for record in found] == [study["report"] for study in expected]
    for record, study in zip(found, expected, strict=True):
        assert {name: finding["state"] for name, finding in record["findings"].items()} == study["states"]
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens and 95 new ones: expected at most 256 together"):
        pipe(studies[0], indication="S P C A B G " * 40)
