"""Comparisons with earlier studies are read where a report mentions one, and only there."""

import csv
import json
import shutil

import numpy as np
import pytest
from otdrg.cli import main
from otdrg.labelers.phrases import VOCABULARY
from otdrg.metrics import score_reports
from otdrg.metrics.comparisons import ComparisonReader, comparison_reader

COMPARED = [
    "The heart size is unchanged.",
    "stable cardiomegaly . no pneumothorax .",
    "Small left effusion, increased since the previous study.",
    "Compared to the prior examination, the effusion is smaller.",
    "In comparison with the study of yesterday, the tube is lower.",
    "No interval change.",
    "No significant change in the right effusion.",
    "No new focal consolidation.",
    "The effusion has not improved.",
    "Interval removal of the left chest tube.",
    "Again noted is a calcified granuloma.",
    "The previously seen nodule is not visualized.",
    "The right pneumothorax has resolved.",
    "The pneumothorax is no longer seen.",
    "Persistent left basilar opacity.",
    "The opacity is similar to prior.",
    "Redemonstration of a tortuous aorta.",
    "Mild edema, worsened.",
    "The nodule was present on the prior CT.",
    "The heart remains enlarged.",
    "Unchanged from prior. Recommend follow-up to document resolution.",
    "This may be age indeterminate as no prior studies are available. Stable scarring.",
]
NOT_COMPARED = [
    "",
    "The heart is normal in size. The lungs are clear.",
    "No prior for comparison.",
    "No prior studies are available for comparison.",
    "Comparison: None.",
    "There are no previous examinations to compare with.",
    "Prior radiographs are not available.",
    "No films were available for direct comparison.",
    "Without prior studies the age of the fracture cannot be determined.",
    "Recommend comparison with prior studies.",
    "Comparison with prior radiographs would be helpful.",
    "Correlate with prior imaging if available.",
    "Follow-up radiographs to document resolution are recommended.",
    "Short interval follow-up is advised.",
    "If prior studies are available, the nodule can be judged better.",
    "Degenerative changes of the spine.",
    "Increased interstitial markings.",
    "Sequela of prior granulomatous disease.",
    "Median sternotomy wires from prior surgery.",
    "The right lung is denser compared to the left.",
    "The patient is hemodynamically stable.",
]


@pytest.mark.parametrize(("reports", "expected"), [(COMPARED, True), (NOT_COMPARED, False)])
def test_comparison_reader_reads_statements_only(reports, expected):
    found = comparison_reader()(reports)
    assert found.dtype == bool and found.shape == (len(reports),)
    assert [report for report, one in zip(reports, found, strict=True) if one != expected] == []


def test_comparison_reader_case_and_cleaning_change_nothing():
    cleaned = [report.lower().replace(",", "").replace(".", " .").replace("-", " ") for report in COMPARED]
    assert comparison_reader()(cleaned).all() and comparison_reader()([report.upper() for report in COMPARED]).all()


def test_comparisons_are_shares_with_intervals():
    predictions = [COMPARED[0], COMPARED[1], NOT_COMPARED[1], NOT_COMPARED[2]]
    references = [COMPARED[2], NOT_COMPARED[1], COMPARED[3], NOT_COMPARED[1]]
    found = score_reports(predictions, references, metrics=["comparisons"])
    assert found.scores == {"invented_comparisons": 0.5, "unshared_comparisons": 0.25}
    assert found.per_study == {"invented_comparisons": [1, 1, 0, 0], "unshared_comparisons": [0, 1, 0, 0]}
    assert found.details["comparisons_in_references"] == 0.5
    drawn = found.statistics.aggregates(np.array([[4.0, 0, 0, 0], [0, 0, 4, 0]]))
    assert drawn["invented_comparisons"].tolist() == [1, 0]


def test_comparisons_are_in_the_output_of_otdrg_score(tmp_path, capsys):
    with (tmp_path / "reports.csv").open("w", newline="") as file:
        rows = [("id", "greedy", "reference"), (1, COMPARED[0], NOT_COMPARED[1]), (2, NOT_COMPARED[1], NOT_COMPARED[1])]
        csv.writer(file).writerows(rows)
    typed = ["score", "--predictions", str(tmp_path / "reports.csv"), "--prediction-column", "greedy"]
    assert main([*typed, "--bootstrap", "0", "--metrics", "comparisons", "--output", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    shares = {"invented_comparisons": 0.5, "unshared_comparisons": 0.5, "comparisons_in_references": 0.0}
    assert result == shares
    assert "| invented comparisons | 0.500 |" in capsys.readouterr().out


def test_comparison_reader_wrong_vocabulary_names_the_file(tmp_path):
    folder = shutil.copytree(VOCABULARY, tmp_path / "words")
    (folder / "comparisons.yaml").write_text("changes: [new]\n")
    with pytest.raises(ValueError, match=r"comparisons\.yaml: expected exactly the keys changes, priors, absent, "):
        ComparisonReader(folder)
