"""Rewards of sampled reports equal the metrics they are named after, pair by pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.findings_otdrg import NOT_GIVEN
from otdrg.metrics.rewards import REWARDS, Agreement, Cider, bleu_4, rouge_l
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.rouge.rouge import Rouge

TRAINING = [
    "the heart is normal . the lungs are clear .",
    "the heart is enlarged . there is a small pleural effusion .",
    "the lungs are clear . no pneumothorax .",
    "there is a left chest tube . the heart is normal .",
]
WORDS = ["the", "heart", "is", "normal", ".", "lungs", "clear", "no", "effusion"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(texts, min_size=4, max_size=4))
def test_cider_reward_equals_pycocoevalcap_on_the_training_reports(written):
    completions = [" ".join(words) for words in written]
    _, expected = CocoCider().compute_score(
        {place: [report] for place, report in enumerate(TRAINING)},
        {place: [text] for place, text in enumerate(completions)},
    )
    assert Cider(TRAINING)(completions=completions, references=TRAINING) == pytest.approx(expected, abs=1e-9)


def test_cider_reward_keeps_the_training_reports_document_frequencies():
    cider = Cider(TRAINING)
    together = cider(completions=[TRAINING[2], "the heart"], references=[TRAINING[2], TRAINING[0]])
    alone = cider(completions=[TRAINING[2]], references=[TRAINING[2]])
    assert together[0] == alone[0] == pytest.approx(10.0)
    assert cider(completions=[""], references=[TRAINING[0]]) == [0.0]


@settings(max_examples=25, deadline=None)
@given(texts, texts)
def test_rouge_l_reward_equals_pycocoevalcap(written, true):
    completion, reference = " ".join(written), " ".join(true)
    expected = Rouge().calc_score([completion], [reference])
    assert rouge_l(completions=[completion], references=[reference]) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("a b c d e", "a b c d e", 1.0),
        ("a b c d e", "a b c d f", (4 / 5 * 3.1 / 4.1 * 2.1 / 3.1 * 1.1 / 2.1) ** 0.25),
        # Clipped counts, and 4-grams that a smoothed count stands for.
        ("a a b", "a b c", (2 / 3 * 1.1 / 2.1 * 0.1 / 1.1 * 0.1 / 1.1) ** 0.25),
        ("a b c d", "a b c d e f g h", np.exp(1 - 8 / 4)),
        ("", "a b", 0.0),
    ],
)
def test_bleu_4_reward_is_the_smoothed_precision(completion, reference, expected):
    assert bleu_4(completions=[completion], references=[reference]) == pytest.approx([expected])


def test_agreement_reward_counts_findings_that_differ_from_the_given_positives():
    states = np.zeros((5, 14), dtype=int)
    states[:, FINDINGS.index("edema")] = 1
    states[0, FINDINGS.index("no_finding")] = 1
    states[3] = -1
    states[4] = NOT_GIVEN
    completions = [
        "There is edema.",
        "There is no edema. There is a pleural effusion.",
        "The lungs are clear.",
        "There is a pleural effusion.",
        "There is edema.",
    ]
    assert Agreement()(completions=completions, references=None, finding_states=states) == [0.0, -2.0, -1.0, 0.0, 0.0]


def test_rewards_take_trl_columns_and_give_a_float_for_each_completion():
    columns = {"references": TRAINING, "finding_states": np.zeros((4, 14), dtype=int)}
    for name, make in REWARDS.items():
        reward = make(TRAINING, "rules")
        values = reward(prompts=["p"] * 4, completions=TRAINING, completion_ids=[[1]] * 4, **columns)
        assert len(values) == 4 and all(type(value) is float for value in values), name
        assert reward.__name__ == name
