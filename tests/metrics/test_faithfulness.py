"""Faithfulness on arrays made by hand, and properties of any arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from otdrg.findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from otdrg.metrics.faithfulness import (
    KINDS,
    Cell,
    Contradiction,
    contradictions,
    faithfulness,
    flip_states,
    self_check,
)
from sklearn.metrics import recall_score

EDEMA, FRACTURE, DEVICES, NO_FINDING = map(FINDINGS.index, ("edema", "fracture", "support_devices", "no_finding"))
STATES = arrays(np.int64, st.tuples(st.integers(1, 30), st.just(14)), elements=st.integers(0, 3))


def states(count, **findings):
    """(count, 14) states, unmentioned but for those given."""
    array = np.zeros((count, len(FINDINGS)), int)
    for name, column in findings.items():
        array[:, FINDINGS.index(name)] = column
    return array


GIVEN = states(4, edema=[1, 1, 2, 0], fracture=[3, 0, 0, 0], no_finding=[0, 0, 0, 1])
SAID = states(4, edema=[1, 2, 2, 1], fracture=[0, 0, 0, 3], no_finding=[1, 1, 0, 0])


def test_faithfulness_equals_counts_by_hand():
    found = faithfulness(GIVEN, SAID, floor=1)
    assert found.cells["edema"] == {"positive": Cell(2, 1), "negative": Cell(1, 1), "unclear": Cell(0, 0)}
    assert found.cells["fracture"]["unclear"] == Cell(1, 0)
    assert found.macro == pytest.approx((0.5 + 1 + 0) / 3) and found.micro == pytest.approx(2 / 4)
    assert (found.counted, found.contradicted, found.omitted, found.added) == (3, 1, 1, 2)
    assert "no_finding" not in found.cells
    assert list(contradictions(GIVEN, SAID)) == [Contradiction(1, "edema", "positive", "negative")]
    every = [(one.study, one.finding, one.kind) for one in contradictions(GIVEN, SAID, kinds=KINDS)]
    assert every == [
        (0, "fracture", "omitted"),
        (1, "edema", "contradicted"),
        (3, "edema", "added"),
        (3, "fracture", "added"),
    ]


def test_faithfulness_below_floor_does_not_count_in_macro():
    assert faithfulness(GIVEN, SAID, floor=2).macro == 0.5
    rare = faithfulness(GIVEN, SAID, floor=3)
    assert rare.macro is None and rare.counted == 0 and rare.micro == 0.5
    nothing = faithfulness(states(3), states(3, edema=1))
    assert nothing.macro is None and nothing.micro is None and nothing.added == 3


def test_faithfulness_within_counts_only_these_findings():
    within = np.zeros(GIVEN.shape, bool)
    within[0, EDEMA] = within[0, FRACTURE] = True
    found = faithfulness(GIVEN, SAID, floor=1, within=within)
    assert (found.macro, found.micro, found.contradicted, found.omitted, found.added) == (0.5, 0.5, 0, 1, 0)
    assert not list(contradictions(GIVEN, SAID, within))


@settings(deadline=None, max_examples=60)
@given(STATES, st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_faithfulness_equals_scikit_learns_mean_recall(wanted, seed, floor):
    said = np.random.default_rng(seed).integers(0, 4, wanted.shape)
    found = faithfulness(wanted, said, floor)
    recalls, supports = [], []
    for place in range(NO_FINDING):
        recalls += list(recall_score(wanted[:, place], said[:, place], labels=[1, 2, 3], average=None, zero_division=0))
        supports += [int((wanted[:, place] == state).sum()) for state in (1, 2, 3)]
    kept = [recall for recall, support in zip(recalls, supports, strict=True) if support >= floor]
    assert found.counted == len(kept)
    assert found.macro == (pytest.approx(np.mean(kept)) if kept else None)
    assert found.contradicted == len(list(contradictions(wanted, said)))
    followed = sum(cell.followed for row in found.cells.values() for cell in row.values())
    assert followed + found.contradicted + found.omitted == (wanted[:, :NO_FINDING] != UNMENTIONED).sum()


@settings(deadline=None, max_examples=60)
@given(STATES, st.integers(0, 2**32 - 1))
def test_faithfulness_of_given_states_is_perfect_and_of_flips_zero(wanted, seed):
    assert faithfulness(wanted, wanted, floor=1).macro in (None, 1.0)
    flipped, where = flip_states(wanted, seed)
    assert faithfulness(flipped, wanted, floor=1, within=where).macro in (None, 0.0)
    assert faithfulness(flipped, flipped, floor=1, within=where).contradicted == 0
    can = np.isin(wanted[:, :NO_FINDING], (POSITIVE, NEGATIVE)).any(axis=1)
    assert (where.sum(axis=1) == can).all() and not where[:, NO_FINDING].any()
    # One pair is left in place of the other, and all else but No Finding is as it was.
    assert (flipped[where] + wanted[where] == POSITIVE + NEGATIVE).all()
    where[:, NO_FINDING] = True
    assert (flipped[~where] == wanted[~where]).all()
    again, _ = flip_states(wanted, seed)
    assert (again == flipped).all()


def test_flip_states_to_positive_clears_no_finding():
    flipped, _ = flip_states(states(2, edema=[2, 1], no_finding=1))
    assert flipped[:, EDEMA].tolist() == [POSITIVE, NEGATIVE]
    assert flipped[:, NO_FINDING].tolist() == [UNMENTIONED, POSITIVE]
    flipped, _ = flip_states(states(1, support_devices=2, no_finding=1))
    assert flipped[0, DEVICES] == POSITIVE and flipped[0, NO_FINDING] == POSITIVE
    assert not flip_states(states(1, edema=UNCLEAR))[1].any()


def test_faithfulness_names_faults():
    with pytest.raises(ValueError, match=r"states have shape \(4, 14\), said ones \(3, 14\): expected \(N, 14\) both"):
        faithfulness(GIVEN, SAID[:3])
    with pytest.raises(ValueError, match="said states: expected ids 0 to 3"):
        faithfulness(GIVEN, SAID - 1)
    with pytest.raises(ValueError, match="floor is 0: expected at least 1"):
        faithfulness(GIVEN, SAID, floor=0)
    with pytest.raises(ValueError, match=r"within has shape \(4, 2\)"):
        faithfulness(GIVEN, SAID, within=np.ones((4, 2)))


def test_self_check_lists_disagreements_with_given_states():
    wanted = states(4, edema=[1, 1, 1, 0], pneumothorax=[2, 2, 0, 0], no_finding=[0, 0, 1, 1])
    reports = ["There is edema. No pneumothorax.", "No edema. Small pneumothorax.", "", "Rib fracture."]
    assert self_check(reports, wanted) == [
        [],
        [
            {"finding": "edema", "given": "positive", "said": "negative", "kind": "contradicted"},
            {"finding": "pneumothorax", "given": "negative", "said": "positive", "kind": "contradicted"},
        ],
        [{"finding": "edema", "given": "positive", "said": "unmentioned", "kind": "omitted"}],
        [{"finding": "fracture", "given": "unmentioned", "said": "positive", "kind": "added"}],
    ]


@settings(deadline=None, max_examples=30)
@given(STATES, st.integers(0, 2**32 - 1))
def test_self_check_lists_as_many_as_faithfulness_counts(wanted, seed):
    said = np.random.default_rng(seed).integers(0, 4, wanted.shape)
    found = faithfulness(wanted, said)
    kinds = [one.kind for one in contradictions(wanted, said, kinds=KINDS)]
    assert [kinds.count(kind) for kind in KINDS] == [found.contradicted, found.omitted, found.added]
