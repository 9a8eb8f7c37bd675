"""The predictor stage: thresholds, tags and indications."""

import json
import zlib

import numpy as np
import pytest
import torch
from otdrg import FINDINGS, OTDRGForReportGeneration
from otdrg.configuration_otdrg import INDICATION_BUCKETS
from otdrg.inference.collation import expand_tags
from otdrg.metrics.classification import DEFAULT_THRESHOLD
from otdrg.studies.phantom import PhantomSource
from otdrg.train_hf import main
from otdrg.training.predictor import fit_calibration, fit_rule, rule_thresholds, tag_names
from scipy.optimize import minimize
from scipy.special import expit

EDEMA = FINDINGS.index("edema")


def run(recipe, folder, *overrides):
    status = main([str(recipe), "stages=[predictor]", f"output_dir={folder}", *overrides])
    assert status == 0
    model = OTDRGForReportGeneration.from_pretrained(folder / "predictor")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["predictor"], model


def test_rule_thresholds_grow_slower_than_frequency():
    means = np.array([0.05] * 12 + [0.4] + [0.5])
    probabilities = np.stack([means * 0.5, means * 1.5])
    thresholds = rule_thresholds(probabilities)
    average = means[:13].mean()
    assert thresholds[12] == pytest.approx(0.13 * (0.4 / average) ** 0.3)
    assert thresholds[12] / thresholds[0] == pytest.approx(8**0.3)
    assert thresholds[13] == DEFAULT_THRESHOLD


def test_fit_rule_finds_the_number_that_separates():
    generator = np.random.default_rng(0)
    labels = np.where(generator.random((400, 14)) < 0.1, 1, 0)
    # Positives have probabilities above .3, others below: every threshold between the two is right.
    probabilities = np.where(
        labels == 1, generator.uniform(0.32, 0.6, labels.shape), 0.27 * generator.random((400, 14))
    )
    labels[:, 3] = np.where(labels[:, 3] == 0, -100, labels[:, 3])
    thresholds = np.array(fit_rule(probabilities, labels))
    assert (thresholds[:13] > 0.26).all() and (thresholds[:13] < 0.34).all()


def test_predictor_stage_rule_thresholds_need_no_validation(tiny_recipe, tmp_path):
    results, model = run(tiny_recipe, tmp_path / "run", "predictor.thresholds=rule", "studies.options.validation=0")
    thresholds = model.config.finding_thresholds
    assert results["thresholds"] == dict(zip(FINDINGS, thresholds, strict=True))
    assert thresholds[-1] == 0.5 and all(0 < threshold < 1 for threshold in thresholds)


def test_predictor_stage_cross_validation_leaves_the_trained_predictor(tiny_recipe, tmp_path):
    plain, model = run(tiny_recipe, tmp_path / "plain", "predictor.thresholds=none")
    folds, again = run(tiny_recipe, tmp_path / "folds", "predictor.thresholds=cross_validation")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert model.config.finding_thresholds is None and len(again.config.finding_thresholds) == 14
    assert folds["validation_default_threshold"]["macro_auc"] == plain["validation"]["macro_auc"]
    assert "thresholds_fitted_on" not in folds["validation"]


def test_predictor_stage_given_thresholds_and_whole_validation_are_kept(tiny_recipe, tmp_path):
    thresholds = [0.1] * 13 + [0.5]
    overrides = [f"model.overrides.finding_thresholds={thresholds}", "predictor.dataloader_drop_last=true"]
    results, model = run(tiny_recipe, tmp_path / "run", *overrides, "predictor.per_device_eval_batch_size=4")
    assert model.config.finding_thresholds == thresholds
    assert {row["studies"] for row in results["validation"]["findings"].values()} == {5}


def test_predictor_stage_save_strategy_best_keeps_the_lowest_calibration_error(tiny_recipe, tmp_path):
    overrides = ["save_strategy=best", "eval_strategy=steps", "eval_steps=1", "max_steps=3", "learning_rate=0.05"]
    overrides += ["metric_for_best_model=macro_ece", "load_best_model_at_end=true"]
    results, _ = run(tiny_recipe, tmp_path / "run", *(f"predictor.{override}" for override in overrides))
    errors = {line["step"]: line["eval_macro_ece"] for line in results["log_history"] if "eval_macro_ece" in line}
    assert len(errors) == 3 and results["best"]["step"] == min(errors, key=errors.get)


def test_fit_calibration_minimises_the_log_loss_with_one_slope():
    generator = np.random.default_rng(0)
    odds, intercepts = generator.normal(-1, 2, (800, 14)), np.linspace(-2, 1, 14)
    labels = (generator.random(odds.shape) < expit(0.5 * odds + intercepts)).astype(int)
    labels[:, 2], labels[:50, 5], labels[50:100, 5] = 0, -100, 3
    pairs = np.array(fit_calibration(expit(odds), labels))
    known, sign = labels != -100, np.where(labels == 1, -1, 1)

    def loss(weights):
        return np.logaddexp(0, sign * (weights[0] * odds + weights[1:]))[known].sum() / 800

    assert (pairs[:, 0] == pairs[0, 0]).all() and np.isfinite(pairs).all()
    best = minimize(loss, np.ones(15)).fun
    assert loss(np.array([pairs[0, 0], *pairs[:, 1]])) < best + 1e-3
    assert pairs[0, 0] == pytest.approx(0.5, abs=0.05)
    assert np.delete(pairs[:, 1] - intercepts, [2, 5]) == pytest.approx(np.zeros(12), abs=0.3)


@pytest.mark.parametrize("positive", [[0.2, 0.2], [0.1, 0.9]], ids=["none positive", "the unlikely ones positive"])
def test_fit_calibration_without_a_slope_changes_nothing(positive):
    labels = np.zeros((2, 14), dtype=int)
    labels[0] = positive[0] != positive[1]
    assert fit_calibration(np.repeat(np.array(positive)[:, None], 14, axis=1), labels) == [[1, 0]] * 14


def test_predictor_stage_calibration_changes_probabilities_and_not_the_states_of_thresholds(tiny_recipe, tmp_path):
    thresholds = "predictor.thresholds=cross_validation"
    plain, _ = run(tiny_recipe, tmp_path / "plain", thresholds)
    results, model = run(tiny_recipe, tmp_path / "run", thresholds, "predictor.calibration=cross_validation")
    assert np.array(model.config.finding_calibration).shape == (14, 2)
    before, after = results["validation_uncalibrated"], results["validation"]
    assert before["macro_ece"] == plain["validation"]["macro_ece"] != after["macro_ece"]
    assert after["macro_auc"] == pytest.approx(plain["validation"]["macro_auc"], abs=1e-6)
    assert after["macro_f1_13"] == plain["validation"]["macro_f1_13"]


def test_predictor_stage_trains_the_last_blocks_of_its_own_encoder_alone(tiny_recipe, tmp_path):
    dinov2 = "{model_type: dinov2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 14}"
    _, model = run(
        tiny_recipe,
        tmp_path / "run",
        *(f"model.overrides.vision_config={dinov2}", "model.overrides.predictor_encoder=own"),
        *("predictor.vision=full", "predictor.vision_layers=1", "predictor.patch_dropout=0.75"),
    )
    own, report = model.finding_vision_tower.state_dict(), model.vision_tower.state_dict()
    changed = {name for name, weight in own.items() if not torch.equal(weight, report[name])}
    assert changed and all(name.startswith(("encoder.layer.1.", "layernorm.")) for name in changed)


def test_predictor_stage_tags_and_indications_are_learned(tiny_recipe, tmp_path, monkeypatch):
    plain = PhantomSource.read

    def read(self, entry):
        study = plain(self, entry)
        study.tags = ["Spine/degenerative"]
        # The indication of every study with edema is the same, and no other study has it.
        study.finding_states = [int(state) for state in study.finding_states]
        study.finding_states[EDEMA] = int(zlib.crc32(entry.id.encode()) % 2)
        study.indication = "dyspnoea" if study.finding_states[EDEMA] else "cough"
        return study

    monkeypatch.setattr(PhantomSource, "read", read)
    # So large that the words decide.
    monkeypatch.setattr("otdrg.training.predictor.WORD_WEIGHT", 100.0)
    results, model = run(
        tiny_recipe,
        tmp_path / "run",
        *("predictor.tag_weight=1", "predictor.thresholds=cross_validation"),
        *("model.overrides.indication_reader=predictor", "model.overrides.predictor_heads=2"),
    )
    assert model.config.predictor_tags is None, "the finished model does not predict tags"
    words = model.finding_predictor.words.weight.detach().reshape(-1, 14, 4)
    assert int(words.abs().sum(dim=(1, 2)).gt(0).sum()) == 2, "two words were seen"
    dyspnoea, cough = (zlib.crc32(word) % INDICATION_BUCKETS for word in (b"dyspnoea", b"cough"))
    assert words[dyspnoea, EDEMA, 1] > 0.05 > -0.05 > words[cough, EDEMA, 1]
    # Figures, calibration and thresholds are of predictions that read the indication.
    assert results["validation"]["findings"]["edema"]["ece"] < 0.01


def test_predictor_stage_tag_weight_without_tags_is_an_error(tiny_recipe, tmp_path, capsys):
    overrides = ["stages=[predictor]", f"output_dir={tmp_path / 'run'}", "predictor.tag_weight=1"]
    assert main([str(tiny_recipe), *overrides]) == 1
    assert "predictor.tag_weight=1: expected studies with tags" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predictor.fit_thresholds=true"], "predictor.fit_thresholds no longer exists: use thresholds"),
        (
            ["predictor.thresholds=cross_validation", "predictor.vision=full"],
            "predictor.thresholds='cross_validation': expected another one while predictor.vision is trained",
        ),
        (
            ["predictor.calibration=cross_validation", "predictor.vision=full"],
            "predictor.calibration='cross_validation': expected another one while predictor.vision is trained",
        ),
        (
            ["predictor.vision_layers=2"],
            "predictor.vision_layers=2: expected null while predictor.vision is not full",
        ),
        (
            ["predictor.vision=full", "predictor.vision_layers=2"],
            "predictor.vision_layers=2: expected null, this encoder is not a sequence of blocks",
        ),
        (
            ["predictor.thresholds=rule", f"model.overrides.finding_thresholds={[0.5] * 14}"],
            "predictor.thresholds='rule': expected none beside model.overrides.finding_thresholds",
        ),
        (
            ["predictor.thresholds=cross_validation", "predictor.lr_scheduler_type=greedy"],
            "predictor.thresholds='cross_validation': expected another one while predictor.lr_scheduler_type follows",
        ),
        (["predictor.patch_dropout=0.5"], "predictor.patch_dropout=0.5: expected 0 while predictor.vision is frozen"),
        (
            ["predictor.vision=full", "predictor.patch_dropout=0.5"],
            "predictor.patch_dropout=0.5: expected 0, or one of the encoders dinov2, dinov2_with_registers, vit",
        ),
        (
            ["report.indication=true", "model.overrides.indication_reader=predictor"],
            "report.indication=True: expected false while model.overrides.indication_reader is predictor",
        ),
    ],
)
def test_predictor_recipe_contradictions_are_one_line(tiny_recipe, tmp_path, capsys, overrides, message):
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", *overrides]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_tags_count_for_what_they_are_kinds_of():
    assert expand_tags(["Spine/degenerative/mild", "Granuloma"]) == {
        *("Spine", "Spine/degenerative", "Spine/degenerative/mild", "Granuloma")
    }

    class Studies(dict):
        column_names = ("tags",)

    assert tag_names(Studies(tags=[["A/b"]] * 10 + [["A/c"]] * 15 + [None])) == ["A", "A/c"]
