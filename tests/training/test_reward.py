"""The stage `reward`: its loss is that of RLOO, rewards rise, and a resumed run equals an unbroken one."""

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from otdrg import FINDINGS
from otdrg.hub_card.push import assemble_adapter
from otdrg.inference.loading import load_published, published_folder
from otdrg.metrics.rewards import REWARDS, Agreement, Cider
from otdrg.train_hf import main
from otdrg.training.data import build_studies
from otdrg.training.model import load_model
from otdrg.training.recipe import load_recipe
from otdrg.training.reward import leave_one_out, reward_trainer, starting_weights
from otdrg.training.stages import StageRun
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector

EDEMA = FINDINGS.index("edema")
SECTION = [
    "stages=[predictor,report,reward]",
    "reward.max_steps=4",
    "reward.per_device_train_batch_size=4",
    "reward.num_samples=3",
    "reward.learning_rate=1e-2",
    "reward.logging_steps=1",
    "reward.save_strategy=steps",
    "reward.save_steps=2",
    "reward.save_total_limit=null",
]


def training_lines(run):
    history = json.loads((run / "results.json").read_text(encoding="utf-8"))["reward"]["log_history"]
    return [line for line in history if "loss" in line]


@pytest.fixture(scope="module")
def rewarded(tiny_recipe, trained_run, tmp_path_factory):
    """The finished run with the stage `reward` after its report stage."""
    run = shutil.copytree(trained_run, tmp_path_factory.mktemp("rewarded") / "run")
    assert main([str(tiny_recipe), f"output_dir={run}", *SECTION, "--resume"]) == 0
    return run


@pytest.fixture
def build_trainer(tiny_recipe, trained_run, tmp_path):
    """The Trainer of the stage as it begins."""

    def build(*overrides):
        recipe = load_recipe(tiny_recipe, [f"output_dir={tmp_path}", *SECTION, *overrides])
        model, processor = load_model(trained_run / "model", recipe.model)
        studies = build_studies(recipe.studies, recipe.labels)
        studies = {"train": studies["train"]}
        return reward_trainer(StageRun(recipe, studies, model, processor, tmp_path / "reward"))

    return build


# --- a run -----------------------------------------------------------------------------------------------------------


def test_reward_stage_logs_rewards_and_starts_without_divergence(rewarded):
    lines = training_lines(rewarded)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        parts = {name: line[f"rewards/{name}"] for name in ("cider", "bleu_4", "agreement")}
        total = parts["cider"] + parts["bleu_4"] + 0.5 * parts["agreement"]
        assert line["reward"] == pytest.approx(total, abs=1e-5)
        assert line["loss"] == pytest.approx(line["policy_loss"] + 0.05 * line["kl"], abs=1e-6)
        assert 0 < line["completion_length"] <= 12
    assert lines[0]["kl"] == 0 and all(line["kl"] > 0 for line in lines[1:])


def test_reward_stage_trains_the_adapters_and_publishes_beside_the_report_model(trained_run, rewarded, tmp_path):
    before, kept, after = (
        load_file(folder / "model.safetensors")
        for folder in (trained_run / "model", rewarded / "model", rewarded / "reward")
    )
    assert all(torch.equal(before[name], kept[name]) for name in before)
    for name, weight in before.items():
        adapted = name.startswith("language_model.") and ("q_proj" in name or "v_proj" in name)
        assert torch.equal(weight, after[name]) != adapted, name
    model, _ = load_published(str(rewarded))
    assert published_folder(rewarded) == rewarded / "reward" and published_folder(trained_run) == trained_run / "model"
    assert model.config.lora is None and model.generation_config.max_new_tokens == 12
    assert (rewarded / "reward" / "validation" / "step-000004.csv").is_file()
    with pytest.raises(ValueError, match="the model of stage reward has no adapter of its backbones"):
        assemble_adapter(str(rewarded), "org/model", tmp_path, {})


def test_reward_stage_resumed_equals_an_unbroken_run(tiny_recipe, rewarded, tmp_path):
    run = shutil.copytree(rewarded, tmp_path / "run")
    (run / "reward" / "finished.json").unlink()
    (run / "reward" / "checkpoint-4" / "trainer_state.json").unlink()
    assert published_folder(run) == run / "model"
    assert main([str(tiny_recipe), f"output_dir={run}", *SECTION, "--resume"]) == 0
    unbroken, resumed = training_lines(rewarded), training_lines(run)
    for name in ("loss", "kl", "reward", "rewards/agreement", "completion_length"):
        assert [line[name] for line in resumed] == pytest.approx([line[name] for line in unbroken], abs=1e-6)
    one, other = (load_file(folder / "reward" / "model.safetensors") for folder in (rewarded, run))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_reward_stage_without_a_report_stage_is_refused(tiny_recipe, trained_run, tmp_path, capsys):
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}", *SECTION, "stages=[predictor,reward]"]) == 1
    assert "has none of this run: run stages=[predictor,report,reward]" in capsys.readouterr().err
    # The predictor would be trained again, and the report stage's model is that of the former one.
    run = shutil.copytree(trained_run, tmp_path / "copy")
    assert main([str(tiny_recipe), f"output_dir={run}", *SECTION, "stages=[predictor,reward]"]) == 1
    assert "run stages=[predictor,report,reward]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.num_samples=1", "reward.num_samples=1: expected a number of at least 2"),
        ("reward.rewards={cidr: 1}", "reward.rewards='cidr': expected some of cider, bleu_4, rouge_l, find"),
        ("reward.rewards={cider: .inf}", "reward.rewards.cider=inf: expected a finite number"),
        ("reward.rewards={cider: 0}", "reward.rewards={'cider': 0}: expected a weight other than 0"),
        ("reward.temperature=0", "reward.temperature=0: expected a number above 0"),
        ("reward.vision=full", "reward.vision='full': expected frozen"),
        ("reward.gradient_checkpointing=true", "reward.gradient_checkpointing=True: expected false"),
    ],
)
def test_reward_section_wrong_value_is_one_line(tiny_recipe, override, message):
    with pytest.raises(ValueError) as error:
        load_recipe(tiny_recipe, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_reward_stage_trains_in_two_processes(tiny_recipe, trained_run, launch, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    launch(["-m", "otdrg.train_hf", str(tiny_recipe), f"output_dir={run}", *SECTION, "--resume"], OMP_NUM_THREADS="1")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["reward"]
    assert (results["processes"], results["wrapper"]) == (2, "DistributedDataParallel")
    lines = training_lines(run)
    assert lines[0]["kl"] == 0 and all(line["grad_norm"] > 0 for line in lines)


# --- the loss --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-10, 10)))
def test_leave_one_out_advantages_are_differences_from_the_others_and_add_up_to_0(rewards):
    advantages = leave_one_out(torch.as_tensor(rewards)).numpy()
    assert advantages.sum(axis=1) == pytest.approx(np.zeros(len(rewards)), abs=1e-9)
    for row, column in np.ndindex(rewards.shape):
        others = np.delete(rewards[row], column)
        assert advantages[row, column] == pytest.approx(rewards[row, column] - others.mean(), abs=1e-9)


@pytest.mark.parametrize(
    "overrides", [["reward.temperature=0.7"], ["reward.text=full", "reward.rewards={cider: 2.0}"]], ids=["lora", "full"]
)
def test_reward_loss_equals_the_loop_over_single_samples(build_trainer, trained_run, overrides):
    """An oracle that reads each sample alone, without padding, with another instance of the starting model."""
    trainer = build_trainer(
        "reward.kl_weight=0.3",
        "report.generation={max_new_tokens: 8}",
        "reward.per_device_train_batch_size=2",
        *overrides,
    )
    model, args = trainer.model, trainer.args
    with torch.no_grad():
        for name, weight in model.language_model.named_parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    start, _ = load_model(trained_run / "model", load_recipe(trained_run / "recipe.yaml").model)
    batch = next(iter(trainer.get_train_dataloader()))
    # Samples of several lengths: a frequent token ends them, too.
    frequent = Counter(trainer.sample(batch).tokens.flatten().tolist()).most_common(1)[0][0]
    ends = model.generation_config.eos_token_id = [trainer.processor.tokenizer.eos_token_id, frequent]
    trainer._part = -1
    loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    trainer._part = -1
    samples = trainer.sample(batch)
    assert len(set(samples.mask.sum(dim=1).tolist())) > 1

    k, reports = args.num_samples, list(trainer.train_dataset["report"])
    cider, agreement = Cider(reports), Agreement("rules")
    policy_loss = divergence = count = 0.0
    for row, reference in enumerate(batch["references"]):
        states = batch["finding_states"][row : row + 1]
        rewards, sums, kls = [], [], []
        for sample in range(row * k, row * k + k):
            ids = samples.tokens[sample].tolist()
            length = next((place for place, token in enumerate(ids, 1) if token in ends), len(ids))
            ids = ids[:length]
            text = " ".join(trainer.processor.tokenizer.decode(ids, skip_special_tokens=True).split())
            pair = {"completions": [text], "references": [reference]}
            if "temperature=0.7" in overrides[0]:
                bleu = REWARDS["bleu_4"]([], "rules")(**pair)[0]
                agrees = agreement(**pair, finding_states=states.numpy())[0]
                rewards.append(cider(**pair)[0] + bleu + 0.5 * agrees)
            else:
                rewards.append(2.0 * cider(**pair)[0])
            prompt = {name: batch[name][row : row + 1] for name in ("view_features", "view_mask")}
            prompt |= trainer.processor.encode_text([int(batch["view_mask"][row].sum())], finding_states=states)
            log_p = {}
            for name, network in (("now", model.eval()), ("start", start.eval())):
                inputs = network.expand_finding_text(**prompt)
                length = inputs["input_ids"].shape[1]
                inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([ids])), dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                logits = network(**inputs).logits[0, length - 1 : -1].double() / args.temperature
                log_p[name] = logits.log_softmax(dim=-1)
            sums.append(sum(log_p["now"][place, token] for place, token in enumerate(ids)))
            kls.append((log_p["now"].exp() * (log_p["now"] - log_p["start"])).sum())
            count += len(ids)
        for sample in range(k):
            baseline = sum(reward for place, reward in enumerate(rewards) if place != sample) / (k - 1)
            policy_loss -= (rewards[sample] - baseline) * sums[sample]
            divergence += kls[sample]
    assert outputs["policy_loss"].item() == pytest.approx(policy_loss.item() / count, rel=1e-4, abs=1e-5)
    assert outputs["kl"].item() == pytest.approx(divergence.item() / count, rel=1e-4)
    assert loss.item() == pytest.approx((policy_loss + 0.3 * divergence).item() / count, rel=1e-4, abs=1e-5)


def test_reward_stage_with_image_dropout_starts_without_divergence(build_trainer):
    trainer = build_trainer("model.overrides.image_dropout=0.5")
    batch = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert outputs["kl"].item() == pytest.approx(0, abs=1e-6)


def test_reward_stage_predicts_states_from_indications(build_trainer):
    trainer = build_trainer("model.overrides.indication_reader=both", "model.overrides.predicted_state_ratio=1")
    with torch.no_grad():
        trainer.model.finding_predictor.words.weight.view(-1, 14, 4)[:, EDEMA, 1] = 1000
    rows = [{**trainer.train_dataset[place], "indication": "dyspnoea"} for place in range(2)]
    trainer.model.train()
    assert trainer.sample(trainer.data_collator(rows)).finding_states[:, EDEMA].tolist() == [1] * 6


def test_starting_weights_are_those_without_adapters_and_leave_them_trained(build_trainer):
    trainer = build_trainer()
    model = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = trainer.sample(batch).inputs
    model.eval()
    with torch.no_grad():
        first = model(**inputs).logits
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(1.0)
        assert not torch.allclose(model(**inputs).logits, first)
        with starting_weights(model, None) as reference:
            assert torch.equal(reference(**inputs).logits, first)
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in model.named_parameters())


def test_reward_that_is_not_finite_is_one_line(build_trainer, monkeypatch):
    monkeypatch.setitem(
        REWARDS, "broken", lambda reports, labeler: lambda completions, **_: [math.nan] * len(completions)
    )
    trainer = build_trainer("reward.rewards={broken: 1.0}")
    with pytest.raises(ValueError, match=r"^reward.rewards: broken of a sample is nan, expected a finite number$"):
        trainer.train_stage(resume=False)


def test_rewards_rise_where_one_letter_is_rewarded(build_trainer, monkeypatch):
    """Without training the letter's mean share stays where it is: its standard error over 5 steps is below .01."""
    letters = []

    def share(completions, **columns):
        return [sum(map(text.count, letters)) / max(len(text), 1) for text in completions]

    monkeypatch.setitem(REWARDS, "share", lambda reports, labeler: share)
    trainer = build_trainer(
        "reward.rewards={share: 1.0}",
        "reward.text=full",
        "reward.max_steps=30",
        "reward.num_samples=8",
        "reward.kl_weight=0",
        "reward.load_best_model_at_end=false",
        "reward.save_strategy=no",
        "reward.per_device_train_batch_size=2",
        "reward.lr_scheduler_type=constant",
    )
    samples = trainer.sample(next(iter(trainer.get_train_dataloader())))
    texts = trainer.processor.batch_decode(samples.tokens, skip_special_tokens=True)
    letters += [letter for letter, _ in Counter("".join("".join(texts).split())).most_common(1)]
    before = parameters_to_vector(trainer.reference.parameters()).clone()
    trainer.train_stage(resume=False)
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    assert torch.equal(parameters_to_vector(trainer.reference.parameters()), before)
