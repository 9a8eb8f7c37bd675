"""The model: backbones of every layout, losses, states, LoRA, saving and loading.

Long because it follows one module that ships as one file.
"""

import copy
import itertools
import os

import numpy as np
import ot
import pytest
import torch
import transformers
from otdrg import (
    FINDING_STATES,
    FINDINGS,
    OTDRGConfig,
    OTDRGForReportGeneration,
    OTDRGProcessor,
    cost_matrix,
    focal_loss,
    sinkhorn,
)
from otdrg.findings_otdrg import NOT_GIVEN
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)
from transformers import AutoModelForCausalLM as CausalLM

EDEMA, NO_FINDING = FINDINGS.index("edema"), FINDINGS.index("no_finding")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
TIMM_SWIN = {"img_size": 56, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 7}
VISION_CONFIGS = {
    "dinov2": lambda: Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    ),
    "vit": lambda: ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=56,
        patch_size=14,
    ),
    "swin": lambda: SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "timm swin": lambda: TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", model_args=dict(TIMM_SWIN)),
    "timm resnet": lambda: TimmWrapperConfig(architecture="resnet10t"),
    "timm vit": lambda: TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2},
    ),
}
SIZES = {"dinov2": 56, "vit": 56, "swin": 64, "timm swin": 56, "timm resnet": 128, "timm vit": 64}
SMALL_LLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
TEXT_CONFIGS = {
    "llama": lambda n: LlamaConfig(vocab_size=n, intermediate_size=64, tie_word_embeddings=True, **SMALL_LLM),
    "qwen2": lambda n: Qwen2Config(vocab_size=n, intermediate_size=64, num_key_value_heads=1, **SMALL_LLM),
    "gpt_neox": lambda n: GPTNeoXConfig(vocab_size=n, intermediate_size=64, **SMALL_LLM),
    "opt": lambda n: OPTConfig(vocab_size=n, ffn_dim=64, word_embed_proj_dim=32, **SMALL_LLM),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, plain_tokenizer):
    """Folders of small backbones by name, an LLM's with its tokenizer (without our placeholders)."""
    root, tokenizer = tmp_path_factory.mktemp("backbones"), plain_tokenizer
    torch.manual_seed(0)
    folders = {}
    for name, make in VISION_CONFIGS.items():
        folders[name] = str(root / name.replace(" ", "_"))
        AutoModel.from_config(make()).save_pretrained(folders[name])
    for name, make in TEXT_CONFIGS.items():
        folders[name] = str(root / name)
        CausalLM.from_config(make(len(tokenizer))).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    folders["bert"] = str(root / "bert")
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(bert).save_pretrained(folders["bert"])
    tokenizer.save_pretrained(folders["bert"])
    return folders


@pytest.fixture
def study(processor, views, reports):
    """Three ragged studies with reports and states."""
    inputs = processor(images=[views[:3], views[3], views[4:6]], report=reports[:3])
    inputs["finding_states"] = torch.tensor(np.random.default_rng(0).integers(0, 4, (3, 14)))
    inputs["finding_states"][:, NO_FINDING] = 0
    return inputs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- from pretrained backbones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"])
def test_auto_classes_build_the_installed_model(tiny_config, name):
    assert type(getattr(transformers, name).from_config(copy.deepcopy(tiny_config))) is OTDRGForReportGeneration


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_from_backbones_vision_keeps_weights_and_gives_a_grid(backbones, vision):
    source = AutoModel.from_pretrained(backbones[vision]).eval()
    attention = source.config._attn_implementation
    model = OTDRGForReportGeneration.from_backbones(
        vision=backbones[vision], text=backbones["llama"], image_size=SIZES[vision], image_tokens=4
    ).eval()
    loaded = model.vision_tower.state_dict()
    assert loaded.keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert model.vision_tower.config._attn_implementation == attention
    size = SIZES[vision]
    pixels = torch.randn(2, 3, 3, size, size)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    features = model.encode_views(pixels, mask)
    assert features.shape == (2, 3, 4, model.image_projector.linear.in_features)
    assert (features[1, 1:] == 0).all()
    assert torch.allclose(features[1, :1], model.encode_views(pixels[1:, :1])[0], atol=1e-5)
    # The grid is the mean of the encoder's own map over its quarters.
    states = source(pixels[0]).last_hidden_state
    if states.ndim == 3:
        side = int(states.shape[1] ** 0.5)
        states = states[:, -side * side :].unflatten(1, (side, side))
    elif states.shape[1] == features.shape[-1]:
        states = states.permute(0, 2, 3, 1)
    side = states.shape[1]
    halves = slice(0, (side + 1) // 2), slice(side // 2, side)  # the middle row of an odd side is in both
    quarters = [states[:, rows, columns].mean(dim=(1, 2)) for rows in halves for columns in halves]
    expected = torch.stack(quarters, dim=1)
    assert torch.allclose(features[0], expected, atol=1e-4)


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_encode_views_changed_corner_changes_its_cell_most(backbones, vision):
    model = OTDRGForReportGeneration.from_backbones(
        vision=backbones[vision], text=backbones["llama"], image_size=SIZES[vision], image_tokens=4
    ).eval()
    size = SIZES[vision]
    plain = torch.randn(1, 1, 3, size, size)
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for cell, (row, column) in enumerate(corners):
        patched = plain.clone()
        span = size // 4
        top, left = (size - span) * row, (size - span) * column
        patched[..., top : top + span, left : left + span] = torch.randn(3, span, span) * 3
        change = (model.encode_views(patched) - model.encode_views(plain))[0, 0].norm(dim=-1)
        assert change.argmax() == cell, (vision, row, column, change.tolist())


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_from_backbones_llm_keeps_weights_and_generates(backbones, views, text):
    source = CausalLM.from_pretrained(backbones[text])
    attention = source.config._attn_implementation
    model = OTDRGForReportGeneration.from_backbones(
        vision=backbones["dinov2"], text=backbones[text], image_size=56, image_tokens=4, finding_text="all"
    ).eval()
    old, new = source.state_dict(), model.language_model.state_dict()
    vocabulary = source.get_input_embeddings().weight.shape[0]
    assert new.keys() == old.keys()
    for name, value in old.items():
        kept = new[name][:vocabulary] if value.shape != new[name].shape else new[name]
        assert torch.equal(kept, value), name
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size >= vocabulary + 3
    assert model.language_model.config._attn_implementation == attention == "sdpa"
    processor = OTDRGProcessor.from_backbones(vision=backbones["dinov2"], text=backbones[text], config=model.config)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    inputs = processor(images=[views[:2], views[2]], indication=["cough and fever", None])
    with torch.no_grad():
        batch = model(**inputs)
        for row, study in enumerate((views[:2], views[2:3])):
            alone = model(**processor(images=[study], indication=[("cough and fever", None)[row]]))
            length = alone.logits.shape[1]
            if text != "gpt_neox" or inputs["attention_mask"][row].all():
                assert torch.allclose(batch.logits[row, -length:], alone.logits[0], atol=1e-4)
    sequences = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    assert sequences.shape == (2, inputs["input_ids"].shape[1] + 6)
    for row, study in enumerate((views[:2], views[2:3])):
        alone = processor(images=[study], indication=[("cough and fever", None)[row]])
        single = model.generate(**alone, max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(single[0, -6:], sequences[row, -6:])


def test_from_backbones_saved_model_is_equal(backbones, views, reports, tmp_path):
    model = OTDRGForReportGeneration.from_backbones(
        vision=backbones["dinov2"],
        text=backbones["qwen2"],
        label_text_encoder=backbones["bert"],
        image_size=56,
        image_tokens=4,
    ).eval()
    processor = OTDRGProcessor.from_backbones(vision=backbones["dinov2"], text=backbones["qwen2"], config=model.config)
    encoder = AutoModel.from_pretrained(backbones["bert"]).state_dict()
    for name, value in model.label_encoder.text_encoder.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    inputs = processor(images=views[:2], report=reports[:2])
    model.save_pretrained(tmp_path)
    reloaded, info = OTDRGForReportGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(**inputs).logits, model(**inputs).logits)
    assert reloaded.language_model.config._attn_implementation == "sdpa"
    assert reloaded.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32])
def test_from_backbones_dtype_is_used(backbones, views, dtype):
    model = OTDRGForReportGeneration.from_backbones(
        vision=backbones["dinov2"], text=backbones["llama"], image_size=56, image_tokens=4, dtype=dtype
    )
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.vision_tower.dtype == model.language_model.dtype == wanted
    processor = OTDRGProcessor.from_backbones(vision=backbones["dinov2"], text=backbones["llama"], config=model.config)
    inputs = processor(images=views[:2], report=["Clear lungs.", "Effusion."])
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("part", ["vision", "text"])
def test_from_backbones_missing_backbone_is_named(backbones, part, tmp_path):
    references = {"vision": backbones["dinov2"], "text": backbones["llama"], part: str(tmp_path / "nowhere")}
    with pytest.raises(OSError, match=rf"{part} backbone '.*nowhere' could not be loaded: expected a Hub id") as error:
        OTDRGForReportGeneration.from_backbones(**references)
    assert "\n" not in str(error.value)


def test_from_backbones_wrong_field_is_named(backbones):
    with pytest.raises(ValueError, match=r"OTDRGConfig.image_tokens=5: expected a square number"):
        OTDRGForReportGeneration.from_backbones(vision=backbones["dinov2"], text=backbones["llama"], image_tokens=5)


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "bfloat16", "lora", "merged", "table"])
def test_save_pretrained_loaded_model_has_equal_logits(build_model, study, tmp_path, form):
    fields = {"lora": {"lora": LORA}, "merged": {"lora": LORA}, "table": {"label_encoder": "table"}}.get(form, {})
    model, _ = build_model(**fields)
    if "lora" in fields:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    if form == "bfloat16":  # not by `.to`, which would round the LLM's rotary frequencies too
        model.save_pretrained(tmp_path)
        model = OTDRGForReportGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(**study)
        if form == "merged":
            model.merge_lora()
            assert not model.has_lora
            assert model.config.lora is None
            assert torch.allclose(model(**study).logits, before.logits, atol=1e-4)
            before = model(**study)
        model.save_pretrained(tmp_path)
        reloaded, info = OTDRGForReportGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert not reloaded.training
        after = reloaded(**study)
    assert reloaded.has_lora == (form == "lora")
    assert reloaded.dtype == (torch.bfloat16 if form == "bfloat16" else torch.float32)
    for name in ("logits", "loss", "transport_plan", "finding_logits"):
        assert torch.equal(before[name], after[name]), name


def test_save_pretrained_folder_has_weights_and_code(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    code = {f"{part}_otdrg.py" for part in ("configuration", "modeling", "processing", "pipeline")}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", *code}
    assert "adapter_config.json" not in names


def test_from_pretrained_bfloat16_has_a_close_loss(model, study, tmp_path):
    model.save_pretrained(tmp_path)
    half = OTDRGForReportGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        output, exact = half(**study), model(**study)
    assert output.transport_plan.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_add_lora_starts_as_the_identity_and_learns(build_model, study):
    model, _ = build_model()
    with torch.no_grad():
        before = model(**study).logits
    model.config.lora = LORA
    model.add_lora()
    assert model.has_lora
    with torch.no_grad():
        assert torch.equal(model(**study).logits, before)
    weights = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(weights) == 2 * 2 * model.config.text_config.num_hidden_layers
    model.add_lora()
    assert [name for name, _ in model.named_parameters() if "lora_" in name] == weights
    model(**study).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_new_model_with_lora_equals_the_one_without(build_model, study):
    plain, _ = build_model()
    with_lora, _ = build_model(lora=LORA)
    renamed = {k.replace(".base_layer.", "."): v for k, v in with_lora.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(renamed)
    with torch.no_grad():
        assert torch.equal(plain(**study).logits, with_lora(**study).logits)


def test_add_lora_without_configuration_or_modules_is_named(build_model):
    model, _ = build_model()
    with pytest.raises(ValueError, match=r"OTDRGConfig.lora=None: expected the fields of peft.LoraConfig"):
        model.add_lora()
    model.config.lora = {**LORA, "target_modules": ["query"]}
    with pytest.raises(ValueError, match="query"):
        model.add_lora()


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_equals_the_formula(gamma):
    logits = torch.randn(3, 14, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (3, 14))
    labels[0, :4], labels[2] = -100, -100
    per_finding, per_study = [], []
    for row in range(3):
        crosses = []
        for finding in range(14):
            if labels[row, finding] != -100:
                p = (logits[row, finding].exp() / logits[row, finding].exp().sum())[labels[row, finding]].item()
                crosses.append(-np.log(p))
                per_finding.append((1 - p) ** gamma * -np.log(p))
        if crosses:
            total = sum(crosses)
            per_study.append((1 - np.exp(-total)) ** gamma * total)
    assert focal_loss(logits, labels, gamma).item() == pytest.approx(np.mean(per_finding), rel=1e-5)
    assert focal_loss(logits, labels, gamma, "study").item() == pytest.approx(np.mean(per_study), rel=1e-5)
    if gamma == 0:
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert focal_loss(logits, labels, 0).item() == pytest.approx(cross_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["finding", "study"])
def test_focal_loss_certain_or_no_labels_is_finite(reduction):
    labels = torch.full((2, 14), -100)
    logits = torch.randn(2, 14, 4, requires_grad=True)
    assert focal_loss(logits, labels, reduction=reduction).item() == 0
    labels[:] = 1
    certain = torch.full((2, 14, 4), -1e4)
    certain[..., 1] = 1e4
    for value in (certain, -certain):
        value = value.clone().requires_grad_()
        loss = focal_loss(value, labels, 0.5, reduction)
        loss.backward()
        assert loss.isfinite()
        assert value.grad.isfinite().all()


def test_forward_losses_add_up(build_model, study):
    model, _ = build_model(ot_weight=0.3)
    labels = torch.randint(0, 4, (3, 14))
    output = model(**study)
    assert output.predictor_loss is None
    assert torch.allclose(output.loss, output.report_loss + 0.3 * output.ot_loss)
    both = model(**study, finding_labels=labels)
    assert torch.allclose(both.predictor_loss, focal_loss(both.finding_logits, labels))
    assert torch.allclose(both.loss, both.report_loss + 0.3 * both.ot_loss + both.predictor_loss)
    assert torch.equal(both.report_loss, output.report_loss)
    # The schedule's attribute is what counts, and the configuration stays.
    model.ot_weight = 0.0
    assert torch.equal(model(**study).loss, output.report_loss)
    assert model.config.ot_weight == 0.3


def test_forward_report_loss_is_the_mean_over_report_tokens(model, study):
    expanded = model.expand_finding_text(**study)
    output = model(**expanded)
    ids, mask, labels = (expanded[name] for name in ("input_ids", "attention_mask", "labels"))
    assert output.logits.shape[:2] == ids.shape
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(output.report_loss, expected)
    assert (labels != -100).sum() == (study["labels"] != -100).sum()
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert mask.sum() == (study["attention_mask"].sum() + sum_of_texts(model, study["finding_states"]) - 3)


def sum_of_texts(model, states):
    table = model.config.finding_text_token_ids
    return sum(len(table[f][s]) for row in states.tolist() for f, s in enumerate(row) if s != 0)


def test_forward_training_drops_the_logits_before_the_report(build_model, study):
    model, _ = build_model()
    evaluated = model(**study)
    trained = model.train()(**study)
    assert torch.allclose(trained.report_loss, evaluated.report_loss, atol=1e-6)
    assert trained.logits.shape[1] < evaluated.logits.shape[1]


def test_forward_without_prompt_runs_the_predictor_alone(model, study):
    labels = torch.randint(0, 4, (3, 14))
    inputs = {key: study[key] for key in ("pixel_values", "view_mask")}
    output = model(**inputs, finding_labels=labels)
    assert output.logits is None
    assert output.finding_logits.shape == (3, 14, 4)
    assert torch.equal(output.loss, output.predictor_loss)
    features = model.encode_views(**inputs)
    again = model(view_features=features, view_mask=inputs["view_mask"], finding_labels=labels)
    assert torch.equal(again.finding_logits, output.finding_logits)


def test_forward_losses_train_report_and_predictor_separately(build_model, study):
    model, _ = build_model()
    model(**study).loss.backward()
    assert all(parameter.grad is None for parameter in model.finding_predictor.parameters())
    assert model.image_projector.linear.weight.grad.abs().sum() > 0
    assert model.label_projector.linear.weight.grad.abs().sum() > 0
    model.zero_grad()
    model(pixel_values=study["pixel_values"], view_mask=study["view_mask"], finding_labels=study["finding_states"])[
        "loss"
    ].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.finding_predictor.parameters())
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(build_model, study):
    plain, _ = build_model()
    checkpointed, _ = build_model()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.vision_tower.timm_model.layers[0].grad_checkpointing
    assert checkpointed.language_model.model.layers[0].gradient_checkpointing
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(0)  # of the encoder's stochastic depth
        model(**study, finding_labels=study["finding_states"], use_cache=False).loss.backward()
    wanted = dict(plain.named_parameters())
    moved = 0
    for name, parameter in checkpointed.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
            continue
        moved += 1
        assert torch.allclose(parameter.grad, wanted[name].grad, atol=1e-5), name
    assert moved > 30


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
@pytest.mark.parametrize("training", [True, False], ids=["reports", "prompts"])
def test_forward_batch_equals_single_studies(build_model, views, reports, view_fusion, training):
    model, processor = build_model(view_fusion=view_fusion)

    def run(inputs):
        return model(**model.expand_finding_text(**inputs))

    studies = [views[:3], views[3:4], views[4:6]]
    indications = ["a long history of cough, fever and pain", None, "cough"]
    states = torch.randint(0, 4, (3, 14))
    states[:, NO_FINDING] %= 2
    states[1] = 0
    more = {"report": reports[:3]} if training else {}
    batch_inputs = processor(images=studies, indication=indications, finding_states=states, **more)
    with torch.no_grad():
        batch = run(batch_inputs)
        losses = []
        for row in range(3):
            more = {"report": reports[row]} if training else {}
            alone = run(
                processor(
                    images=[studies[row]], indication=[indications[row]], finding_states=states[row : row + 1], **more
                )
            )
            length = alone.logits.shape[1]
            logits = batch.logits[row, :length] if training else batch.logits[row, -length:]
            assert torch.allclose(logits, alone.logits[0], atol=1e-4)
            assert torch.allclose(batch.finding_logits[row], alone.finding_logits[0], atol=1e-4)
            tokens = alone.transport_plan.shape[1]
            assert torch.allclose(batch.transport_plan[row, :tokens], alone.transport_plan[0], atol=1e-5)
            assert (batch.transport_plan[row, tokens:] == 0).all()
            losses.append(alone.ot_loss)
        if training:
            assert torch.allclose(batch.ot_loss, torch.stack(losses).mean(), atol=1e-5)
        else:
            assert batch.ot_loss is None


def test_forward_masked_view_has_no_effect(model, study):
    changed = {**study, "pixel_values": study["pixel_values"].clone()}
    changed["pixel_values"][~study["view_mask"]] = 7.0
    with torch.no_grad():
        assert torch.equal(model(**study).logits, model(**changed).logits)


# --- states ----------------------------------------------------------------------------------------------------------


def logits_of(probabilities):
    return torch.tensor(probabilities).clamp(min=1e-9).log()


def test_predict_states_takes_the_most_likely_possible_state(model):
    logits = torch.randn(5, 14, 4)
    logits[:, NO_FINDING] = logits_of([0.1, 0.2, 0.3, 0.4])
    states = model.predict_states(logits)
    assert torch.equal(states[:, :NO_FINDING], logits.argmax(dim=-1)[:, :NO_FINDING])
    assert (states[:, NO_FINDING] == 1).all()  # neither negative nor unclear
    probabilities = model.finding_probabilities(logits)
    assert torch.allclose(probabilities.sum(dim=-1), torch.ones(5, 14))
    assert torch.allclose(probabilities[0, NO_FINDING], torch.tensor([1 / 3, 2 / 3, 0, 0]))


def test_predict_states_thresholds_decide_what_is_positive(build_model):
    thresholds = [0.5] * 14
    thresholds[EDEMA], thresholds[0], thresholds[NO_FINDING] = 0.2, 0.0, 0.9
    model, _ = build_model(finding_thresholds=thresholds)
    logits = logits_of([0.2, 0.45, 0.25, 0.1]).repeat(1, 14, 1)
    states = model.predict_states(logits)[0]
    assert states[EDEMA] == states[0] == 1
    assert states[1] == 2  # 0.45 is likeliest and below 0.5: the likeliest other state
    assert states[NO_FINDING] == 0
    assert model.predict_states(logits_of([0.1, 0.5, 0.1, 0.3]).repeat(1, 14, 1))[0, 1] == 1


def test_condition_states_below_zero_are_predicted(model, study):
    logits = model(**study).finding_logits
    predicted = model.predict_states(logits)
    given = torch.full((3, 14), -1)
    given[1, EDEMA] = 3
    states = model.condition_states(logits, given)
    assert states[1, EDEMA] == 3
    keep = torch.ones(3, 14, dtype=torch.bool)
    keep[1, EDEMA] = False
    assert torch.equal(states[keep], predicted[keep])
    assert torch.equal(model.condition_states(logits, None), predicted)
    assert torch.equal(model.condition_states(logits, study["finding_states"]), study["finding_states"])


def test_condition_states_given_finding_excludes_no_finding(model):
    logits = torch.zeros(4, 14, 4)
    logits[:, :, 1] = 5.0  # all are predicted to be positive
    given = torch.full((4, 14), -1)
    given[0, EDEMA] = given[1, FINDINGS.index("support_devices")] = 1
    given[2, EDEMA] = 2
    given[3, [EDEMA, NO_FINDING]] = 1
    states = model.condition_states(logits, given)
    assert states[:, NO_FINDING].tolist() == [0, 1, 1, 1]
    assert (states[:, :EDEMA] == 1).all()


def test_forward_finding_states_condition_the_report_and_labels_do_not(model, study):
    def run(inputs, **more):
        return model(**model.expand_finding_text(**inputs, **more))

    with torch.no_grad():
        given = run(study)
        other = run({**study, "finding_states": (study["finding_states"] + 1) % 2})
        supervised = run(study, finding_labels=(study["finding_states"] + 1) % 4)
        inputs = {key: value for key, value in study.items() if key != "finding_states"}
        predicted = run(inputs)
        supervised_only = run(inputs, finding_labels=study["finding_states"])
        report_only = run(study, finding_labels=(study["finding_states"] + 1) % 4, report_only=True)
    assert not torch.allclose(given.report_loss, other.report_loss, atol=1e-4)
    assert torch.equal(given.logits, supervised.logits)
    assert torch.allclose(report_only.loss, supervised.loss) and "predictor_loss" in report_only
    kept = report_only.logits.shape[1]
    assert kept < supervised.logits.shape[1], "positions without a loss have logits"
    assert torch.allclose(report_only.logits, supervised.logits[:, -kept:], atol=1e-5)
    assert torch.equal(predicted.logits, supervised_only.logits)


def test_predicted_state_ratio_mixes_in_training_only(build_model, study):
    given, none = {}, {}
    for ratio in (0.0, 1.0):
        model, _ = build_model(predicted_state_ratio=ratio)
        inputs = {key: value for key, value in study.items() if key != "finding_states"}
        for training in (True, False):
            model.train(training)
            model.vision_tower.eval()  # no stochastic depth
            given[ratio, training] = model(**model.expand_finding_text(**study)).report_loss.item()
            none[ratio, training] = model(**model.expand_finding_text(**inputs)).report_loss.item()
    assert given[0.0, True] == pytest.approx(given[0.0, False], abs=1e-5)
    assert given[0.0, True] == pytest.approx(given[1.0, False], abs=1e-5)
    assert given[1.0, True] == pytest.approx(none[0.0, False], abs=1e-5)
    assert given[1.0, True] != pytest.approx(given[0.0, True], abs=1e-4)
    model.config.predicted_state_ratio = 0.5
    model.train()
    features = torch.randn(1000, 1, 4, model.image_projector.linear.in_features)
    labels, states = torch.zeros(1000, 1, dtype=torch.long), torch.full((1000, 14), 3)
    states[:, NO_FINDING] = 0
    mixed = model.expand_finding_text(view_features=features, finding_states=states, labels=labels)["finding_states"]
    drawn = (mixed != states).any(dim=1).float().mean()
    assert 0.4 < drawn < 0.6


# --- the label text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finding_text", ["mentioned", "all", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_expand_finding_text_replaces_the_placeholder(build_model, views, reports, finding_text, side):
    model, processor = build_model(finding_text=finding_text)
    states = torch.zeros(3, 14, dtype=torch.long)
    states[0, [1, EDEMA]], states[1, :13] = torch.tensor([1, 3]), 2
    more = {"report": reports[:3]} if side == "right" else {"indication": ["cough", None, "pain in the chest"]}
    inputs = processor(images=views[:3], finding_states=states, **more)
    expanded = model.expand_finding_text(**inputs)
    ids, mask, labels = expanded["input_ids"], expanded["attention_mask"], expanded.get("labels")
    assert ids.shape == mask.shape
    assert (labels is None) == (side == "left")
    for row in range(3):
        kept = mask[row].bool()
        assert mask[row].tolist() == sorted(mask[row].tolist(), reverse=side == "right")
        assert (ids[row][~kept] == processor.tokenizer.pad_token_id).all()
        named = [
            f" {name.replace('_', ' ')}: {FINDING_STATES[state]};"
            for name, state in zip(FINDINGS, states[row].tolist(), strict=True)
            if finding_text == "all" or (finding_text == "mentioned" and state)
        ]
        given = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        expected = processor.tokenizer.decode(given).replace("<finding_text>", "".join(named))
        assert processor.tokenizer.decode(ids[row][kept]) == expected
        if labels is not None:
            assert torch.equal(labels[row][labels[row] != -100], inputs["labels"][row][inputs["labels"][row] != -100])
            assert torch.equal(ids[row][labels[row] != -100], labels[row][labels[row] != -100])


def test_forward_placeholder_mismatch_quotes_both_numbers(model, processor, views):
    inputs = processor(images=views[:2])
    image = (inputs["input_ids"][1] == model.config.image_token_id).nonzero().flatten()
    inputs["input_ids"][1, image[0]] = processor.tokenizer.eos_token_id
    message = "image tokens and image features do not match in row 1: tokens: 3, features: 4"
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)
    inputs = processor(images=views[:2])
    finding = (inputs["input_ids"][0] == model.config.finding_token_id).nonzero().flatten()
    inputs["input_ids"][0, finding[:2]] = processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"finding tokens and finding features .* row 0: tokens: 12, features: 14"):
        model(**inputs)


def test_forward_without_an_image_is_refused(model, processor, views):
    inputs = processor(images=views[0])
    with pytest.raises(ValueError, match="no image: pixel_values is missing"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="a study has no image"):
        model(**{**inputs, "view_mask": torch.zeros(1, 1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"pixel_values has shape \(1, 3, 56, 56\): expected \(studies, views"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][0]})


@pytest.mark.parametrize(
    "fields",
    [{"fiot": False}, {"dle": False, "fiot": False}, {"fiot": False, "finding_text": "none"}],
    ids=["label text only", "no labels", "neither"],
)
def test_forward_switches_of_table_3_remove_their_part(build_model, views, reports, fields):
    model, processor = build_model(**fields)
    inputs = processor(images=[views[:2], views[2]], report=reports[:2])
    states = torch.zeros(2, 14, dtype=torch.long)
    output, other = (
        model(**model.expand_finding_text(**inputs, finding_states=given))
        for given in (states, torch.ones_like(states))
    )
    assert output.transport_plan is None
    assert output.ot_loss is None
    assert torch.equal(output.loss, output.report_loss)
    # States reach the LLM by the label text alone here.
    conditions = fields.get("dle", True) and fields.get("finding_text") != "none"
    assert (output.report_loss.item() != other.report_loss.item()) == conditions
    prompts = processor(images=[views[:2], views[2]])
    assert model.generate(**prompts, max_new_tokens=3, min_new_tokens=3).shape[1] == prompts["input_ids"].shape[1] + 3


# --- label encoders --------------------------------------------------------------------------------------------------


def test_label_encoder_embeddings_are_centred_means(model):
    features = model.label_encoder(model.get_input_embeddings())
    weight = model.get_input_embeddings().weight
    table = model.config.finding_text_token_ids
    means = torch.stack([torch.stack([weight[ids].mean(dim=0) for ids in row]) for row in table])
    assert torch.allclose(features, means - means.mean(dim=(0, 1)), atol=1e-6)
    assert not features.requires_grad
    assert torch.allclose(features.mean(dim=(0, 1)), torch.zeros(32), atol=1e-6)


def test_get_label_features_selects_the_states(model):
    states = torch.randint(0, 4, (2, 14))
    features = model.get_label_features(states)
    table = model.label_projector(model.label_encoder(model.get_input_embeddings()))
    for row in range(2):
        for finding in range(14):
            assert torch.equal(features[row, finding], table[finding, states[row, finding]])


def test_label_encoder_table_learns_used_states(build_model, study):
    model, _ = build_model(label_encoder="table", label_encoder_size=10)
    assert model.label_encoder(model.get_input_embeddings()).shape == (14, 4, 10)
    model(**study).loss.backward()
    gradient = model.label_encoder.table.weight.grad.reshape(14, 4, 10)
    used = torch.zeros(14, 4, dtype=torch.bool)
    for row in study["finding_states"].tolist():
        used[torch.arange(14), torch.tensor(row)] = True
    assert (gradient[~used] == 0).all()
    assert (gradient[used].norm(dim=-1) > 0).all()


def test_label_encoder_text_encoder_is_frozen_and_centred(backbones, views, reports):
    model = OTDRGForReportGeneration.from_backbones(
        vision=backbones["dinov2"],
        text=backbones["llama"],
        label_text_encoder=backbones["bert"],
        image_size=56,
        image_tokens=4,
    )
    processor = OTDRGProcessor.from_backbones(vision=backbones["dinov2"], text=backbones["llama"], config=model.config)
    features = model.label_encoder(model.get_input_embeddings())
    assert features.shape == (14, 4, 24)
    assert torch.allclose(features.mean(dim=(0, 1)), torch.zeros(24), atol=1e-5)
    model(**processor(images=views[:2], report=reports[:2])).loss.backward()
    assert all(parameter.grad is None for parameter in model.label_encoder.text_encoder.parameters())
    assert model.label_projector.linear.weight.grad.abs().sum() > 0
    model.train()
    assert torch.equal(model.label_encoder(model.get_input_embeddings()), features)


# --- transport -------------------------------------------------------------------------------------------------------


def features_of(model, study):
    view_features = model.encode_views(study["pixel_values"], study["view_mask"])
    image, mask = model.project_views(view_features, study["view_mask"])
    return image, mask, model.get_label_features(study["finding_states"])


@pytest.mark.parametrize(
    ("normalization", "labels", "view_fusion"),
    [
        ("none", "all", "mean"),
        ("unit", "all", "concat"),
        ("none", "mentioned", "concat"),
        ("unit", "mentioned", "mean"),
    ],
)
def test_forward_ot_loss_is_the_transport_of_projected_features(
    build_model, study, processor, views, reports, normalization, labels, view_fusion
):
    model, processor = build_model(ot_cost_normalization=normalization, ot_labels=labels, view_fusion=view_fusion)
    study = {
        **processor(images=[views[:2], views[2]], report=reports[:2]),
        "finding_states": study["finding_states"][:2],
    }
    study["finding_states"][0] = 0  # nothing mentioned
    study["finding_states"][1, 3] = 1
    output = model(**study)
    image, mask, label = features_of(model, study)
    cost = cost_matrix(image, label, normalization)
    wanted = study["finding_states"] != 0 if labels == "mentioned" else None
    expected = sinkhorn(cost, 0.1, row_mask=mask, column_mask=wanted)
    assert torch.allclose(output.transport_plan, expected.plan, atol=1e-6)
    assert torch.allclose(output.ot_loss, expected.distance.mean(), atol=1e-6)
    if labels == "mentioned":
        assert (output.transport_plan[0] == 0).all()
        assert (output.transport_plan[1][:, study["finding_states"][1] == 0] == 0).all()
    assert output.loss.isfinite()
    for name in ("ot_marginal_error", "plan_entropy", "epsilon_to_cost", "label_spread"):
        assert output[name].isfinite()
        assert not output[name].requires_grad
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_forward_transport_figures_equal_their_formulas(build_model, study):
    model, _ = build_model()
    image, _, label = features_of(model, study)
    output = model(**study)
    assert output.epsilon_to_cost.item() == pytest.approx(
        0.1 / cost_matrix(image, label, "unit").mean().item(), rel=1e-4
    )
    entropy = torch.special.entr(output.transport_plan).sum(dim=(1, 2)) / np.log(4 * 14)
    assert output.plan_entropy.item() == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert 0 < output.plan_entropy < 1
    spread = (label - label.mean(dim=1, keepdim=True)).norm(dim=-1).mean() / label.norm(dim=-1).mean()
    assert output.label_spread.item() == pytest.approx(spread.item(), rel=1e-4)
    model.ot_epsilon = 1e3
    flat = model(**study)
    assert flat.plan_entropy.item() == pytest.approx(1, abs=1e-4)
    assert flat.epsilon_to_cost.item() == pytest.approx(1e4 * output.epsilon_to_cost.item(), rel=1e-3)
    assert model.config.ot_epsilon == 0.1
    with torch.no_grad():  # labels that collapse into one
        model.label_projector.linear.weight.zero_()
    assert model(**study).label_spread.item() == pytest.approx(0, abs=1e-5)


def test_ot_gradient_unroll_changes_the_gradient_and_not_the_value(build_model, study):
    losses, gradients = [], []
    for gradient in ("envelope", "unroll"):
        model, _ = build_model(ot_gradient=gradient)
        loss = model(**study).ot_loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.label_projector.linear.weight.grad)
    assert losses[0] == losses[1]
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.01)


@pytest.mark.parametrize(("labels", "view_fusion"), [("all", "concat"), ("mentioned", "mean")])
def test_finding_tokens_transported_are_label_features_plus_pot_transported_image(
    build_model, study, views, reports, labels, view_fusion
):
    fields = {"ot_labels": labels, "view_fusion": view_fusion, "ot_cost_normalization": "unit", "ot_epsilon": 0.2}
    model, processor = build_model(finding_tokens="transported", ot_max_iterations=5000, ot_tolerance=1e-7, **fields)
    inputs = processor(images=[views[:2], views[2]])
    states = inputs["finding_states"] = study["finding_states"][:2]
    embeddings, _ = model.get_prompt_embeddings(**inputs)
    expanded = model.expand_finding_text(**inputs)
    image, mask, label = features_of(model, inputs)
    for row in range(2):
        takes_part = (states[row] != 0 if labels == "mentioned" else torch.ones(14)).bool()
        x, y = image[row, mask[row]].double(), label[row, takes_part].double()
        cost = torch.cdist(F.normalize(x, dim=1), F.normalize(y, dim=1)).detach().numpy()
        uniform = [np.full(size, 1 / size) for size in cost.shape]
        plan = ot.sinkhorn(*uniform, cost, 0.2, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12, warn=False)
        expected = label[row].clone()
        expected[takes_part] += (len(y) * torch.as_tensor(plan).T @ x).float()
        tokens = embeddings[row, expanded["input_ids"][row] == model.config.finding_token_id]
        assert torch.allclose(tokens, expected, atol=1e-4)
        # What reaches a label is a mean of image tokens: the weights of the transported ones add up to 1.
        assert (len(y) * plan.T).sum(axis=1) == pytest.approx(np.ones(len(y)), abs=1e-6)


def test_finding_tokens_labels_are_the_default_and_differ_from_transported(build_model, study):
    plain, _ = build_model()
    assert plain.config.finding_tokens == "labels"
    transported, _ = build_model(finding_tokens="transported")
    inputs = plain.expand_finding_text(**study)
    one, other = plain(**inputs), transported(**inputs)
    # The same weights, and the same plan, on which the LLM does not depend in one of them.
    assert torch.equal(one.transport_plan, other.transport_plan) and torch.equal(one.ot_loss, other.ot_loss)
    assert not torch.allclose(one.logits, other.logits, atol=1e-3)


def test_finding_tokens_transported_pass_gradients_to_the_image(build_model, study):
    gradients = {}
    for tokens in ("labels", "transported"):
        for gradient in ("envelope", "unroll"):
            model, _ = build_model(finding_tokens=tokens, ot_gradient=gradient, ot_weight=0.0)
            with torch.no_grad():
                # Without image tokens in their places, the image reaches the LLM by the label tokens alone.
                embeddings = model.get_input_embeddings()(study["input_ids"])
            model._place_features = only_findings(model._place_features)
            model(**{**study, "inputs_embeds": embeddings}).report_loss.backward()
            gradients[tokens, gradient] = model.image_projector.linear.weight.grad
    assert gradients["labels", "envelope"] is None and gradients["labels", "unroll"] is None
    assert gradients["transported", "envelope"].abs().sum() > 0
    assert not torch.allclose(gradients["transported", "envelope"], gradients["transported", "unroll"], rtol=1e-3)


def only_findings(place):
    """`_place_features` that leaves the image out."""
    return lambda what, ids, embeds, *features: embeds if what == "image" else place(what, ids, embeds, *features)


def test_forward_contrastive_ot_term_equals_the_loop(build_model, study):
    plain, _ = build_model()
    model, _ = build_model(ot_contrastive_weight=0.5, ot_contrastive_temperature=0.2)
    study["finding_states"][2] = study["finding_states"][0]  # the same labels are no negatives
    image, image_mask, label = features_of(model, study)
    expected = contrastive_loss_by_loop(image, image_mask, label, torch.ones(3, 14, dtype=torch.bool), 0.2)
    difference = model(**study).ot_loss - plain(**study).ot_loss
    assert difference.item() == pytest.approx(0.5 * expected.item(), rel=1e-3)
    one = {key: value[:1] for key, value in study.items()}
    assert torch.equal(model(**one).ot_loss, plain(**one).ot_loss)


def test_contrastive_ot_term_keeps_masks(build_model, study):
    """Each pair has the view mask of its image and the labels of its other study, in the loss and in its gradient."""
    model, _ = build_model(ot_contrastive_temperature=0.2, ot_labels="mentioned")
    image, _, label = features_of(model, study)
    states = torch.zeros(3, 14, dtype=torch.long)
    states[0, 2] = states[1, EDEMA] = states[2, [2, EDEMA]] = 1
    image_mask = torch.ones(image.shape[:2], dtype=torch.bool)
    image_mask[1, image.shape[1] // 2 :] = False
    losses, gradients = [], []
    for loss in (
        lambda *features: model._contrastive_ot_loss(features[0], image_mask, features[1], states),
        lambda *features: contrastive_loss_by_loop(features[0], image_mask, features[1], states != 0, 0.2),
    ):
        features = [part.detach().clone().requires_grad_() for part in (image, label)]
        losses.append(loss(*features))
        losses[-1].backward()
        gradients.append([part.grad for part in features])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_contrastive_ot_term_of_states_that_may_be_the_same(build_model, study):
    """A finding that is not given is no difference, and a study without labels takes no part."""
    model, _ = build_model(ot_labels="mentioned", ot_contrastive_temperature=0.2)
    image, image_mask, label = features_of(model, study)
    states = torch.zeros(3, 14, dtype=torch.long)
    states[:, 2], states[1, EDEMA] = 1, 2
    two = model._contrastive_ot_loss(image[:2], image_mask[:2], label[:2], states[:2])
    assert two > 0.1
    states[2, 2] = 0
    empty = model._contrastive_ot_loss(image, image_mask, label, states)
    assert torch.isfinite(empty)
    states[0, EDEMA] = NOT_GIVEN
    assert model._contrastive_ot_loss(image[:2], image_mask[:2], label[:2], states[:2]).item() == 0
    assert model._contrastive_ot_loss(image[2:], image_mask[2:], label[2:], states[2:]).item() == 0
    output = model(**{**study, "finding_states": torch.zeros(3, 14, dtype=torch.long)})
    assert torch.isfinite(output.epsilon_to_cost) and torch.isfinite(output.loss)


def contrastive_loss_by_loop(image, image_mask, label, label_mask, temperature):
    """InfoNCE of the distances of all pairs; studies of equal labels are no negatives of each other."""
    rows = []
    for i in range(len(image)):
        costs = [cost_matrix(image[i : i + 1], label[j : j + 1], "unit") for j in range(len(label))]
        masks = [{"row_mask": image_mask[i : i + 1], "column_mask": label_mask[j : j + 1]} for j in range(len(label))]
        rows.append(torch.stack([sinkhorn(cost, **mask).distance[0] for cost, mask in zip(costs, masks, strict=True)]))
    distance = torch.stack(rows)
    logits = -distance / (temperature * distance.detach().mean())
    for i, j in itertools.permutations(range(len(label)), 2):
        if torch.equal(label[i], label[j]):
            logits[i, j] = -torch.inf
    return F.cross_entropy(logits, torch.arange(len(label)))


def test_transport_lift_is_the_plan_over_the_grid(build_model, views):
    model, processor = build_model(view_fusion="concat", ot_labels="mentioned")
    inputs = processor(images=[views[:2], views[2]])
    states = torch.zeros(2, 14, dtype=torch.long)
    states[:, [2, EDEMA]] = 1
    view_features = model.encode_views(inputs["pixel_values"], inputs["view_mask"])
    lift = model.transport_lift(view_features, inputs["view_mask"], states)
    assert lift.shape == (2, 2, 14, 2, 2)
    plan = model(**inputs, finding_states=states).transport_plan
    # the second row of tokens of the second view, for edema
    assert torch.allclose(lift[0, 1, EDEMA, 1], plan[0, 6:8, EDEMA] * 8 * 2, atol=1e-5)
    assert lift[0, :, EDEMA].mean().item() == pytest.approx(1, abs=1e-3)
    assert lift[1, 0, EDEMA].mean().item() == pytest.approx(1, abs=1e-3)
    assert (lift[1, 1] == 0).all()
    assert (lift[:, :, 0] == 0).all()


def test_from_preset_tiny_has_49_tokens():
    """The tiny preset as it ships: 49 tokens of a 112-pixel view."""
    config = OTDRGConfig.from_preset("tiny")
    OTDRGProcessor.from_texts(["Clear lungs."], config=config, vocab_size=400)
    model = OTDRGForReportGeneration(config).eval()
    with torch.no_grad():
        features = model.encode_views(torch.randn(1, 1, 3, 112, 112))
    assert features.shape == (1, 1, 49, 128)
    assert torch.isfinite(features).all()


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("OTDRG_LLM", "").endswith(".gguf"), reason="OTDRG_LLM does not name a GGUF file (make llm)"
)
def test_from_backbones_gguf_is_dequantised_and_can_be_saved(tmp_path, views):
    """SmolLM2 reads a plain sentence as well as a language model should, which packed weights in bfloat16 did not."""
    text = os.environ["OTDRG_LLM"]
    vision = AutoModel.from_config(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    )
    vision.save_pretrained(tmp_path / "vision")
    model = OTDRGForReportGeneration.from_backbones(
        vision=str(tmp_path / "vision"), text=text, dtype="bfloat16", image_size=56, image_tokens=4
    ).eval()
    processor = OTDRGProcessor.from_backbones(vision=str(tmp_path / "vision"), text=text, config=model.config)
    inputs = processor(images=[views[:1]], report=["The lungs are clear. There is no pleural effusion."])
    with torch.no_grad():
        loss = model(**inputs).report_loss
    assert loss < 5
    model.save_pretrained(tmp_path / "model")
    again = OTDRGForReportGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        # What joins the backbones was float32, and is bfloat16 now.
        assert float(again(**inputs).report_loss) == pytest.approx(float(loss), abs=0.05)
