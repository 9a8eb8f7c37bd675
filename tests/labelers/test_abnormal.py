"""Abnormal states and sentences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.labelers import load_labeler
from otdrg.labelers.abnormal import abnormal_sentences, is_abnormal
from otdrg.studies.cleaning import clean_report

NORMAL = ("The heart is normal in size.", "The lungs are clear.", "No pleural effusion or pneumothorax.")
ABNORMAL = ("There is cardiomegaly.", "Possible right lower lobe pneumonia.", "A small left pleural effusion is seen.")


@pytest.fixture(scope="module")
def labeler():
    return load_labeler("rules")


def test_is_abnormal_reads_positive_and_unclear_findings_and_not_no_finding():
    states = torch.zeros(4, 14, dtype=torch.long)
    states[0, FINDINGS.index("no_finding")] = 1
    states[1, 3], states[2, 5], states[3, 5] = 3, 1, 2
    assert is_abnormal(states).tolist() == [False, True, True, False]


@given(sentences=st.lists(st.sampled_from(NORMAL + ABNORMAL), min_size=1, max_size=6), cleaned=st.booleans())
@settings(max_examples=40)
def test_abnormal_sentences_are_the_spans_of_the_abnormal_ones(labeler, sentences, cleaned):
    report = " ".join(sentences)
    report = clean_report(report, "r2gen_iu") if cleaned else report
    found = abnormal_sentences([report], labeler).get(report, [])

    def words(text):
        return " ".join(text.lower().replace(".", " ").split())

    wanted = [words(sentence) for sentence in sentences if sentence in ABNORMAL]
    assert [words(report[start:end]) for start, end in found] == wanted


def test_abnormal_sentences_of_wrapped_lines_and_lists_are_found(labeler, caplog):
    report = (
        "The lungs show a small left pleural\neffusion and clear apices.\nImpression:\n- no edema\n- cardiomegaly\n"
    )
    spans = abnormal_sentences([report], labeler)[report]
    assert [report[start:end].split("\n")[0] for start, end in spans] == [
        "The lungs show a small left pleural",
        "cardiomegaly",
    ]
    assert "not found" not in caplog.text
