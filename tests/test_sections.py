"""Reports of two sections: joined, split again, cleaned, and returned apart by the pipeline."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from otdrg import OTDRGConfig, ReportGenerationPipeline
from otdrg.inference.digests import model_digest
from otdrg.labelers import load_labeler
from otdrg.sections_otdrg import (
    HEADINGS,
    has_sections,
    join_sections,
    lay_out_sections,
    split_sections,
    without_headings,
)
from otdrg.studies import load_studies
from otdrg.studies.cleaning import clean_report, clean_sections

BOTH = "Findings: Clear lungs. Impression: Normal."


@pytest.mark.parametrize(
    ("report", "findings", "impression", "has_headings"),
    [
        (BOTH, "Clear lungs.", "Normal.", True),
        ("findings : clear lungs .\nimpression : normal .", "clear lungs .", "normal .", True),
        ("Findings: Clear lungs.", "Clear lungs.", "", True),
        ("Impression: Normal.", "", "Normal.", True),
        ("Findings: Impression: Normal.", "", "Normal.", True),
        ("Clear lungs. Impression: Normal.", "Clear lungs. Impression: Normal.", "", False),
        ("Impression: Normal. Findings: Clear.", "Impression: Normal. Findings: Clear.", "", False),
        ("Findings: a Impression: b Impression: c", "Findings: a Impression: b Impression: c", "", False),
        ("The findings are those of the impression.", "The findings are those of the impression.", "", False),
        ("", "", "", False),
    ],
)
def test_split_sections_without_proper_headings_is_all_findings(report, findings, impression, has_headings):
    assert split_sections(report) == (findings, impression, has_headings)


def test_join_sections_takes_headings_out_of_the_sections():
    joined = join_sections("FINDINGS: Clear. Impression: see below", "Change from the findings:: none")
    assert joined == "Findings: Clear. Impression see below Impression: Change from the findings none"
    assert split_sections(joined)[:2] == ("Clear. Impression see below", "Change from the findings none")
    assert join_sections("Clear.", " ") == "Findings: Clear." and join_sections("", "") == ""


pieces = st.lists(
    st.sampled_from([*HEADINGS.values(), "findings", "impression", ":", "::", " ", "\n", "x.", "IMPRESSION :"])
)


@given(pieces.map("".join), pieces.map("".join))
def test_split_sections_gives_what_join_sections_was_given(findings, impression):
    joined = join_sections(findings, impression)
    split = split_sections(joined)
    assert split.has_headings == bool(joined)
    assert join_sections(*split[:2]) == joined
    for text, found in zip((findings, impression), split[:2], strict=True):
        assert text.count("x") == found.count("x")


def test_has_sections_needs_headings_everywhere_and_both_sections_once():
    assert has_sections([BOTH, "Findings: Clear.", "Impression: Normal."])
    assert not has_sections([BOTH, "Clear."])
    assert not has_sections(["Findings: Clear.", "Findings: Clear lungs."])
    assert not has_sections([])


def test_headings_are_left_out_for_comparison_and_set_apart_for_people():
    assert without_headings(BOTH) == "Clear lungs. Normal."
    assert lay_out_sections(BOTH) == "Findings:\nClear lungs.\n\nImpression:\nNormal."
    assert without_headings("a. Impression: b") == lay_out_sections("a. Impression: b") == "a. Impression: b"


@pytest.mark.parametrize("style", ["r2gen_iu", "r2gen_mimic"])
def test_clean_sections_keeps_the_headings_that_clean_report_removes(style):
    assert clean_sections(BOTH, style) == "Findings: clear lungs . Impression: normal ."
    assert clean_sections("Findings: 1. Clear.", style) == "Findings: clear ."
    assert clean_sections("Clear: lungs.", style) == clean_report("Clear: lungs.", style)
    assert clean_sections(BOTH, "none") == BOTH


@pytest.mark.parametrize("cleaning", ["none", "r2gen_iu"])
def test_labeler_reads_the_same_states_with_and_without_headings(cleaning):
    studies = load_studies("phantom", sections="findings+impression", train=60, validation=0, test=0, image_size=32)
    reports = [clean_sections(report, cleaning) for report in studies["train"]["report"]]
    assert has_sections(reports)
    labeler = load_labeler("rules")
    states = labeler.label(reports)
    assert (states == labeler.label([without_headings(report) for report in reports])).all()
    assert states.tolist() == list(studies["train"]["finding_states"])


def test_config_report_sections_are_both_or_none(build_config, tmp_path):
    build_config(report_sections=["findings", "impression"]).save_pretrained(tmp_path)
    assert OTDRGConfig.from_pretrained(tmp_path).report_sections == ["findings", "impression"]
    with pytest.raises(ValueError, match=r"report_sections=\['impression'\]: expected \['findings', 'impression'\]"):
        build_config(report_sections=["impression"])


def test_pipeline_of_sections_returns_them_apart(build_model, view, monkeypatch):
    model, processor = build_model()
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    (plain,) = pipe(view(0), max_new_tokens=8)
    assert "impression" not in plain and "findings_section" not in plain
    before = model_digest(model, processor)
    model.config.report_sections = ["findings", "impression"]
    assert model_digest(model, processor) == before, "stored reports stay valid"
    (record,) = pipe(view(0), max_new_tokens=8)
    # An untrained model writes no heading.
    assert record["generated_text"] == plain["generated_text"] == record["findings_section"] != ""
    assert record["impression"] == "" and set(record["findings"]) == set(plain["findings"])
    monkeypatch.setattr(processor, "batch_decode", lambda ids, **_: [f" {BOTH}"] * len(ids))
    for (record,) in pipe([[view(0)], [view(1)]], batch_size=2, max_new_tokens=8):
        assert record["generated_text"] == BOTH
        assert (record["findings_section"], record["impression"]) == ("Clear lungs.", "Normal.")
