"""Rewards of sampled reports equal the metrics they are named after, pair by pair."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.findings_otdrg import NOT_GIVEN
from otdrg.metrics import METRICS, rad_eval
from otdrg.metrics.rad_eval import RADEVAL_METRICS
from otdrg.rewards import REWARDS, Agreement, Cider, FindingF1, RadEvalReward, bleu_4, invented_comparisons, rouge_l
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


def test_finding_f1_reward_is_that_of_the_labelers_states():
    completions = ["There is edema.", "Edema and a pleural effusion.", "No edema.", "The lungs are clear.", ""]
    references = [
        "There is edema.",
        "There is edema.",
        "There is edema.",
        "The lungs are clear.",
        "The lungs are clear.",
    ]
    found = FindingF1()(completions=completions, references=references)
    assert found == pytest.approx([1.0, 2 / 3, 0.0, 1.0, 0.0])


def test_invented_comparisons_reward_is_minus_one_for_each_report_with_one():
    completions = ["The heart is unchanged.", "No prior for comparison.", ""]
    assert invented_comparisons(completions=completions, prompts=["p"] * 3) == [-1.0, 0.0, 0.0]


OWN = [name for name in REWARDS if name not in {score for one in RADEVAL_METRICS.values() for score in one.scores}]


def test_rewards_take_trl_columns_and_give_a_float_for_each_completion():
    columns = {"references": TRAINING, "finding_states": np.zeros((4, 14), dtype=int)}
    assert OWN == ["cider", "bleu_4", "rouge_l", "finding_f1", "agreement", "invented_comparisons"]
    for name in OWN:
        reward = REWARDS[name](TRAINING, "rules")
        values = reward(prompts=["p"] * 4, completions=TRAINING, completion_ids=[[1]] * 4, **columns)
        assert len(values) == 4 and all(type(value) is float for value in values), name
        assert reward.__name__ == name
        messages = [[{"role": "assistant", "content": f"\n{text}  "}] for text in TRAINING]
        parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in TRAINING]
        assert reward(completions=messages, **columns) == reward(completions=parts, **columns) == values


@pytest.mark.parametrize("completion", [None, 3, [], [{"role": "assistant"}]])
def test_rewards_other_completion_is_named(completion):
    with pytest.raises(TypeError, match=r"completions\[1\] is .*: expected a text, or messages with role and content"):
        rouge_l(completions=["a", completion], references=["a", "a"])


def test_rewards_empty_completions_are_finite():
    columns = {"references": TRAINING, "finding_states": np.full((4, 14), 1)}
    values = {name: REWARDS[name](TRAINING, "rules")(completions=["", " "] * 2, **columns) for name in OWN}
    assert values.pop("agreement") == [-13.0] * 4
    assert values == dict.fromkeys(values, [0.0] * 4)


@pytest.mark.parametrize("name", ["cider", "bleu_4", "finding_f1", "agreement"])
def test_rewards_columns_of_another_length_are_named(name):
    column, values = ("finding_states", np.zeros((3, 14))) if name == "agreement" else ("references", TRAINING[:3])
    with pytest.raises(ValueError, match=f"^{column}: 3, completions: 4; expected as many of each$"):
        REWARDS[name](TRAINING, "rules")(completions=TRAINING, **{column: values})


# --- RadEval ---------------------------------------------------------------------------------------------------------


class StubEvaluator:
    """RadEval's interface: values of each pair are lengths of the generated reports, and "bad" has none."""

    def __init__(self, metrics, show_progress):
        (self.name,), self.per_sample = metrics, False

    def __call__(self, refs, hyps):
        assert self.per_sample and len(refs) == len(hyps) and all(hyps)
        values = [float("nan") if text == "bad" else float(len(text)) for text in hyps]
        return dict.fromkeys(METRICS[self.name].scores, values)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(rad_eval, "load_radeval", lambda: type("radeval", (), {"RadEval": StubEvaluator}))
    monkeypatch.setattr("otdrg.metrics.rewards.load_radeval", rad_eval.load_radeval)


def test_radeval_reward_is_the_studies_value_and_zero_for_empty_completions(stub):
    columns = {"completions": ["ab", "", [{"role": "assistant", "content": "abc"}]], "references": ["a", "b", "c"]}
    for name, expected in (("radgraph_partial", [2.0, 0.0, 3.0]), ("radcliq_v1", [-2.0, 0.0, -3.0])):
        reward = REWARDS[name](TRAINING, "rules")
        assert reward.__name__ == name and reward(**columns) == expected
    assert RadEvalReward("green")(completions=[" "], references=["a"]) == [0.0]


def test_radeval_reward_that_is_not_finite_is_one_line(stub):
    with pytest.raises(ValueError, match=r"^reward crimson of completions\[1\] is nan, expected a finite number$"):
        RadEvalReward("crimson")(completions=["ab", "bad"], references=["a", "b"])


def test_radeval_reward_unknown_or_not_installed_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="RadEval has no score 'greene': expected one of bertscore, radgraph_simple"):
        RadEvalReward("greene")
    monkeypatch.setitem(sys.modules, "radeval", None)
    with pytest.raises(ValueError, match=r"^reward green: RadEval is not installed: pip install \"otdrg\[radeval\]\""):
        REWARDS["green"](TRAINING, "rules")
