"""Consensus decoding: the bank's weights are ridge regression, samples have their own random numbers, scores add up."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from otdrg import FINDINGS
from otdrg.bank_otdrg import ReportBank
from otdrg.consensus_otdrg import (
    AGREEMENT_WEIGHT,
    SAMPLE_PLAN,
    ConsensusDecoder,
    ConsensusSettings,
    SampleGroup,
    consensus_settings,
    given_states,
)
from otdrg.findings_otdrg import NOT_GIVEN
from otdrg.utility_otdrg import ReportUtility
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from transformers import GenerationConfig

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(40, 6)).astype(np.float32)
REPORTS = [f"report {number % 25}" for number in range(40)]
INDICATIONS = [("Cough.", "chest pain", "Chest pain, cough.", None)[number % 4] for number in range(40)]
NO_FINDING = FINDINGS.index("no_finding")
CARDIOMEGALY = FINDINGS.index("cardiomegaly")
TEXTS = ["the heart is normal .", "the heart is enlarged .", "the lungs are clear ."]
GENERATION = {"max_new_tokens": 6, "min_new_tokens": 6}


def labels(reports):
    """States in which cardiomegaly is positive where the heart is enlarged."""
    states = np.zeros((len(reports), 14), int)
    states[:, CARDIOMEGALY] = ["enlarged" in report for report in reports]
    return states


# --- the report bank -------------------------------------------------------------------------------------------------


def test_bank_weights_predict_as_ridge_regression_on_standardised_features():
    bank = ReportBank(REPORTS, FEATURES, ridge=0.5)
    queries = RNG.normal(size=(7, 6))
    mean, scale = FEATURES.mean(0), FEATURES.std(0) + 1e-3
    # A quantity that is the same for studies with the same report.
    value = np.array([len(report) + int(report.split()[1]) ** 2 for report in REPORTS])
    expected = Ridge(alpha=0.5 * 6).fit((FEATURES - mean) / scale, value).predict((queries - mean) / scale)
    by_report = np.array([len(report) + int(report.split()[1]) ** 2 for report in bank.reports])
    assert bank.weights(queries) @ by_report == pytest.approx(expected, rel=1e-5)
    assert bank.weights(queries).sum(axis=1) == pytest.approx(np.ones(7))
    assert len(bank) == 25 and bank.counts.sum() == 40


def test_bank_weights_with_indications_predict_as_ridge_regression_on_both():
    bank = ReportBank(REPORTS, FEATURES, ridge=0.5, indications=INDICATIONS)
    queries, asked = RNG.normal(size=(5, 6)), ["Cough.", "chest pain", "Chest pain, cough.", None, "unheard of"]
    mean, scale = FEATURES.mean(0), (FEATURES.std(0) + 1e-3) * 6**0.5
    terms = TfidfVectorizer(
        lowercase=False, token_pattern=r"[A-Za-z0-9]+|[^\sA-Za-z0-9]", ngram_range=(1, 2), binary=True, min_df=3
    )
    given = terms.fit_transform([text for text in INDICATIONS if text]).toarray()
    usual = given.mean(axis=0)

    def inputs(features, texts):
        found = terms.transform([text or "" for text in texts]).toarray() - usual
        found[[not text for text in texts]] = 0
        return np.hstack(((features - mean) / scale, 0.5 * found))

    value = np.array([int(report.split()[1]) ** 2 for report in REPORTS])
    # Inputs are centred with the mean of the studies that have an indication: the intercept is that of the targets.
    fitted = Ridge(alpha=0.5, fit_intercept=False).fit(inputs(FEATURES, INDICATIONS), value)
    ones = Ridge(alpha=0.5, fit_intercept=False).fit(inputs(FEATURES, INDICATIONS), np.ones(40))
    there = inputs(queries, asked)
    expected = fitted.predict(there) + (1 - ones.predict(there)) * value.mean()
    by_report = np.array([int(report.split()[1]) ** 2 for report in bank.reports])
    assert bank.weights(queries, asked) @ by_report == pytest.approx(expected, rel=1e-5)
    without = bank.weights(queries)
    assert bank.weights(queries, asked)[3] == pytest.approx(without[3])
    assert not np.allclose(bank.weights(queries, asked)[:3], without[:3], atol=1e-4)
    assert np.array_equal(bank.weights(queries, ["  ", *asked[1:]]), bank.weights(queries, [None, *asked[1:]]))


def test_bank_saved_and_loaded_is_the_same(tmp_path):
    bank = ReportBank(REPORTS, FEATURES, 2.0, ["CC BY 4.0"], FEATURES[0], INDICATIONS)
    bank.save(tmp_path / "bank")
    again = ReportBank.load(tmp_path / "bank")
    assert again.reports == bank.reports and again.ridge == 2.0 and again.licences == ("CC BY 4.0",)
    asked = FEATURES[:3], INDICATIONS[:3]
    assert np.array_equal(again.weights(*asked), bank.weights(*asked)) and again.digest() == bank.digest()
    assert np.array_equal(again.probe, FEATURES[0])


def test_bank_of_which_only_the_features_were_replaced_is_none(tmp_path, monkeypatch):
    ReportBank(REPORTS, FEATURES).save(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("otdrg.bank_otdrg.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        ReportBank(REPORTS, FEATURES + 1).save(tmp_path)
    with pytest.raises(ValueError, match=r"has no bank.json"):
        ReportBank.load(tmp_path)


def test_bank_files_have_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o022)
    try:
        ReportBank(REPORTS, FEATURES).save(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("bank.json", "bank.safetensors"), 0o644
    )


def test_bank_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"has no bank.safetensors: expected the folder of a report bank"):
        ReportBank.load(tmp_path)
    ReportBank(REPORTS, FEATURES).save(tmp_path)
    (tmp_path / "bank.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not a report bank, or is damaged"):
        ReportBank.load(tmp_path)


@pytest.mark.parametrize(
    ("reports", "features", "message"),
    [
        ([], FEATURES[:0], "0 reports"),
        (REPORTS[:3], FEATURES[:2], "3 reports, features of shape"),
        (REPORTS[:1], np.full((1, 3), np.nan), "NaN or infinity"),
    ],
)
def test_bank_of_arrays_that_do_not_fit_is_refused(reports, features, message):
    with pytest.raises(ValueError, match=message):
        ReportBank(reports, features)


def test_bank_of_too_few_indications_is_refused():
    with pytest.raises(ValueError, match="39 indications of 40 reports: expected as many"):
        ReportBank(REPORTS, FEATURES, indications=INDICATIONS[1:])


def test_bank_of_another_encoder_is_refused(model, processor, build_model):
    from otdrg.bank_otdrg import probe_features

    bank = ReportBank(REPORTS[:2], np.ones((2, 16)), probe=probe_features(model, processor))
    bank.check(model, processor)
    with pytest.raises(ValueError, match="made with another image encoder"):
        bank.check(build_model(seed=5)[0], processor)
    with pytest.raises(ValueError, match=r"shape \(2, 5\): expected \(studies, 6\)"):
        ReportBank(REPORTS, FEATURES).weights(np.zeros((2, 5)))


def test_bank_reports_with_a_suppressed_word_are_no_candidates():
    bank = ReportBank([*TEXTS, "xxxx is seen .", "a xxxxx ."], FEATURES[:5])
    weights = bank.weights(FEATURES[:1])[0]
    ranked = ConsensusDecoder(ConsensusSettings(), bank).rank([], np.zeros(14), weights, frozenset({"xxxx"}))
    assert {candidate.report for candidate in ranked} == {*TEXTS, "a xxxxx ."}
    with pytest.raises(ValueError, match="no candidate is left: every report of the bank has a suppressed word"):
        ConsensusDecoder(ConsensusSettings(), bank).rank([], np.zeros(14), weights, frozenset({".", "xxxx"}))


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_take_groups_in_a_list():
    assert ConsensusSettings(plan=list(SAMPLE_PLAN)) == ConsensusSettings()


def test_settings_come_from_the_call_then_the_generation_config():
    config = GenerationConfig()
    assert consensus_settings(config) is None and consensus_settings(config, candidates=1) is None
    assert consensus_settings(config, bank="folder") == ConsensusSettings()
    config.consensus = {"candidates": 8, "seed": 3, "plan": [{"states": "positive"}]}
    config = GenerationConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    found = consensus_settings(config, candidates=4, settings={"seed": 5})
    assert (found.candidates, found.seed, found.plan) == (4, 5, (SampleGroup("positive"),))
    assert ConsensusSettings.of(json.loads(json.dumps(found.to_dict()))) == found
    assert consensus_settings(config, candidates=1) is None
    # One candidate is `generate`, from wherever it is set.
    assert consensus_settings(config, settings={"candidates": 1}) is None
    config.consensus["candidates"] = 1
    assert consensus_settings(config) is None and consensus_settings(config, candidates=2).candidates == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": -1}, "consensus: candidates=-1, expected a number from 0 to 4096"),
        ({"lambda": 1}, "consensus: unknown setting 'lambda', expected one of candidates, "),
        ({"utility": {"meteor": 1}}, "consensus: utility={'meteor': 1}, expected weights of rouge_l, bleu_4, cider"),
        ({"agreement_weight": float("nan")}, "consensus: agreement_weight=nan, expected 0 or more"),
        ({"plan": []}, "consensus: plan=(), expected a list of groups of samples"),
        ({"plan": [{"states": "some"}]}, "consensus: plan: states='some', expected one of all, positive, others"),
        ({"plan": [{"beams": 2}]}, "consensus: plan: unknown setting 'beams'"),
        ({"plan": [{"guidance_scale": 0.5}]}, "consensus: plan: guidance_scale=0.5, expected a number of at least 1"),
        ({"seed": 0.5}, "consensus: seed=0.5, expected 0 or more"),
    ],
)
def test_settings_that_are_impossible_name_the_fault(settings, message):
    with pytest.raises(ValueError) as error:
        ConsensusSettings.of(settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_decoder_without_candidates_or_labeler_is_refused():
    with pytest.raises(ValueError, match="candidates=0: expected 1 or more, or a report bank"):
        ConsensusDecoder(ConsensusSettings(candidates=0))
    with pytest.raises(ValueError, match=r"agreement_weight=0.1, expected 0 without a labeler"):
        ConsensusDecoder(ConsensusSettings(agreement_weight=0.1))


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_rank_without_a_bank_is_the_mean_utility_of_the_samples():
    samples = [(TEXTS[0], True), (TEXTS[1], False), (TEXTS[0], True)]
    ranked = ConsensusDecoder(ConsensusSettings()).rank(samples, np.zeros(14))
    utility = ReportUtility(TEXTS[:2], [2, 1])(TEXTS[:2]) @ [2 / 3, 1 / 3]
    assert [candidate.report for candidate in ranked] == TEXTS[:2]
    assert [candidate.score for candidate in ranked] == pytest.approx(utility)
    assert [candidate.complete for candidate in ranked] == [True, False]
    assert {candidate.retrieved for candidate in ranked} == {None}


def test_rank_with_a_bank_is_the_utility_weighted_by_the_images():
    bank = ReportBank(TEXTS, FEATURES[:3])
    weights = np.array([0.2, -0.1, 0.9])
    ranked = ConsensusDecoder(ConsensusSettings(), bank).rank([("the heart .", True)], np.zeros(14), weights)
    expected = dict(zip([*TEXTS, "the heart ."], ReportUtility(TEXTS)([*TEXTS, "the heart ."]) @ weights, strict=True))
    assert [candidate.score for candidate in ranked] == pytest.approx(sorted(expected.values(), reverse=True), rel=1e-5)
    assert {candidate.report: candidate.score for candidate in ranked} == pytest.approx(expected, rel=1e-5)
    for candidate in ranked:
        assert candidate.retrieved == (candidate.report in TEXTS) and candidate.sampled != candidate.retrieved
    decoder = ConsensusDecoder(ConsensusSettings(retrieved=False), bank)
    alone = decoder.rank([("x", True), (TEXTS[0], True)], np.zeros(14), weights)
    assert {(candidate.report, candidate.retrieved) for candidate in alone} == {("x", False), (TEXTS[0], True)}


def test_rank_subtracts_findings_that_disagree():
    bank = ReportBank(TEXTS, FEATURES[:3])
    weights, states = np.ones(3) / 3, np.zeros(14, int)
    states[[CARDIOMEGALY, 3]] = 1
    states[NO_FINDING] = 1  # not a finding
    plain = ConsensusDecoder(ConsensusSettings(agreement_weight=0.0), bank, labels).rank([], states, weights)
    for given, weight in ((None, AGREEMENT_WEIGHT), (0.5, 0.5)):
        ranked = ConsensusDecoder(ConsensusSettings(agreement_weight=given), bank, labels).rank([], states, weights)
        expected = {one.report: one.score - weight * (1 if "enlarged" in one.report else 2) for one in plain}
        assert {one.report: one.score for one in ranked} == pytest.approx(expected)


def test_rank_ignores_findings_that_are_not_given():
    bank = ReportBank(TEXTS, FEATURES[:3])
    weights, states = np.ones(3) / 3, np.zeros(14, int)
    states[CARDIOMEGALY] = NOT_GIVEN
    plain, agreeing = (
        ConsensusDecoder(ConsensusSettings(agreement_weight=weight), bank, labels).rank([], states, weights)
        for weight in (0.0, 0.5)
    )
    assert agreeing == plain


# --- sampling --------------------------------------------------------------------------------------------------------


def study_of(model, processor, views):
    inputs = processor(images=[[view] for view in views])
    study = model.read_study(inputs["pixel_values"], inputs["view_mask"])
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}, study


def sampled(decoder, model, processor, views):
    prompt, study = study_of(model, processor, views)
    return [sorted(ranked) for ranked in decoder.decode(model, processor, prompt, study, GENERATION)]


@pytest.fixture(scope="module")
def decoder():
    return ConsensusDecoder(ConsensusSettings(candidates=6, plan=(SampleGroup("all", 2.0), SampleGroup("others"))))


def test_samples_of_a_study_do_not_depend_on_its_batch_or_the_global_seed(decoder, model, processor, views):
    together = sampled(decoder, model, processor, views[:3])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert sampled(decoder, model, processor, views[2:0:-1]) == together[:0:-1]
    assert torch.equal(before, torch.get_rng_state())
    other = ConsensusDecoder(ConsensusSettings.of({**decoder.settings.to_dict(), "seed": 1}))
    assert sampled(other, model, processor, views[:3]) != together
    assert all(len(ranked) > 1 for ranked in together)


def test_samples_have_the_distribution_of_nucleus_sampling(model, processor, views):
    group = SampleGroup(temperature=0.7, top_p=0.8)
    decoder = ConsensusDecoder(ConsensusSettings(candidates=600, plan=(group,)))
    prompt, study = study_of(model, processor, views[:1])
    logits = model(
        **model.expand_finding_text(
            **prompt,
            **{
                "view_features": study.view_features,
                "view_mask": study.view_mask,
                "finding_states": study.finding_states,
            },
        )
    ).logits[0, -1]
    logits[model.config.placeholder_token_ids] = -torch.inf
    probabilities, tokens = (logits / 0.7).softmax(0).sort(descending=True)
    kept = int((probabilities.cumsum(0) < 0.8).sum()) + 1
    drawn = []

    class Seen:
        """Stands in for the processor: keeps the sampled tokens."""

        def batch_decode(self, written, **kwargs):
            drawn.extend(written[:, 0].tolist())
            return [""] * len(written)

    decoder.decode(model, Seen(), prompt, study, {"max_new_tokens": 1})
    counts = np.array([drawn.count(int(token)) for token in tokens[:kept]])
    assert counts.sum() == len(drawn) == 600
    expected = (probabilities[:kept] / probabilities[:kept].sum()).detach().numpy() * 600
    assert ((counts - expected) ** 2 / expected).sum() < kept + 6 * np.sqrt(2 * kept)


def test_given_states_are_all_the_positive_or_the_others():
    states = torch.zeros(1, 14, dtype=torch.long)
    states[0, [1, 4]], states[0, 8] = 1, 2
    assert torch.equal(given_states(states, "all"), states)
    assert given_states(states, "positive")[0].tolist() == [1 if place in (1, 4) else NOT_GIVEN for place in range(14)]
    without = {1: NOT_GIVEN, 4: NOT_GIVEN, 8: 2, NO_FINDING: NOT_GIVEN}
    assert given_states(states, "others")[0].tolist() == [without.get(place, 0) for place in range(14)]
    assert {group.states for group in SAMPLE_PLAN} == {"all", "positive", "others"}
