"""What the demo's page is made of, without a browser."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from otdrg import FINDINGS, ReportGenerationPipeline
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")

from otdrg.hub_card.space.findings_table import table_rows, table_states
from otdrg.hub_card.space.uploads import phantom_examples, read_uploads
from otdrg.hub_card.space.writing import stream_report

FEW = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def pipe(model, processor):
    return ReportGenerationPipeline(model=model, processor=processor)


@pytest.fixture
def study(views):
    return [Image.fromarray(view).convert("RGB") for view in views[:2]]


def test_a_stream_ends_with_what_the_pipeline_gives(pipe, study):
    *so_far, record = stream_report(pipe, study, "Cough.", {"edema": "positive"}, **FEW)
    wanted = pipe({"images": study, "indication": "Cough."}, findings={"edema": "positive"}, num_beams=1, **FEW)[0]
    assert record["generated_text"] == wanted["generated_text"]
    assert record["findings"] == wanted["findings"]
    assert so_far and all(record["generated_text"].startswith(text) for text in so_far)


def test_an_error_ends_the_stream_and_is_raised(pipe, study):
    with pytest.raises(ValueError, match="unknown finding 'oedema'"):
        list(stream_report(pipe, study, findings={"oedema": "positive"}, **FEW))


def test_a_stream_that_is_left_stops_the_model(pipe, study):
    threads = threading.active_count()
    hook = pipe.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    start = time.monotonic()
    try:
        report = stream_report(pipe, study, max_new_tokens=200)
        next(report)
        report.close()
    finally:
        hook.remove()
    assert threading.active_count() == threads
    assert time.monotonic() - start < 5  # 200 tokens take 10 seconds


def record(**states):
    findings = {name: {"state": states.get(name, "negative"), "probability": 0.5} for name in FINDINGS}
    findings["no_finding"]["state"] = "unmentioned"
    apart = {"finding": "edema", "told": "negative", "said": "positive", "kind": "contradicted"}
    return {"generated_text": "Edema.", "findings": findings, "contradictions": [apart]}


def test_the_table_is_the_record_and_back():
    rows = table_rows(record(fracture="unclear"), steerable=True)
    assert [row["finding"] for row in rows] == list(FINDINGS)
    edema, fracture, nothing = (rows[FINDINGS.index(name)] for name in ("edema", "fracture", "no_finding"))
    assert (edema["kind"], edema["state"], edema["said"]) == ("contradicted", "negative", "positive")
    assert (fracture["kind"], fracture["said"]) == ("", "unclear")
    assert (nothing["choices"], nothing["said"]) == (["unmentioned", "positive"], "")
    assert table_states(rows)["fracture"] == "unclear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "there are no states yet"),
        (lambda rows: [{**row, "state": "maybe"} for row in rows], "unknown finding state 'maybe'"),
        (lambda rows: [{**row, "state": "negative"} for row in rows], "not possible for no_finding"),
        (lambda rows: [{**row, "finding": "gout"} for row in rows], "unknown finding 'gout'"),
        (lambda rows: rows[:5], "the table has 5 findings: expected 14"),
        (lambda rows: ["edema"], "the table of findings is damaged"),
        (lambda rows: "edema", "the table of findings is damaged"),
        (lambda rows: 7, "the table of findings is damaged"),
        (lambda rows: [{"finding": ["edema"], "state": "positive"}], "the table of findings is damaged"),
    ],
)
def test_a_table_that_was_tampered_with_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        table_states(change(table_rows(record(), steerable=True)))


def test_uploads_are_deleted_read_or_not(views, tmp_path):
    def upload(name, data=None):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        if data is None:
            Image.fromarray(views[0]).save(folder / name)
        else:
            (folder / name).write_bytes(data)
        return str(folder / name)

    (frontal,) = read_uploads([upload("frontal.png")], [], 10_000)
    assert frontal.name == "frontal.png"
    np.testing.assert_array_equal(np.asarray(frontal.image)[..., 0], views[0])
    both = read_uploads([upload("lateral.png")], [frontal], 10_000)
    assert [view.name for view in both] == ["frontal.png", "lateral.png"]
    bad = [upload("note.png", b"not an image"), upload("behind.png")]
    with pytest.raises(ValueError, match=r"^note.png: not an image"):
        read_uploads(bad, [], 10_000)
    with pytest.raises(ValueError, match="3 views, 2 of them here already"):
        read_uploads([upload("third.png")], both, 10_000)
    with pytest.raises(ValueError, match=r"^large.png: 64x64 pixels, expected at most 100"):
        read_uploads([upload("large.png")], [], 100)
    assert list(tmp_path.rglob("*")) == []


def test_examples_are_phantoms_with_what_they_are_called():
    examples = phantom_examples(64)
    assert {len(example.views) for example in examples} == {1, 2}
    assert all(view.image.size == (64, 64) for example in examples for view in example.views)
    assert not [path for path in Path(__file__).parents[2].glob("hub_card/**/*") if path.suffix in (".png", ".jpg")]
