"""Abnormal studies are drawn more often, and tokens of abnormal sentences weigh more."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.labelers import load_labeler
from otdrg.labelers.abnormal import abnormal_sentences
from otdrg.training.collation import ReportCollator, StudySampler, study_weights

NORMAL = ("The heart is normal in size.", "The lungs are clear.", "No pleural effusion or pneumothorax.")
ABNORMAL = ("There is cardiomegaly.", "Possible right lower lobe pneumonia.", "A small left pleural effusion is seen.")


def test_study_weights_abnormal_studies_weigh_more():
    states = [[0] * 14, [0] * 14]
    states[1][FINDINGS.index("edema")] = 1
    assert study_weights(states, 2.5) == [1, 2.5] and study_weights(states, 1) is None


def test_report_collator_weighs_the_tokens_of_abnormal_sentences(processor, view):
    normal, mixed = " ".join(NORMAL), f"{NORMAL[0]} {ABNORMAL[2]} {NORMAL[1]}"
    abnormal = abnormal_sentences([normal, mixed], load_labeler("rules"))
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
