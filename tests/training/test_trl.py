"""The model and its processor in TRL's trainers, without a change of theirs: three steps of each."""

import copy

import pytest
import torch
from datasets import Dataset
from otdrg import OTDRGForReportGeneration
from otdrg.rewards import Agreement, FindingF1, invented_comparisons, rouge_l
from peft import LoraConfig
from PIL import Image

trl = pytest.importorskip("trl", reason="trl is not installed (the extra `trl`)")

QUERY = "model.layers.0.self_attn.q_proj.weight"
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def policy(build_model):
    torch.manual_seed(0)
    return build_model()[0]


@pytest.fixture
def studies(views, reports, processor):
    """Studies of one and two views, each with a prompt as the model is trained on."""
    images = [Image.fromarray(view).convert("RGB") for view in views[:6]]
    rows = [images[:2], images[2:3], images[3:5], images[5:6]]
    prompt = [[{"role": "user", "content": f"\n{processor.prompt}"}]] * 4
    return {"images": rows, "prompt": prompt, "references": reports[:4]}


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(model, before):
    return {name.split(".")[0] for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_sft_trainer_first_loss_is_the_report_loss(policy, processor, studies, tmp_path):
    rows = Dataset.from_dict({name: studies[name] for name in ("images", "prompt")})
    rows = rows.add_column("completion", messages(studies["references"]))
    before = weights(policy)
    args = trl.SFTConfig(tmp_path, **{**COMMON, "per_device_train_batch_size": 4}, max_length=None)
    trainer = trl.SFTTrainer(policy, args, train_dataset=rows, processing_class=processor)
    batch = processor(images=studies["images"], report=studies["references"])
    with torch.no_grad():
        expected = policy.eval()(**policy.expand_finding_text(**batch)).report_loss
    trainer.train()
    assert trainer.state.global_step == 3 and losses(trainer)[0] == pytest.approx(float(expected), abs=1e-3)
    assert losses(trainer)[2] < losses(trainer)[0]
    assert changed(policy, before) == {"vision_tower", "language_model", "image_projector", "label_projector"}


def test_dpo_trainer_by_path_starts_at_log_two_and_learns_the_preference(run_folder, studies, tmp_path):
    rows = Dataset.from_dict({name: studies[name] for name in ("images", "prompt")})
    rows = rows.add_column("chosen", messages(studies["references"]))
    rows = rows.add_column("rejected", messages(["The heart is unchanged since the prior study."] * 4))
    options = {**COMMON, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "trust_remote_code": True}
    args = trl.DPOConfig(tmp_path, **options, max_length=None)
    # Policy, reference and processor are loaded by TRL.
    trainer = trl.DPOTrainer(str(run_folder / "model"), args=args, train_dataset=rows)
    trainer.train()
    first, second, third = losses(trainer)
    assert trainer.state.global_step == 3 and first == pytest.approx(0.6931, abs=1e-3) and third < second < first


def test_grpo_trainer_calls_the_rewards_and_trains(policy, processor, studies, tmp_path):
    study = policy.eval().read_study(
        **{name: processor(images=studies["images"])[name] for name in ("pixel_values", "view_mask")}
    )
    processor = copy.deepcopy(processor)
    processor.return_view_mask = False
    # Prompts of different lengths.
    asked = [f"\n{' '.join(['cough'] * place)} {processor.prompt}" for place in range(4)]
    studies["prompt"] = [[{"role": "user", "content": text}] for text in asked]
    rows = Dataset.from_dict({**studies, "finding_states": study.finding_states.tolist()})
    before, seen = weights(policy), []

    def spread(completions, **columns):
        """Different for equal completions, so that advantages are not 0."""
        seen.extend(completions)
        return [float(place) for place in range(len(completions))]

    args = trl.GRPOConfig(
        tmp_path,
        **COMMON,
        num_generations=2,
        max_completion_length=6,
        chat_template_kwargs={"return_tensors": None, "processor_kwargs": {"padding": False}},
    )
    rewards = [rouge_l, FindingF1(), Agreement(), invented_comparisons, spread]
    lora = LoraConfig(target_modules=r"language_model\..*\.(q_proj|v_proj)", r=4)
    trainer = trl.GRPOTrainer(policy, rewards, args, train_dataset=rows, processing_class=processor, peft_config=lora)
    trainer.train()
    assert trainer.state.global_step == 3 and len(seen) == 6
    lines = [line for line in trainer.state.log_history if "reward" in line]
    for name in ("rouge_l", "finding_f1", "agreement", "invented_comparisons", "spread"):
        assert all(f"rewards/{name}/mean" in line for line in lines)
    assert all(torch.tensor([line["loss"], line["grad_norm"]]).isfinite().all() for line in lines)
    adapters = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert adapters and all("language_model" in name and "lora_" in name for name in adapters)
    assert any(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name)
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reloaded = OTDRGForReportGeneration.from_pretrained(tmp_path / "merged")
    assert not torch.equal(reloaded.language_model.get_parameter(QUERY), before[f"language_model.{QUERY}"])
