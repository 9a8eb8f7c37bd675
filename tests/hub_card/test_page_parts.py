"""Parts of the demo's page, without a browser."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from otdrg import FINDINGS, ReportGenerationPipeline
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")

import gradio as gr
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES
from otdrg.hub_card.space.interface import Visitor, Written, _Page
from otdrg.hub_card.space.results import contradiction_list, findings_table, runners_up_table
from otdrg.hub_card.space.uploads import phantom_examples, read_uploads
from otdrg.hub_card.space.writing import stream_report

FEW = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def pipe(model, processor):
    return ReportGenerationPipeline(model=model, processor=processor)


@pytest.fixture
def study(views):
    return [Image.fromarray(view).convert("RGB") for view in views[:2]]


def test_stream_report_ends_with_the_pipelines_record(pipe, study):
    *so_far, record = stream_report(pipe, study, "Cough.", {"edema": "positive"}, **FEW)
    wanted = pipe({"images": study, "indication": "Cough."}, findings={"edema": "positive"}, num_beams=1, **FEW)[0]
    assert record["generated_text"] == wanted["generated_text"]
    assert record["findings"] == wanted["findings"]
    assert so_far and all(record["generated_text"].startswith(text) for text in so_far)


def test_stream_report_of_candidates_ends_with_the_best_ones(pipe, study):
    (record,) = stream_report(pipe, study, candidates=6, max_new_tokens=8)
    wanted = pipe([study], candidates=6, max_new_tokens=8, return_candidates=5)[0][0]
    assert record["candidates"] == wanted["candidates"]
    assert record["candidates"][0]["report"] == record["generated_text"] == wanted["generated_text"]
    table = runners_up_table(record).splitlines()
    assert table[2] == "| Score | Origin | Report |" and len(table) == 4 + len(record["candidates"])
    assert runners_up_table({"candidates": []}) == runners_up_table({}) == ""


def test_stream_report_error_is_raised(pipe, study):
    with pytest.raises(ValueError, match="unknown finding 'oedema'"):
        list(stream_report(pipe, study, findings={"oedema": "positive"}, **FEW))


def test_stream_report_closed_stops_the_model(pipe, study):
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


def test_page_shows_each_section_below_its_heading(build_model, study):
    model, processor = build_model(report_sections=["findings", "impression"])
    page = _Page(ReportGenerationPipeline(model=model, processor=processor), 8, None)
    with gr.Blocks():
        page.lay_out_study()
        page.lay_out_report()
    (written,) = page.pipe([study], max_new_tokens=8)[0]
    written |= {"generated_text": "Findings: Clear. Impression: Normal.", "findings_section": "Clear."}
    shown = page.show(Visitor(written=Written([], written, "")))
    assert shown[page.report] == "Findings:\nClear.\n\nImpression:\nNormal."
    assert json.loads(shown[page.record_text])["findings_section"] == "Clear."


def record(**states):
    findings = {name: {"state": states.get(name, "negative"), "probability": 0.5} for name in FINDINGS}
    findings["no_finding"]["state"] = "unmentioned"
    edema = {"finding": "edema", "said": "positive", "kind": "contradicted"}
    fracture = {"finding": "fracture", "said": "unmentioned", "kind": "omitted"}
    return {
        "generated_text": "Edema.",
        "complete": False,
        "findings": findings,
        "contradictions": [fracture, edema],
    }


def test_findings_table_marks_contradicted_rows():
    rows = findings_table(record(fracture="unclear"), steerable=True).splitlines()[2:16]
    assert [row.split(" | ")[0].strip("|*⚠ ") for row in rows] == list(FINDING_DISPLAY_NAMES.values())
    edema, fracture, nothing = (rows[FINDINGS.index(name)] for name in ("edema", "fracture", "no_finding"))
    assert edema == "| **⚠ Edema** | **negative** | **0.50** | **positive (contradicted)** |"
    assert fracture == "| Fracture | unclear | 0.50 | unmentioned (omitted) |"
    assert nothing == "| No Finding | unmentioned | 0.50 |  |"


def test_contradiction_list_contradictions_come_first():
    lines = contradiction_list(record(fracture="unclear")).splitlines()
    assert lines[0] == "The report was cut off at the maximum number of tokens."
    assert lines[-2:] == [
        "- **Edema, contradicted: state negative, the report says positive**",
        "- Fracture, omitted: state unclear, the report does not mention it",
    ]
    agreeing = {**record(), "complete": True, "contradictions": []}
    assert contradiction_list(agreeing) == "The report agrees with the state of every finding."


def test_read_uploads_deletes_files_read_or_not(views, tmp_path):
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
    bad = [upload("note.png", b"not an image"), upload("second.png")]
    with pytest.raises(ValueError, match=r"^note.png: not an image"):
        read_uploads(bad, [], 10_000)
    with pytest.raises(ValueError, match="3 views, 2 of them already in the study"):
        read_uploads([upload("third.png")], both, 10_000)
    with pytest.raises(ValueError, match=r"^large.png: 64x64 pixels, expected at most 100"):
        read_uploads([upload("large.png")], [], 100)
    assert list(tmp_path.rglob("*")) == []


def test_phantom_examples_have_one_or_two_views():
    examples = phantom_examples(64)
    assert {len(views) for views in examples.values()} == {1, 2}
    assert all(view.image.size == (64, 64) for views in examples.values() for view in views)
    assert not [path for path in Path(__file__).parents[2].glob("hub_card/**/*") if path.suffix in (".png", ".jpg")]
