"""The label predictor's own encoder, and LoRA of the vision encoders."""

import json

import numpy as np
import pytest
import torch
from otdrg import FINDINGS, OTDRGConfig, OTDRGForReportGeneration, focal_loss
from otdrg.pipeline_otdrg import ReportGenerationPipeline
from otdrg.training.model import cast_backbones, set_trained_parts
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config, LlamaConfig

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
ENCODERS = {
    "timm swin": ({}, {**LORA, "target_modules": ["qkv"]}),
    "dinov2": ({"vision_config": DINOV2}, {**LORA, "target_modules": ["q_proj", "v_proj"]}),
}
each_encoder = pytest.mark.parametrize("encoder", ENCODERS)


@pytest.fixture(scope="module")
def own(build_model):
    """Shared: do not change it."""
    return build_model(predictor_encoder="own")[0]


@pytest.fixture
def study(processor, views, reports):
    """Two ragged studies with reports and states."""
    inputs = processor(images=[views[:3], views[3]], report=reports[:2])
    inputs["finding_states"] = torch.tensor(np.random.default_rng(0).integers(0, 2, (2, 14)))
    return inputs


def views_of(study):
    return {"pixel_values": study["pixel_values"], "view_mask": study["view_mask"]}


def encoder_calls(model, call):
    """How often each of the two encoders runs."""
    counts = [0, 0]

    def count(position):
        def hook(*_):
            counts[position] += 1

        return hook

    hooks = [tower.register_forward_hook(count(position)) for position, tower in enumerate(model.vision_towers)]
    call()
    for hook in hooks:
        hook.remove()
    return counts


def stir(part, names):
    """Move those weights of a part whose names hold `names`, as training might."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if names in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


# --- an encoder of its own -------------------------------------------------------------------------------------------


def test_encode_views_concatenates_both_encoders(own, study):
    with torch.no_grad():
        both = own.encode_views(**views_of(study))
        report = own.encode_views(**views_of(study), reader="report")
        predictor = own.encode_views(**views_of(study), reader="predictor")
    size = own.image_projector.linear.in_features
    assert both.shape == (2, 3, 4, 2 * size)
    assert torch.equal(both, torch.cat((report, predictor), dim=-1))
    assert not torch.allclose(report, predictor), "an untrained encoder is drawn by itself"
    assert (both[1, 1:] == 0).all()


def test_own_encoder_each_part_reads_its_own_features(own, study):
    size = own.image_projector.linear.in_features
    with torch.no_grad():
        features = own.encode_views(**views_of(study))
        noise = torch.randn_like(features)
        fields = {**study, "pixel_values": None}
        plain = own(**fields, view_features=features)
        other_report = torch.cat((noise[..., :size], features[..., size:]), dim=-1)
        other_predictor = torch.cat((features[..., :size], noise[..., size:]), dim=-1)
        report, predictor = (own(**fields, view_features=changed) for changed in (other_report, other_predictor))
    assert torch.equal(plain.finding_logits, report.finding_logits)
    assert not torch.allclose(plain.finding_logits, predictor.finding_logits)
    assert torch.equal(plain.logits, predictor.logits) and torch.equal(plain.transport_plan, predictor.transport_plan)
    assert not torch.allclose(plain.logits, report.logits)
    # What an encoder of the predictor's own gives alone will do.
    alone = own.finding_predictor(features[..., size:], study["view_mask"]).finding_logits
    assert torch.equal(alone, plain.finding_logits)


def test_own_encoder_report_training_keeps_the_predictor(build_model, study):
    for predictor_encoder, kept in (("own", True), ("shared", False)):
        model, _ = build_model(predictor_encoder=predictor_encoder)
        with torch.no_grad():
            before = model(**views_of(study)).finding_logits
            stir(model.vision_tower, "")
            assert torch.equal(model(**views_of(study)).finding_logits, before) == kept


def test_own_encoder_only_needed_encoders_run(build_model, study):
    model, _ = build_model(predictor_encoder="own")
    states = study.pop("finding_states")
    views = views_of(study)
    assert encoder_calls(model, lambda: model(**views)) == [0, 1]
    assert encoder_calls(model, lambda: model(**study, finding_states=states)) == [1, 1]
    model.train()
    assert encoder_calls(model, lambda: model(**views, finding_labels=states)) == [0, 1]
    assert encoder_calls(model, lambda: model(**study, finding_states=states)) == [1, 0]
    assert encoder_calls(model, lambda: model(**study)) == [1, 1]
    assert encoder_calls(model, lambda: model(**study, finding_states=states - 1)) == [1, 1]
    assert encoder_calls(model, lambda: model(**study, finding_states=states, finding_labels=states)) == [1, 1]
    with torch.no_grad():
        skipped = model(**study, finding_states=states)
        model.config.predicted_state_ratio = 1e-9
        assert encoder_calls(model, lambda: model(**study, finding_states=states)) == [1, 0]
        assert torch.equal(skipped.loss, model(**study, finding_states=states).loss)
        assert encoder_calls(model, lambda: model.expand_finding_text(**study, finding_states=states)) == [0, 0]
    model.config.predicted_state_ratio = 1.0
    assert encoder_calls(model, lambda: model.expand_finding_text(**study, finding_states=states)) == [0, 1]


def test_own_encoder_pipeline_gives_reports_heatmaps_and_probabilities(own, processor, views):
    pipe = ReportGenerationPipeline(model=own, processor=processor)
    few = {"max_new_tokens": 6, "min_new_tokens": 6, "return_heatmaps": True}
    batch = pipe([[views[0], views[1]], views[2]], batch_size=2, **few)
    inputs = processor(images=[views[2]])
    written = own.generate(**inputs, max_new_tokens=6, min_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert batch[1][0]["generated_text"] == processor.decode(written[0], skip_special_tokens=True).strip()
    assert batch[0][0]["heatmaps"]["edema"].shape == (2, 2, 2)
    alone = pipe(views[2], **few)[0]
    assert alone["generated_text"] == batch[1][0]["generated_text"]
    with torch.no_grad():
        expected = own.finding_probabilities(own(**views_of(inputs)).finding_logits).amax(dim=-1)[0]
    for position, name in enumerate(FINDINGS):
        assert alone["findings"][name]["probability"] == pytest.approx(expected[position].item(), abs=1e-5)


@each_encoder
def test_own_encoder_from_backbones_is_a_copy(encoder, processor, study, tmp_path):
    fields, _ = ENCODERS[encoder]
    source = AutoModel.from_config(
        Dinov2Config(**DINOV2) if fields else OTDRGConfig.from_preset("tiny", image_size=56).vision_config
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    source.save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    references = {"vision": str(tmp_path / "vision"), "text": str(tmp_path / "text")}
    model = OTDRGForReportGeneration.from_backbones(**references, predictor_encoder="own", image_tokens=4)
    expected, copied = source.state_dict(), model.finding_vision_tower.state_dict()
    assert copied.keys() == expected.keys()
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(copied[name], expected[name]) and torch.equal(value, expected[name]), name
        assert copied[name].data_ptr() != value.data_ptr(), name
    towers = [tower.config._attn_implementation for tower in model.vision_towers]
    assert towers[0] == towers[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_reaches_both_encoders(build_model, study):
    gradients = []
    for checkpointed in (False, True):
        model, _ = build_model(predictor_encoder="own")
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert all(tower.timm_model.layers[0].grad_checkpointing for tower in model.vision_towers)
        model.train()
        model(**study, finding_labels=study["finding_states"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert {name.split(".")[0] for name in plain} >= {"vision_tower", "finding_vision_tower"}
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)


def test_own_encoder_trained_parts_stay_float32(build_model, study):
    model, _ = build_model(predictor_encoder="own")
    cast_backbones(model, "bfloat16")
    assert {p.dtype for tower in model.vision_towers for p in tower.parameters()} == {torch.bfloat16}
    frozen = set_trained_parts(
        model, vision="frozen", text="frozen", predictor="full", joining=False, finding_vision="full"
    )
    assert {p.dtype for p in model.finding_vision_tower.parameters()} == {torch.float32}
    assert {p.dtype for p in model.vision_tower.parameters()} == {torch.bfloat16}
    assert model.vision_tower in frozen and model.finding_vision_tower not in frozen
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"finding_vision_tower", "finding_predictor"}
    # Features of two types are joined in the wider one.
    assert model.encode_views(**views_of(study)).dtype == torch.float32
    model(**study, finding_labels=study["finding_states"]).predictor_loss.backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())


# --- LoRA of the vision encoders -------------------------------------------------------------------------------------


@each_encoder
@pytest.mark.parametrize("predictor_encoder", ["shared", "own"])
def test_vision_lora_starts_as_the_identity_learns_and_merges(build_model, study, encoder, predictor_encoder):
    fields, lora = ENCODERS[encoder]
    model, _ = build_model(predictor_encoder=predictor_encoder, **fields)
    with torch.no_grad():
        before = model(**study)
    model.config.vision_lora = lora
    model.add_lora()
    model.add_lora()
    with torch.no_grad():
        after = model(**study)
    assert model.has_lora
    assert torch.equal(before.logits, after.logits) and torch.equal(before.finding_logits, after.finding_logits)

    set_trained_parts(model, vision="lora", text="frozen", predictor="frozen", joining=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("vision_tower.") and "lora_" in name for name in trained)
    others = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**study).loss.backward()
        optimizer.step()
    model.eval()
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)
    with torch.no_grad():
        learned = model(**study)
        assert not torch.allclose(learned.logits, before.logits, atol=1e-4)
        assert torch.equal(learned.finding_logits, before.finding_logits) == (predictor_encoder == "own")
        model.merge_lora()
        merged = model(**study)
    assert not model.has_lora and model.config.vision_lora is None
    assert torch.allclose(merged.logits, learned.logits, atol=1e-5)
    assert torch.allclose(merged.finding_logits, learned.finding_logits, atol=1e-5)
    if predictor_encoder == "own":
        assert torch.equal(merged.finding_logits, before.finding_logits), "an identity is merged without a trace"


@each_encoder
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("original_format", [True, False])
def test_own_encoder_loaded_model_has_equal_logits(build_model, study, tmp_path, encoder, adapted, original_format):
    fields, lora = ENCODERS[encoder]
    text_lora = {**LORA, "target_modules": ["q_proj"]}
    fields = {**fields, "vision_lora": lora, "lora": text_lora} if adapted else fields
    model, _ = build_model(predictor_encoder="own", **fields)
    assert model.has_lora == adapted
    stir(model, "lora_B")
    with torch.no_grad():
        before = model(**study)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    reloaded, info = OTDRGForReportGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert reloaded.config.predictor_encoder == "own" and reloaded.has_lora == adapted
    with torch.no_grad():
        after = reloaded(**study)
    for name in ("logits", "loss", "finding_logits", "transport_plan"):
        assert torch.equal(before[name], after[name]), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_reaches_the_adapters(build_model, study):
    lora = ENCODERS["timm swin"][1]
    gradients = []
    for checkpointed in (False, True):
        model, _ = build_model(vision_lora=lora)
        stir(model, "lora_B")
        set_trained_parts(model, vision="lora", text="frozen", predictor="frozen", joining=False)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()(**study, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)


def test_add_lora_missing_vision_modules_are_named(build_model):
    model, _ = build_model()
    model.config.vision_lora = {**LORA, "target_modules": ["query"]}
    with pytest.raises(ValueError, match=r"OTDRGConfig\.vision_lora=\{.*query.*not found"):
        model.add_lora()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("predictor_encoder", "mine", "one of 'shared', 'own'"),
        ("vision_lora", "qkv", "the fields of peft.LoraConfig"),
    ],
)
def test_config_wrong_encoder_values_are_named(field, value, allowed):
    with pytest.raises(ValueError) as error:
        OTDRGConfig.from_preset("tiny", **{field: value})
    assert str(error.value) == f"OTDRGConfig.{field}={value!r}: expected {allowed}"


def test_config_own_encoder_survives_json(build_config):
    config = build_config(predictor_encoder="own", vision_lora={**LORA, "target_modules": ["qkv"]})
    again = OTDRGConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert (again.predictor_encoder, again.vision_lora) == (config.predictor_encoder, config.vision_lora)


# --- logit adjustment ------------------------------------------------------------------------------------------------


def test_finding_logit_adjustment_changes_the_training_loss_only(build_model, study):
    model, _ = build_model()
    labels = study["finding_states"]
    with torch.no_grad():
        plain = model(**views_of(study), finding_labels=labels)
        model.finding_logit_adjustment = torch.randn(14, 4)
        evaluated = model(**views_of(study), finding_labels=labels)
        trained = model.train()(**views_of(study), finding_labels=labels)
    adjusted = focal_loss(plain.finding_logits + model.finding_logit_adjustment, labels)
    assert torch.equal(evaluated.loss, plain.loss)
    assert torch.allclose(trained.loss, adjusted) and not torch.allclose(adjusted, plain.loss)
    assert torch.allclose(trained.finding_logits, plain.finding_logits, atol=1e-6)
