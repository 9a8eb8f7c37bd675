from types import SimpleNamespace

import pytest
import torch
from otdrg.configuration_otdrg import OTDRGConfig
from otdrg.metrics import nlg_scores
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.training.data import build_studies
from otdrg.training.model import (
    attach_lora,
    build_model,
    cast_backbones,
    check_lora_targets,
    load_model,
    lora_fields,
    quantization_config,
    set_trained_parts,
)
from otdrg.training.recipe import ModelRecipe, recipe_from
from otdrg.training.run import run_recipe
from transformers import AutoModel


def test_set_trained_parts_modes_freeze_and_unfreeze():
    lora = {"r": 2, "target_modules": ["q_proj"]}
    model, processor = build_model(ModelRecipe(overrides={"lora": lora}), ["the lungs are clear ."])
    assert model.config.lora is None and model.config.image_token_id == processor.image_token_id

    def trained():
        return {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}

    frozen = set_trained_parts(model, vision="frozen", text="frozen", predictor="full", joining=False)
    assert trained() == {"finding_predictor"}
    assert model.vision_tower in frozen and model.language_model in frozen
    set_trained_parts(model, vision="full", text="full", predictor="full", joining=True)
    assert trained() == {"vision_tower", "language_model", "finding_predictor", "image_projector", "label_projector"}
    model.config.lora = lora
    model.add_lora()
    cast_backbones(model, "bfloat16")
    set_trained_parts(model, vision="frozen", text="lora", predictor="frozen", joining=True)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name or name.startswith(("image_projector", "label_projector")))
        is_backbone = name.startswith(("vision_tower", "language_model")) and "lora_" not in name
        assert str(weight.dtype) == ("torch.bfloat16" if is_backbone else "torch.float32"), name


def test_cast_backbones_keeps_the_type_of_buffers_that_are_not_saved():
    model, _ = build_model(ModelRecipe(), ["the lungs are clear ."])
    cast_backbones(model, "bfloat16")
    buffers = dict(model.language_model.named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert torch.equal(buffers["model.rotary_emb.inv_freq"], model.language_model.model.rotary_emb.inv_freq)
    assert model.vision_tower.dtype == model.language_model.dtype == torch.bfloat16
    saved = [buffer for buffer in model.vision_tower.state_dict().values() if buffer.is_floating_point()]
    assert {buffer.dtype for buffer in saved} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_load_model_equals_loading_in_float32_and_casting(dtype, tmp_path):
    recipe = ModelRecipe(dtype=dtype)
    model, processor = build_model(recipe, ["the lungs are clear ."])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, recipe)
    expected = OTDRGForReportGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    cast_backbones(expected, dtype)
    found, wanted = loaded.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


def test_load_model_makes_the_backbones_in_their_own_type(tmp_path, monkeypatch):
    recipe = ModelRecipe(dtype="bfloat16")
    model, processor = build_model(recipe, ["the lungs are clear ."])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before = []
    monkeypatch.setattr(
        "otdrg.training.model.cast_backbones", lambda model, _: before.append(model.language_model.dtype)
    )
    loaded, _ = load_model(tmp_path, recipe)
    assert before == [torch.bfloat16] and loaded.image_projector.linear.weight.dtype == torch.float32


def recipe_of(stage=None, overrides=None, quantization=None, **fields):
    model = {"overrides": overrides or {}, "quantization": quantization}
    sections = {} if stage is None else {stage: fields}
    return recipe_from({"output_dir": "run", "studies": {"source": "phantom"}, "model": model, **sections})


def test_lora_fields_without_lora_names_the_field():
    assert OTDRGConfig.from_preset("tiny").lora is None
    with pytest.raises(ValueError, match=r"report\.text=lora, but the preset tiny has no LoRA of the LLM: set model\."):
        lora_fields(recipe_of(), "report")
    message = r"predictor\.vision=lora, but .* set model\.overrides\.vision_lora to r.* or predictor\.vision to full"
    with pytest.raises(ValueError, match=message):
        lora_fields(recipe_of("predictor", vision="lora"), "predictor")


def test_lora_fields_are_those_the_stage_trains():
    lora = {field: {"r": 2, "target_modules": [name]} for field, name in (("lora", "q_proj"), ("vision_lora", "qkv"))}
    assert lora_fields(recipe_of("predictor", lora, vision="lora"), "predictor") == {"vision_lora": lora["vision_lora"]}
    assert lora_fields(recipe_of("report", lora), "report") == {"lora": lora["lora"]}
    assert lora_fields(recipe_of("report", lora, vision="lora", predictor="full"), "report") == lora
    assert lora_fields(recipe_of("report", lora, text="frozen"), "report") == {}


def test_lora_fields_dora_on_a_quantised_llm_is_refused(monkeypatch):
    lora = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    config = SimpleNamespace(lora=lora, vision_lora=None)
    monkeypatch.setattr("otdrg.training.model.preset_config", lambda recipe: config)
    assert lora_fields(recipe_of("report"), "report") == {"lora": lora}
    with pytest.raises(ValueError, match=r"lora\.use_dora=True: expected false while model\.quantization is set"):
        lora_fields(recipe_of("report", quantization="4bit"), "report")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"},
            r"'bnb_4bit_quant_typ' in model\.quantization: did you mean",
        ),
        ({"bnb_4bit_quant_type": "nf4"}, "expected load_in_4bit or load_in_8bit in it"),
    ],
)
def test_quantization_config_wrong_fields_are_named(quantization, message):
    with pytest.raises(ValueError, match=message):
        quantization_config(quantization)


SCRATCH = {
    "image_size": 56,
    "image_tokens": 4,
    "label_encoder": "table",
    "finding_text": "none",
    "prompt": "",
    "text_config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
}


def test_build_model_pretrained_encoder_with_an_llm_from_scratch(build_backbones, view, tmp_path):
    backbones = build_backbones(tmp_path)
    recipe = ModelRecipe(
        preset="small", vision=backbones["vision"], text="scratch", tokenizer="words", overrides=dict(SCRATCH)
    )
    reports = ["the lungs are clear .", "the heart is large .", "the lungs are clear ."]
    model, processor = build_model(recipe, reports)
    encoder = AutoModel.from_pretrained(backbones["vision"]).state_dict()
    assert all(torch.equal(weight, encoder[name]) for name, weight in model.vision_tower.state_dict().items())
    assert type(model.language_model).__name__ == "GPT2LMHeadModel" and model.config.text_backbone is None
    vocabulary = processor.tokenizer.get_vocab()
    assert "clear" in vocabulary and "heart" not in vocabulary  # seen once
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    processor.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    loaded = OTDRGForReportGeneration.from_pretrained(tmp_path / "model")
    inputs = OTDRGProcessor.from_pretrained(tmp_path / "model")(images=[view(0)])
    arguments = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(loaded.generate(**inputs, **arguments), model.eval().generate(**inputs, **arguments))


def test_run_recipe_llm_from_scratch_trains_and_encodes_views_once(build_backbones, tmp_path, caplog):
    size = {"max_steps": 2, "per_device_train_batch_size": 4}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    recipe = recipe_from(
        {
            "output_dir": str(tmp_path / "run"),
            "studies": {
                "source": "phantom",
                "options": {"train": 8, "validation": 3, "test": 0, "image_size": 56, "views": ["frontal"]},
                "cleaning": "r2gen_iu",
            },
            "model": {
                "preset": "small",
                "vision": build_backbones(tmp_path)["vision"],
                "text": "scratch",
                "tokenizer": "words",
                "overrides": {**SCRATCH, "finding_state_dropout": 0.1, "image_dropout": 0.2},
            },
            "predictor": {**size, "eval_strategy": "no"},
            "report": {
                **size,
                **evaluation,
                "text": "full",
                "train_sampling_strategy": "group_by_length",
                "abnormal_study_weight": 2.5,
                "abnormal_sentence_weight": 2.5,
                "metric_for_best_model": "bleu_1 + cider",
                "max_report_tokens": 20,
                "generation": {"num_beams": 1, "max_new_tokens": 4},
                "evaluation": {"metrics": ["bleu_4"], "controls": ["constant"]},
            },
        }
    )
    results = run_recipe(recipe)
    studies = build_studies(recipe.studies, recipe.labels)
    references, sums = list(studies["validation"]["report"]), []
    for report in set(studies["train"]["report"]):
        scores = nlg_scores([report] * len(references), references, ["bleu_1", "cider"])
        sums.append(scores["bleu_1"] + scores["cider"])
    assert min(sums) <= results["report"]["best"]["constant"] <= max(sums)
    assert len(list((tmp_path / "run" / "features").iterdir())) == 1
    assert "missing keys" not in caplog.text
    assert not (tmp_path / "run" / "adapter").exists()
    assert OTDRGForReportGeneration.from_pretrained(tmp_path / "run" / "model").config.vision_backbone is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": "encoder"}, r"model\.text is missing beside model\.vision: expected an LLM, or scratch"),
        ({"text": "llm"}, r"model\.vision is missing: expected a vision encoder beside model\.text"),
        (
            {"preset": "small", "text": "scratch", "label_text_encoder": "bert"},
            "label_text_encoder is given, but no pre",
        ),
        ({"preset": "small", "overrides": {"text_config": {}}}, r"model\.overrides\.text_config is given beside"),
    ],
)
def test_build_model_backbones_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelRecipe(**fields), ["clear ."])


def test_check_lora_targets_lora_on_all_linear_layers_leaves_the_head():
    lora = {"r": 2, "target_modules": "all-linear"}
    recipe = recipe_of("report", overrides={"lora": lora}, text="lora")
    model, _ = build_model(recipe.model, ["the lungs are clear ."])
    check_lora_targets(model, recipe, "report")
    attach_lora(model, recipe, "report")
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in adapted} == names
    model.merge_lora()
    assert not model.has_lora


def test_adapter_of_all_linear_layers_loads_as_it_was_saved(build_backbones, build_on_backbones, view, tmp_path):
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    model, processor = build_on_backbones(build_backbones(tmp_path), lora=lora)
    assert not any("lora_" in name for name, _ in model.get_output_embeddings().named_parameters())
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    loaded = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
    inputs = processor(images=[view(0)], report=["The lungs are clear."], finding_states={"edema": "positive"})
    inputs = model.expand_finding_text(**inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
        loaded.merge_lora()
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-4)
