"""The rules labeler: CheXpert's rules on sentences of our own, robustness, and agreement on the real labels."""

import csv
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import otdrg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
from otdrg.labelers import LABELERS, load_labeler, load_vocabulary, read_states
from otdrg.labelers.phrases import VOCABULARY, expand_phrase, load_mistakes
from otdrg.labelers.rules import RulesLabeler
from otdrg.labelers.sentences import split_sentences

LABELER = load_labeler("rules")


def named(report):
    """The mentioned findings of a report, by name."""
    row = LABELER.label([report])[0]
    return {name: FINDING_STATES[state] for name, state in zip(FINDINGS, row, strict=True) if state}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Heart size is normal.", {"cardiomegaly": "negative", "no_finding": "positive"}),
        ("The heart is enlarged.", {"cardiomegaly": "positive"}),
        ("The heart is not enlarged.", {"cardiomegaly": "negative", "no_finding": "positive"}),
        ("The heart may be enlarged.", {"cardiomegaly": "unclear"}),
        (
            "The cardiomediastinal silhouette is normal.",
            {"enlarged_cardiomediastinum": "negative", "no_finding": "positive"},
        ),
        ("Stable cardiomediastinal silhouette.", {"enlarged_cardiomediastinum": "unclear"}),
        (
            "Normal and stable mediastinal contours.",
            {"enlarged_cardiomediastinum": "negative", "no_finding": "positive"},
        ),
        (
            "Normal heart size, widened mediastinum.",
            {"cardiomegaly": "negative", "enlarged_cardiomediastinum": "positive"},
        ),
        (
            "Stable cardiomediastinal silhouette with normal heart size.",
            {"enlarged_cardiomediastinum": "unclear", "cardiomegaly": "negative"},
        ),
        (
            "No pneumothorax, pleural effusion, or focal consolidation.",
            {
                "pneumothorax": "negative",
                "pleural_effusion": "negative",
                "consolidation": "negative",
                "no_finding": "positive",
            },
        ),
        (
            "No pneumothorax, but there is a small effusion.",
            {"pneumothorax": "negative", "pleural_effusion": "positive"},
        ),
        (
            "No pneumothorax, small left pleural effusion.",
            {"pneumothorax": "negative", "pleural_effusion": "positive"},
        ),
        ("Pneumonia cannot be excluded.", {"pneumonia": "unclear"}),
        ("Possible pneumonia.", {"pneumonia": "unclear"}),
        ("No opacity to suggest pneumonia.", {"lung_opacity": "negative", "pneumonia": "negative"}),
        ("Opacity may represent atelectasis.", {"lung_opacity": "positive", "atelectasis": "unclear"}),
        ("Edema versus pneumonia.", {"edema": "unclear", "pneumonia": "unclear"}),
        ("No significant change in the effusion.", {"pleural_effusion": "positive"}),
        ("The effusion has resolved.", {"pleural_effusion": "negative"}),
        ("Possible edema. Edema is present. No edema.", {"edema": "positive"}),
        ("Possible edema. No edema.", {"edema": "unclear"}),
        ("A pacemaker is present. The heart is normal in size.", {"support_devices": "positive"}),
        ("Lungs are clear. Degenerative changes of the spine.", {}),
        ("no pneumothorax . a right sided catheter is seen .", {"pneumothorax": "negative"}),
        ("Clear lungs.", {"no_finding": "positive"}),
        ("Heart is enlarged.", {"cardiomegaly": "positive"}),
        ("The heart is top normal in size.", {"cardiomegaly": "negative"}),
        ("Heart size is at the upper limits of normal.", {"cardiomegaly": "negative"}),
        ("Heart size is upper limits of normal.", {"cardiomegaly": "positive"}),
        ("Borderline heart size.", {"cardiomegaly": "unclear"}),
        ("The heart and aorta were compared with before.", {"cardiomegaly": "positive"}),
        ("Normal heart, mediastinum, and vessels.", {"enlarged_cardiomediastinum": "negative"}),
        ("Normal heart size, stable mediastinal contours.", {"enlarged_cardiomediastinum": "negative"}),
        ("Large heart size, stable mediastinal contours.", {"enlarged_cardiomediastinum": "unclear"}),
        ("The mediastinum is obscured.", {"enlarged_cardiomediastinum": "unclear"}),
        ("A nodular opacity is new.", {"lung_lesion": "positive", "lung_opacity": "positive"}),
        ("Fibrosis versus some other thing.", {"pleural_other": "unclear"}),
        ("Opacity in the right base, possibly consistent with pneumonia.", {"pneumonia": "unclear"}),
        ("No new consolidation.", {"consolidation": "unclear"}),
        ("Cannot exclude edema, and no effusion.", {"edema": "unclear"}),
        ("Mild vascular congestion.", {"edema": "unclear"}),
        ("Heart failure.", {"edema": "positive", "cardiomegaly": "unclear"}),
        ("A 2.5 cm nodule vs. a vessel.", {"lung_lesion": "unclear"}),
        (
            "1. No effusion.\n2. Right-sided air-space disease.",
            {"pleural_effusion": "negative", "lung_opacity": "positive"},
        ),
        ("No\x00 effusion\tor\x0bpneumothorax.", {"pleural_effusion": "negative", "pneumothorax": "negative"}),
    ],
)
def test_rules_report_gives_the_expected_states(report, expected):
    found = named(report)
    assert expected.items() <= found.items()
    mentioned = {"no_finding"} & found.keys()
    assert not mentioned or not any(
        state in ("positive", "unclear") and name not in ("no_finding", "support_devices")
        for name, state in found.items()
    )


@pytest.mark.parametrize(
    ("report", "finding"),
    [
        ("A clip is seen over the heart.", "cardiomegaly"),
        ("A hernia lies behind the mediastinum.", "enlarged_cardiomediastinum"),
        ("Irregular rib contours.", "enlarged_cardiomediastinum"),
        ("A calcified nodule is seen.", "lung_lesion"),
        ("Endplate changes. Old tuberculosis. Kerley B lines.", "support_devices"),
        ("A pericardial effusion.", "pleural_effusion"),
    ],
)
def test_rules_similar_phrase_is_no_mention(report, finding):
    assert finding not in named(report)


def test_rules_no_finding_depends_on_other_findings():
    assert named("Lungs are normal. Right catheter.")["no_finding"] == "positive"
    assert "no_finding" not in named("Lungs are normal. Scoliosis.")
    assert "no_finding" not in named("Lungs are normal. Possible pneumonia.")
    assert named("Lungs are normal. No scoliosis.")["no_finding"] == "positive"


def sentences():
    """(sentence, expected) of sentences.tsv."""
    for line in (Path(__file__).parent / "sentences.tsv").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("# "):
            sentence, expected = line.split("\t")
            yield sentence.replace("\\n", "\n"), expected


@pytest.mark.filterwarnings("ignore::otdrg.labelers.UnreadReportsWarning")
def test_rules_sentences_give_the_states_of_the_table():
    rows = list(sentences())
    wrong = []
    for (sentence, expected), row in zip(rows, LABELER.label([sentence for sentence, _ in rows]), strict=True):
        for part in expected.split(", "):
            finding, states = part.split("=")
            found = FINDING_STATES[row[FINDINGS.index(finding)]]
            if found not in states.split("|"):
                wrong.append(f"{sentence!r}: {finding} is {found}, expected {states}")
    assert len(rows) > 600 and not wrong, "\n".join(wrong)


def test_rules_no_finding_outside_a_negation_is_unmentioned():
    assert "no_finding" not in named("There is no pneumothorax and the heart is enlarged.")
    assert named("Pneumothorax: none. Lines and tubes: none.")["no_finding"] == "positive"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_rules_wrapped_report_gives_the_states_of_the_unwrapped_one(width):
    report = (
        "PA and lateral views of the chest were obtained. There is no focal consolidation, large pleural effusion, "
        "pulmonary edema or pneumothorax on this examination. The endotracheal tube terminates above the carina. "
        "The cardiac silhouette is moderately enlarged and there may be a nondisplaced fracture of the left sixth rib."
    )
    assert named(textwrap.fill(report, width)) == named(report)


@pytest.mark.parametrize("bullet", ["- ", "* ", "• ", "1. ", "2) ", "(a) ", "– ", "·", ""])
def test_rules_list_items_are_sentences(bullet):
    items = ("No pleural effusion", "Mild pulmonary edema", "Left chest tube", "Pneumothorax: none")
    found = named("\n".join(bullet + item for item in items))
    expected = {"pleural_effusion": "negative", "edema": "positive"}
    assert found == expected | {"support_devices": "positive", "pneumothorax": "negative"}


def test_split_sentences_head_is_prepended_to_items():
    assert split_sentences("No evidence of:\n- edema\n- effusion\n\nFracture.")[:3] == [
        "no evidence of: edema",
        "no evidence of: effusion",
        "fracture",
    ]


REPORTS = st.lists(
    st.sampled_from(
        ["no", "possible", "effusion", "edema", "heart size", "is normal", "enlarged", "or", "but", ",", ".", "xxxx"]
    ),
    max_size=20,
).map(" ".join) | st.text(max_size=60)


@settings(max_examples=100, deadline=None)
@given(st.lists(REPORTS, max_size=5))
def test_rules_batch_equals_single_reports(reports):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        batch = LABELER.label(reports)
        assert batch.shape == (len(reports), 14)
        assert batch.dtype == np.int64
        assert set(batch[:, FINDINGS.index("no_finding")]) <= {0, 1}
        for row, report in zip(batch, reports, strict=True):
            np.testing.assert_array_equal(row, LABELER.label([report])[0])
            np.testing.assert_array_equal(row, LABELER.label([f"  {report.upper()}\n"])[0] if report.isascii() else row)


def test_rules_unreadable_reports_are_counted():
    with pytest.warns(UserWarning, match=r"2 of 3 reports \(positions 0, 2\) hold no word"):
        states = LABELER.label(["", "Heart size is normal.", "Der Befund liegt bei."])
    assert not states[[0, 2]].any()
    assert states[1].any()


def test_rules_wrong_types_are_named():
    with pytest.raises(ValueError, match="report 1 is NoneType"):
        LABELER.label(["Clear.", None])
    with pytest.raises(TypeError, match="single string"):
        LABELER.label("Clear.")
    with pytest.raises(ValueError, match="unknown labeler 'nobody': expected one of rules"):
        load_labeler("nobody")
    assert "rules" in LABELERS


def test_rules_very_long_report_is_read():
    begin = time.perf_counter()
    assert named("There is no effusion , " * 2500 + "and there is edema .")["edema"] == "positive"
    assert named("effusion or edema not seen " * 2500)["edema"] == "negative"
    assert named("... " * 10_000 + "2.2" * 10_000 + " edema")["edema"] == "positive"
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    "repeated", ["effusion, edema, ", "effusion possible ", "no acute ", "effusion: none ", "- edema\n"]
)
def test_rules_time_is_proportional_to_length(repeated):
    begin = time.perf_counter()
    LABELER.label([repeated * 5000])
    assert time.perf_counter() - begin < 10


def test_rules_cache_does_not_change_labels():
    report = "Possible edema. No effusion."
    used = RulesLabeler()
    used.label(["Possible edema.", "No effusion. Edema.", report])
    np.testing.assert_array_equal(used.label([report]), RulesLabeler().label([report]))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(used)).label([report]), used.label([report]))


def test_rules_import_no_torch():
    code = "import sys; from otdrg.labelers import load_labeler; load_labeler('rules').label(['Edema.']); "
    code += "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_expand_phrase_expands_alternatives():
    assert expand_phrase("(a|b|) c*") == ["a c*", "b c*", "c*"]
    assert expand_phrase("(fracture|fx)*") == ["fracture*", "fx*"]
    for wrong in ("a (b|(c|d))", "A", "a* b", "a | b", "(a", "(|a)", "-"):
        with pytest.raises(ValueError, match="phrase"):
            expand_phrase(wrong)


def test_rules_vocabulary_can_be_extended(tmp_path):
    folder = shutil.copytree(VOCABULARY, tmp_path / "words")
    findings = folder / "findings.yaml"
    findings.write_text(findings.read_text().replace("    - cardiomegaly\n", "    - cardiomegaly\n    - cor bovinum\n"))
    row = RulesLabeler(vocabulary=folder).label(["There is no cor bovinum."])[0]
    assert row[FINDINGS.index("cardiomegaly")] == FINDING_STATES.index("negative")


def test_rules_broken_vocabulary_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"findings\.yaml: cannot be read"):
        RulesLabeler(vocabulary=tmp_path)
    folder = shutil.copytree(VOCABULARY, tmp_path / "words")
    (folder / "cues.yaml").write_text("normal: [fine]\n")
    with pytest.raises(ValueError, match=r"cues\.yaml: expected exactly the keys"):
        RulesLabeler(vocabulary=folder)
    (folder / "chexpert_mistakes.yaml").write_text("- {finding: edema, state: maybe, why: so, phrases: [a]}\n")
    with pytest.raises(ValueError, match=r"chexpert_mistakes\.yaml: entry 1: .* no state 'maybe'"):
        load_mistakes(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("clauses.yaml", "verbs: [is]\n", "expected exactly the keys verbs"),
        ("spelling.yaml", "- oedema\n", "expected a form and its replacement"),
    ],
)
def test_rules_broken_word_lists_name_the_file(tmp_path, name, text, message):
    folder = shutil.copytree(VOCABULARY, tmp_path / "words")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        RulesLabeler(vocabulary=folder)


def test_rules_phrases_of_the_vocabulary_are_found():
    phrases = {phrase.rstrip("*") for phrase in load_vocabulary()}
    read = LABELER._phrases
    for phrase in phrases:
        words = phrase.replace("-", " ").replace("/", " / ").split()
        assert read.find(words, 0) != (None, 1), phrase


def test_rules_mistakes_are_repeated_with_the_option_only():
    report = "No acute, displaced rib fractures. Endplate changes."
    assert named(report).get("fracture") == "negative"
    row = RulesLabeler(repeat_mistakes=True).label([report])[0]
    assert row[FINDINGS.index("fracture")] == row[FINDINGS.index("support_devices")] == 1
    assert row[FINDINGS.index("no_finding")] == 0


@pytest.mark.skipif("OTDRG_IU_XRAY" not in os.environ, reason="OTDRG_IU_XRAY does not name the IU X-Ray folder")
@pytest.mark.parametrize("half", [0, 1], ids=["developed on", "not developed on"])
def test_rules_agree_with_chexpert_labeler(half):
    path = Path(os.environ["OTDRG_IU_XRAY"]) / "labels" / "chexpert_labeler_train.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[half::2]
    true = read_states(path)
    true = np.array([true[row["id"]] for row in rows])
    reports = [row["report"] for row in rows]
    found = LABELER.label(reports)
    repeating = RulesLabeler(repeat_mistakes=True).label(reports)

    def f1(predicted, reference):
        return 2 * (predicted & reference).sum() / (predicted.sum() + reference.sum())

    assert f1(found > 0, true > 0) > 0.985
    often = [column for column in range(len(FINDINGS)) if (true[:, column] > 0).sum() >= 20]
    assert np.mean([f1(found[:, column] > 0, true[:, column] > 0) for column in often]) > 0.97
    assert f1(found == 2, true == 2) > 0.975
    assert f1(found == 3, true == 3) > 0.85
    # its mistakes cost us here; with them repeated, the level that counts is reached
    assert f1(found == 1, true == 1) > 0.885
    assert f1(repeating == 1, true == 1) >= 0.95
    # and so it nearly is without the cells that are listed as its mistakes
    listed = np.zeros_like(true, dtype=bool)
    studies = {row["id"]: place for place, row in enumerate(rows)}
    with (Path(otdrg.__file__).parent / "docs" / "chexpert_labeler_mistakes.csv").open(encoding="utf-8") as file:
        for cell in csv.DictReader(file):
            if cell["id"] in studies:
                place, column = studies[cell["id"]], FINDINGS.index(cell["finding"])
                listed[place, column] = True
                said = (FINDING_STATES[true[place, column]], FINDING_STATES[found[place, column]])
                assert said == (cell["chexpert_labeler"], cell["rules"]), cell
    assert 100 < listed.sum() < 220
    assert f1((found == 1) & ~listed, (true == 1) & ~listed) > (0.945 if half else 0.985)
