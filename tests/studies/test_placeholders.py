"""Fields that only say that there is no text, in every source."""

import json

import pytest
from datasets import Dataset
from otdrg.studies import load_studies, open_source
from otdrg.studies.build import build_studies_dataset
from otdrg.studies.placeholders import present_text, shown_value
from PIL import Image

PLACEHOLDERS = ["nan", "NaN", "N/A", "n.a.", "#N/A", "<NA>", "None", "none.", "(None)", "null", "NULL", "-", "--", "."]
PLACEHOLDERS += [
    "...",
    "?",
    "___",
    " \t\u00a0",
    "\u200b",
    "No report",
    "No report available.",
    "Not available",
    "nan nan",
]
PLACEHOLDERS += ["123", "1.", "[pending]"]


@pytest.mark.parametrize("text", [*PLACEHOLDERS, "", None])
def test_present_text_placeholder_as_report_is_empty(text):
    assert present_text(text) == present_text(text, "findings") == present_text(text, "impression") == ""


@pytest.mark.parametrize(
    "text", ["Normal.", "Negative", "Clear.", "No acute disease", "None seen.", "Nanoparticles.", "X", "正常"]
)
def test_present_text_short_report_is_kept(text):
    assert present_text(f" {text}\n") == text


@pytest.mark.parametrize("text", ["nan", "None", "None.", "N/A", "-", "not provided", "Unknown"])
def test_present_text_placeholder_as_indication_is_empty(text):
    assert present_text(text, "indication") == ""


def test_present_text_none_as_comparison_is_kept():
    assert [present_text(text, "comparison") for text in ("None.", "None", "None available", "01/02/2003")] == [
        "None.",
        "None",
        "None available",
        "01/02/2003",
    ]
    assert [present_text(text, "comparison") for text in ("nan", "N/A", "-", "null", " ")] == [""] * 5
    assert present_text("65 F", "indication") == "65 F"


@pytest.fixture
def image(tmp_path):
    Image.radial_gradient("L").resize((64, 64)).save(tmp_path / "a.png")
    return tmp_path


def sources(folder, reports):
    """The same reports as a table, an annotation and a dataset; ids are s0, s1, ..."""
    cells = [report.replace('"', '""') for report in reports]
    rows = [f'a.png,s{place},"{cell}",train,nan,N/A' for place, cell in enumerate(cells)]
    table = "image,study_id,report,split,indication,comparison"
    (folder / "t.csv").write_text("\n".join([table, *rows]), encoding="utf-8")
    annotation = [{"id": f"s{p}", "report": text, "image_path": ["a.png"]} for p, text in enumerate(reports)]
    (folder / "t.json").write_text(json.dumps({"train": annotation}))
    columns = {"id": [f"s{place}" for place in range(len(reports))], "report": reports}
    Dataset.from_dict({**columns, "image": ["a.png"] * len(reports)}).save_to_disk(str(folder / "hub"))
    yield open_source("csv", table=folder / "t.csv")
    yield open_source("r2gen", annotation=folder / "t.json", images=folder)
    yield open_source("hub", dataset=str(folder / "hub"), images=str(folder), split_shares=[1.0, 0.0, 0.0])


@pytest.mark.parametrize("place", range(3))
def test_placeholder_reports_are_skipped_and_named_in_every_source(image, place):
    reports = ["nan", "N/A", "None", ".", "Normal chest."]
    source = list(sources(image, reports))[place]
    report = build_studies_dataset(source, image / "built")
    skipped = [json.loads(line) for line in (image / "built" / "skipped.jsonl").read_text().splitlines()]
    assert [(fault["id"], fault["kind"]) for fault in skipped] == [(f"s{i}", "empty report") for i in range(4)]
    assert report.counts["train"].studies == 1


def test_csv_placeholder_row_does_not_differ_from_others(image):
    (image / "t.csv").write_text(
        "image,id,report,split,indication\na.png,s,Normal.,train,nan\na.png,s,nan,train,Fall.\n"
    )
    (row,) = load_studies("csv", table=image / "t.csv")["train"]
    assert (row["report"], row["indication"], len(row["images"])) == ("Normal.", "Fall.", 2)


@pytest.mark.parametrize("report", [{"text": "Jane Doe, normal."}, ["Jane Doe"], 7061954])
def test_r2gen_non_string_report_is_named_by_type(image, report):
    studies = [{"id": "s0", "report": report, "image_path": ["a.png"]}]
    studies += [{"id": report, "report": "Normal chest.", "image_path": ["a.png"]}]
    studies += [{"id": "s2", "report": "Normal chest.", "image_path": [report]}]
    studies += [{"id": "s3", "report": "Normal chest.", "image_path": ["a.png"]}]
    (image / "t.json").write_text(json.dumps({"train": studies}))
    build_studies_dataset(open_source("r2gen", annotation=image / "t.json", images=image), image / "built")
    skipped = (image / "built" / "skipped.jsonl").read_text()
    reason = json.loads(skipped.splitlines()[0])["reason"]
    assert reason.endswith(f"train[0] has report of type {type(report).__name__}: expected a string")
    assert "Jane" not in skipped
    assert "7061954" not in "".join(json.loads(line)["reason"] for line in skipped.splitlines())


def test_csv_text_in_the_wrong_cell_is_not_quoted(image):
    (image / "t.csv").write_text("image,split,report\na.png,Jane Doe has pneumonia.,x y\na.png,train,Normal chest.\n")
    build_studies_dataset(open_source("csv", table=image / "t.csv"), image / "built")
    skipped = (image / "built" / "skipped.jsonl").read_text()
    assert "Jane" not in skipped and "split is a text of 23 characters: expected one of train" in skipped
    assert shown_value("trian") == "'trian'"
