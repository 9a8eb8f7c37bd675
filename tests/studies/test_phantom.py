import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.findings_otdrg import FINDINGS, NEGATIVE, POSITIVE, UNCLEAR, UNMENTIONED
from otdrg.labelers import load_labeler
from otdrg.studies import load_studies
from otdrg.studies.phantom import complete_states, make_phantom, sample_states, write_report
from otdrg.studies.phantom_wording import write_indication

#: How a reader knows which finding a sentence is about; written apart from the wordings.
WORDS = {
    "enlarged_cardiomediastinum": r"mediastin",
    "cardiomegaly": r"\bheart\b|cardiomegaly",
    "lung_opacity": r"opacity",
    "lung_lesion": r"nodule|\bmass",
    "edema": r"edema",
    "consolidation": r"consolidation",
    "pneumonia": r"pneumonia",
    "atelectasis": r"atelectasis",
    "pneumothorax": r"pneumothorax",
    "pleural_effusion": r"effusion",
    "pleural_other": r"thickening",
    "fracture": r"fracture",
    "support_devices": r"\btubes?\b|\blines\b|catheter|pacemaker",
    "no_finding": r"\bacute\b",
}
DENIAL = re.compile(r"\bno\b|normal|unremarkable", re.I)
DOUBT = re.compile(r"possibl|may be|questionable", re.I)
VIEWS = ("frontal", "lateral")


def read_states(report):
    """The states that a report asserts, sentence by sentence."""
    states = [UNMENTIONED] * len(FINDINGS)
    for sentence in re.findall(r"[^.]+\.", report):
        found = [i for i, name in enumerate(FINDINGS) if re.search(WORDS[name], sentence, re.I)]
        for i in found:
            if DOUBT.search(sentence):
                states[i] = UNCLEAR
            else:
                states[i] = NEGATIVE if DENIAL.search(sentence) else POSITIVE
        if FINDINGS.index("no_finding") in found:
            assert len(found) == 1
            states[-1] = POSITIVE
    return states


def only(finding, state=POSITIVE, others=UNMENTIONED):
    return [state if name == finding else others for name in FINDINGS[:-1]]


any_states = st.lists(st.integers(0, 3), min_size=13, max_size=13)


@settings(max_examples=200, deadline=None)
@given(any_states, st.integers(0, 2**32))
def test_write_report_states_are_in_the_report(states, seed):
    states = complete_states(states)
    assert read_states(write_report(states, seed)) == states.tolist()


@settings(max_examples=100, deadline=None)
@given(any_states)
def test_complete_states_no_finding_follows_the_rule(states):
    completed = complete_states(states)
    abnormal = {name for name, s in zip(FINDINGS, states, strict=False) if s in (POSITIVE, UNCLEAR)}
    assert completed[:-1].tolist() == states
    assert (completed[-1] == POSITIVE) == (abnormal <= {"support_devices"})
    assert completed[-1] in (POSITIVE, UNMENTIONED)


def test_write_report_all_unmentioned_mentions_nothing():
    report = write_report([UNMENTIONED] * 14, 0)
    assert report and read_states(report) == [UNMENTIONED] * 14


def test_write_report_wordings_vary():
    states = complete_states(only("edema", others=NEGATIVE))
    heart = {write_report(states, seed).split(". ")[0] for seed in range(50)}
    assert 2 <= len(heart) <= 4


def test_write_report_accepts_names_of_states():
    named = ["unmentioned"] * 13 + ["positive"]
    assert write_report(named, 3) == write_report([0] * 13 + [1], 3)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([0] * 13, "13 finding states given: expected 14"),
        ([0] * 13 + [2], "'negative' is not possible for no_finding"),
        ([1] + [0] * 12 + [1], "no_finding is positive although enlarged_cardiomediastinum is positive"),
        ([4] + [0] * 13, "unknown finding state 4"),
    ],
)
def test_write_report_impossible_states_are_refused(states, message):
    with pytest.raises(ValueError, match=message):
        write_report(states, 0)


def test_phantom_report_has_the_drawn_side_and_size():
    seen = set()
    for index in range(12):
        phantom = make_phantom(1, index, 64, ("frontal",), states=only("pleural_effusion"))
        detail = phantom.details["pleural_effusion"]
        seen.add((detail.side, detail.size))
        assert f"{detail.size} {detail.side} pleural effusion" in phantom.report
        columns = np.nonzero(phantom.masks["pleural_effusion"][0])[1]
        assert (columns.mean() > 32) == (detail.side == "left")  # the patient's left is on the viewer's right
        area = phantom.masks["pleural_effusion"][0].mean()
        assert area > 0.03 if detail.size == "large" else area < 0.03
    assert len(seen) == 4


def test_phantom_same_seed_and_index_are_equal():
    later = [make_phantom(5, index, 48) for index in (3, 1, 0)]
    for phantom, index in zip(later, (3, 1, 0), strict=True):
        again = make_phantom(5, index, 48)
        assert again.report == phantom.report and again.states.tolist() == phantom.states.tolist()
        assert [image.tobytes() for image in again.images] == [image.tobytes() for image in phantom.images]
        assert all(np.array_equal(again.masks[name], phantom.masks[name]) for name in phantom.masks)
    assert make_phantom(6, 0, 48).images[0].tobytes() != later[2].images[0].tobytes()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("finding", FINDINGS[:-1])
def test_phantom_finding_changes_only_its_mask(finding, view):
    for index in range(6):
        others = sample_states(np.random.default_rng(index))[:-1]
        position = FINDINGS.index(finding)
        present, absent = others.copy(), others.copy()
        present[position], absent[position] = POSITIVE, NEGATIVE
        having = make_phantom(2, index, 112, (view,), states=present)
        lacking = make_phantom(2, index, 112, (view,), states=absent)
        change = np.abs(np.asarray(having.images[0], int) - np.asarray(lacking.images[0], int))
        (mask,) = having.masks[finding]
        assert finding not in lacking.masks
        assert mask.shape == change.shape and mask.dtype == bool
        assert change[~mask].max() <= 12
        if finding == "fracture" and view == "lateral":
            assert not mask.any()
        else:
            assert 0.002 < mask.mean() < 0.35
            assert change[mask].mean() > 5 and change[mask].max() > 20


def test_phantom_unclear_finding_is_fainter_without_mask():
    weaker = 0
    for finding in FINDINGS[:-1]:
        images = {}
        for state in (NEGATIVE, UNCLEAR, POSITIVE):
            phantom = make_phantom(4, 0, 96, ("frontal",), states=only(finding, state))
            assert (finding in phantom.masks) == (state == POSITIVE)
            images[state] = np.asarray(phantom.images[0], float)
        unclear, positive = (np.abs(images[s] - images[NEGATIVE]).sum() for s in (UNCLEAR, POSITIVE))
        assert unclear > 0
        weaker += unclear < 0.85 * positive
    assert weaker == 13


def test_phantom_states_agree_with_report_and_masks():
    for index in range(60):
        phantom = make_phantom(0, index, 32, ("frontal",))
        assert read_states(phantom.report) == phantom.states.tolist()
        assert set(phantom.masks) == {
            name for name, state in zip(FINDINGS[:-1], phantom.states, strict=False) if state == POSITIVE
        }
        assert all(masks[0].any() for masks in phantom.masks.values())


def test_phantom_positive_finding_is_visible():
    for index in range(40):
        for finding, (frontal, lateral) in make_phantom(9, index, 224).masks.items():
            assert frontal.any()
            assert lateral.any() == (finding != "fracture")


def test_phantom_impression_answers_the_indication_first():
    asked = []
    for index in range(200):
        phantom = make_phantom(0, index, 32, ("frontal",))
        said = read_states(phantom.impression)
        assert all(state in (UNMENTIONED, true) for state, true in zip(said, phantom.states, strict=True))
        assert bool(phantom.indication) == bool(phantom.question)
        if phantom.question:
            position = FINDINGS.index(phantom.question)
            answer = read_states(re.match(r"[^.]+\.", phantom.impression)[0])
            assert re.search(WORDS[phantom.question], phantom.indication, re.I)
            assert answer[position] == said[position] == phantom.states[position] != UNMENTIONED
            asked.append(phantom.question)
    assert 90 < len(asked) < 150 and len(set(asked)) > 10


def test_phantom_indication_does_not_reveal_states():
    for index in range(40):
        states = sample_states(np.random.default_rng(index))[:-1]
        flipped = [{POSITIVE: NEGATIVE, NEGATIVE: UNCLEAR, UNCLEAR: POSITIVE}.get(state, state) for state in states]
        one, other = (make_phantom(8, index, 32, ("frontal",), states=given) for given in (states, flipped))
        assert (one.question, one.indication) == (other.question, other.indication)


@pytest.mark.parametrize("finding", FINDINGS[:-1])
def test_phantom_indications_vary(finding):
    indications = {write_indication(finding, np.random.default_rng(seed)) for seed in range(60)}
    assert len({re.split("[.,]", text)[0] for text in indications}) >= 3  # complaints
    assert len({re.split("[.,]", text, maxsplit=1)[1] for text in indications}) >= 3  # questions


def test_phantom_nothing_mentioned_has_no_indication():
    phantoms = [make_phantom(0, index, 32, ("frontal",), states=[UNMENTIONED] * 13) for index in range(10)]
    assert {phantom.indication for phantom in phantoms} == {""}


def test_phantom_rules_labeler_reads_the_states():
    phantoms = [make_phantom(1, index, 32, ("frontal",)) for index in range(100)]
    reports = [f"{phantom.findings} {phantom.impression}" for phantom in phantoms]
    states = np.stack([phantom.states for phantom in phantoms])
    assert np.array_equal(load_labeler("rules").label(reports), states)


def test_sample_states_prevalences_are_in_range():
    states = np.stack([sample_states(np.random.default_rng([1, i])) for i in range(8000)])
    findings = states[:, :-1]
    positive, unclear = (findings == POSITIVE).mean(0), (findings == UNCLEAR).mean(0)
    denied = dict(zip(FINDINGS, (findings == NEGATIVE).mean(0), strict=False))
    assert positive.min() > 0.06 and positive.max() < 0.18
    assert unclear.min() > 0.012 and unclear.max() < 0.03
    usual = ("pneumothorax", "pleural_effusion", "consolidation", "cardiomegaly")
    assert min(denied[name] for name in usual) > 0.6
    assert max(share for name, share in denied.items() if name not in usual) < 0.5
    assert 0.2 < (states[:, -1] == POSITIVE).mean() < 0.3


@pytest.mark.parametrize("size", [32, 100, 224])
def test_phantom_images_have_the_given_size(size):
    phantom = make_phantom(0, 0, size)
    assert [(image.mode, image.size) for image in phantom.images] == [("L", (size, size))] * 2
    pixels = np.asarray(phantom.images[0])
    assert pixels.std() > 30 and (pixels == 255).mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "option 'seed' is -1: expected a whole number of 0 or more"),
        ({"image_size": 31}, "option 'image_size' is 31: expected a whole number of 32 or more"),
        ({"image_size": "224"}, "option 'image_size' is '224'"),
        ({"views": ("oblique",)}, "option 'views' is .*: expected one or more of frontal, lateral"),
        ({"views": ()}, "option 'views' is"),
        ({"train": -1}, "option 'train' is -1"),
        ({"train": 0, "validation": 0, "test": 0}, "are all 0: expected at least one study"),
    ],
)
def test_phantom_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_studies("phantom", **{"train": 1, "validation": 0, "test": 0, **options})


def test_phantom_dataset_is_loaded():
    studies = load_studies("phantom", train=6, validation=2, test=2, image_size=40, seed=3, views=VIEWS)
    assert {split: len(rows) for split, rows in studies.items()} == {"train": 6, "validation": 2, "test": 2}
    ids = [name for rows in studies.values() for name in rows["id"]]
    assert len(set(ids)) == 10
    row, phantom = studies["train"][4], make_phantom(3, 4, 40)
    assert row["id"] == phantom.id and row["report"] == row["findings"] == phantom.report
    assert row["finding_states"] == phantom.states.tolist()
    assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in phantom.images]
    assert studies["train"].features["views"].feature.int2str(row["views"]) == list(VIEWS)
    larger = load_studies("phantom", train=7, validation=0, test=0, image_size=40, seed=3)
    assert list(larger) == ["train"] and larger["train"]["id"][:6] == studies["train"]["id"]


def test_phantom_dataset_is_prepared(tmp_path):
    from datasets import load_from_disk

    studies = load_studies("phantom", train=2, validation=0, test=1, image_size=32)
    studies.save_to_disk(tmp_path / "studies")
    again = load_from_disk(tmp_path / "studies")
    assert again["train"].features == studies["train"].features
    assert again["test"][0]["images"][0].tobytes() == studies["test"][0]["images"][0].tobytes()
