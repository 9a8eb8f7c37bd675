"""Abnormal studies are drawn more often, and tokens of abnormal sentences weigh more."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.labelers import load_labeler
from otdrg.studies.cleaning import clean_report
from otdrg.training.abnormal import abnormal_sentences, is_abnormal, study_weights
from otdrg.training.collation import ReportCollator
from otdrg.training.resumable_trainer import StudySampler

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
    assert study_weights(states, 2.5) == [1, 2.5, 2.5, 1] and study_weights(states, 1) is None


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


def test_report_collator_weighs_the_tokens_of_abnormal_sentences(processor, labeler, view):
    normal, mixed = " ".join(NORMAL), f"{NORMAL[0]} {ABNORMAL[2]} {NORMAL[1]}"
    abnormal = abnormal_sentences([normal, mixed], labeler)
    rows = [{"id": "a", "images": [view(0)], "report": text, "finding_states": [0] * 14} for text in (normal, mixed)]
    batch = ReportCollator(processor, True, 60, sentence_weight=2.5, abnormal=abnormal)(rows)
    weights, labels = batch["label_weights"], batch["labels"]
    assert weights.shape == labels.shape and (weights[0] == 1).all()
    assert processor.decode(labels[1][weights[1] == 2.5]).strip().startswith(ABNORMAL[2][:-1])
    assert "label_weights" not in ReportCollator(processor, True, 60)(rows)
    assert "label_weights" not in ReportCollator(processor, False, 60, sentence_weight=2.5, abnormal=abnormal)(rows)


@given(
    abnormal=st.lists(st.booleans(), min_size=1, max_size=60),
    weight=st.floats(1, 6),
    grouped=st.booleans(),
    epoch=st.integers(0, 5),
)
@settings(max_examples=50)
def test_study_sampler_draws_each_study_its_expected_number_of_times(abnormal, weight, grouped, epoch):
    weights = [weight if one else 1.0 for one in abnormal]
    lengths = [7 * place % 11 + 1 for place in range(len(weights))] if grouped else None
    sampler = StudySampler(len(weights), 3, 4, lengths, weights)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == len(weights) and drawn == list(sampler)
    counts = Counter(drawn)
    for study, own in enumerate(weights):
        expected = own * len(weights) / sum(weights)
        assert expected - 1 - 1e-6 < counts[study] < expected + 1 + 1e-6


def test_study_sampler_over_epochs_draws_abnormal_studies_as_often_as_weighed():
    weights = [2.5, 1, 1, 1, 2.5, 1, 1, 1, 1, 1]
    sampler, counts = StudySampler(10, 1, 4, None, weights), Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        counts.update(sampler)
    often, seldom = counts[0] + counts[4], counts[1] + counts[2]
    assert often / seldom == pytest.approx(2.5, rel=0.1)
