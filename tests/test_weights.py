"""Weights in folders: whole and as adapters, their SHA-256, and what is refused."""

import copy
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from otdrg import OTDRGConfig, OTDRGForReportGeneration, OTDRGProcessor, weight_files_otdrg
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BitsAndBytesConfig

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
FEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install otdrg[quantization])",
)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, build_backbones):
    """Shared: do not change them."""
    return build_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def trained(backbones, build_on_backbones):
    """Shared: do not change it."""
    return build_on_backbones(backbones)


@pytest.fixture
def study(trained, views):
    return trained[1](images=[views[:2], views[2]])


def assert_same(model, other, inputs):
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **FEW), other.generate(**inputs, **FEW))


def test_adapter_holds_what_was_trained_and_restores_the_model(trained, study, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    model.save_pretrained(tmp_path / "full")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "model.safetensors" in files and not any(name.startswith("adapter_") for name in files)
    stored = load_file(tmp_path / "adapter" / "model.safetensors")
    backbone = [name for name in stored if name.startswith(("vision_tower", "language_model")) and "lora_" not in name]
    # The placeholders' rows, of the embeddings and, tied to them, of the head.
    assert all(name.endswith(".added_rows") and len(stored[name]) == 3 for name in backbone) and backbone
    assert sum("lora_" in name for name in stored) == 8
    again, info = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter", output_loading_info=True)
    assert not info["missing_keys"] and not again.training
    assert (
        again.config.lora == model.config.lora
        and again.generation_config.eos_token_id == model.generation_config.eos_token_id
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert_same(model, again, study)
    sizes = [(tmp_path / form / "model.safetensors").stat().st_size for form in ("adapter", "full")]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        ({"tied": False, "bias": True}, {}),
        # DINOv2's modules have other names in early transformers 5.
        ({}, {"predictor_encoder": "own", "vision_lora": {"r": 4, "target_modules": ["q_proj", "query"]}}),
        ({}, {"dtype": "bfloat16"}),
    ],
    ids=["untied, biased", "two encoders with adapters", "bfloat16"],
)
def test_adapter_of_other_backbones_restores_the_model(
    build_backbones, build_on_backbones, views, tmp_path, made, fields
):
    backbones = build_backbones(tmp_path, **made)
    model, processor = build_on_backbones(backbones, **fields)
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    again = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(again.dtype)
    assert_same(model, again, processor(images=[views[:2], views[2]]))
    again.save_pretrained(tmp_path / "second", weights="adapter")
    stored, second = (load_file(tmp_path / name / "model.safetensors") for name in ("adapter", "second"))
    assert stored.keys() == second.keys()


def test_adapter_holds_a_trained_encoder(backbones, build_on_backbones, study, tmp_path):
    model, _ = build_on_backbones(backbones)
    with torch.no_grad():
        model.vision_tower.layernorm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    stored = load_file(tmp_path / "adapter" / "model.safetensors")
    assert [name for name in stored if name.startswith("vision_tower")] == ["vision_tower.layernorm.weight"]
    assert_same(model, OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter"), study)


def test_adapter_loaded_can_be_merged_and_saved_whole(trained, study, tmp_path):
    trained[0].save_pretrained(tmp_path / "adapter", weights="adapter")
    model = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
    model.merge_lora()
    model.save_pretrained(tmp_path / "merged")
    merged = OTDRGForReportGeneration.from_pretrained(tmp_path / "merged")
    assert merged.config.lora is None and not merged.has_lora
    with torch.no_grad():
        logits = [it(**study).logits for it in (trained[0], merged)]
    assert torch.allclose(*logits, atol=1e-4)


def test_adapter_fields_and_keywords_are_used(trained, tmp_path):
    trained[0].save_pretrained(tmp_path / "adapter", weights="adapter")
    model = OTDRGForReportGeneration.from_pretrained(
        tmp_path / "adapter", ot_epsilon=0.05, dtype=torch.bfloat16, device_map="auto", attn_implementation="eager"
    )
    assert model.ot_epsilon == 0.05 and model.dtype == torch.bfloat16
    assert model.language_model.config._attn_implementation == "eager"
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_adapter_with_another_configuration_loads_its_own_files(trained, study, tmp_path):
    trained[0].save_pretrained(tmp_path / "adapter", weights="adapter")
    loaded = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
    assert loaded.config.weights == "full"
    assert_same(trained[0], OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter", config=loaded.config), study)
    content = json.loads((tmp_path / "adapter" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "ot_epsilon": 0.7, "weights_sha256": {"other": "0"}}))
    model = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter", config=tmp_path)
    assert model.ot_epsilon == 0.7
    moved = shutil.copytree(trained[0].config.text_backbone, tmp_path / "moved")
    model = OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter", text_backbone=str(moved))
    assert_same(trained[0], model, study)
    with pytest.raises(OSError, match=r"moved/config.json: model_type is 'llama', expected 'otdrg'"):
        OTDRGForReportGeneration.from_pretrained(moved)


def test_adapter_holds_trained_tied_embeddings(backbones, build_on_backbones, study, tmp_path):
    model, _ = build_on_backbones(backbones)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path, weights="adapter", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = OTDRGForReportGeneration.from_pretrained(tmp_path)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert_same(model, again, study)


def test_adapter_holds_the_label_text_encoder(backbones, build_on_backbones, plain_tokenizer, study, tmp_path):
    config = BertConfig(
        vocab_size=len(plain_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "labels")
    plain_tokenizer.save_pretrained(tmp_path / "labels")
    model = OTDRGForReportGeneration.from_backbones(
        **backbones,
        label_text_encoder=str(tmp_path / "labels"),
        vision_backbone=backbones["vision"],
        text_backbone=backbones["text"],
        image_size=56,
        image_tokens=4,
    ).eval()
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    shutil.rmtree(tmp_path / "labels")
    assert_same(model, OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter"), study)


def test_adapter_saving_does_not_change_the_model(trained, build_model, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    assert (model.config.weights, model.config.backbone_sha256, model.config.backbone_revisions) == ("full", None, None)
    model.save_pretrained(tmp_path / "full")
    content = json.loads((tmp_path / "full" / "config.json").read_text())
    assert (content["weights"], content["backbone_sha256"], content["backbone_revisions"]) == ("full", None, None)
    scratch, _ = build_model()
    with pytest.raises(ValueError, match="vision_backbone"):
        scratch.save_pretrained(tmp_path / "none", weights="adapter")
    assert scratch.config.weights == "full"


def test_adapter_of_another_backbone_is_refused(build_backbones, build_on_backbones, tmp_path):
    backbones = build_backbones(tmp_path)
    model, _ = build_on_backbones(backbones)
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    file = tmp_path / "text" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(OSError, match=r"an adapter of another text backbone than .*/text': the SHA-256"):
        OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(OSError, match=r"an adapter of the text backbone .*/text', which could not be loaded"):
        OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")


def test_adapter_without_backbone_references_is_refused(build_model, tmp_path):
    model, _ = build_model()
    with pytest.raises(ValueError, match=r"OTDRGConfig.vision_backbone=None: expected the Hub id or folder"):
        model.save_pretrained(tmp_path, weights="adapter")
    with pytest.raises(ValueError, match="weights='half': expected 'full' or 'adapter'"):
        model.save_pretrained(tmp_path, weights="half")


def test_adapter_that_lacks_weights_is_refused(trained, tmp_path):
    """transformers would warn, and draw them at random."""
    trained[0].save_pretrained(tmp_path / "adapter", weights="adapter")
    file, config = tmp_path / "adapter" / "model.safetensors", tmp_path / "adapter" / "config.json"
    weights = load_file(file)
    del weights["image_projector.linear.weight"]
    save_file(weights, file, {"format": "pt"})
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "weights_sha256": None}))
    with pytest.raises(OSError, match=r"1 weights are missing, such as image_projector.linear.weight, and 0 are unkn"):
        OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("form", ["adapter", "full"])
def test_from_pretrained_quantised_llm_is_close(backbones, build_on_backbones, views, tmp_path, kind, form):
    model, processor = build_on_backbones(backbones)
    if form == "full":
        model.merge_lora()
    model.save_pretrained(tmp_path / "model", weights=form)
    packed = OTDRGForReportGeneration.from_pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(**{f"load_in_{kind}": True})
    )
    layers = [name for name, it in packed.named_modules() if type(it).__module__.startswith("bitsandbytes")]
    # Seven in each of two layers.
    assert len(layers) == 14 and all(name.startswith("language_model.model.") for name in layers)
    inputs = processor(images=[views[:2], views[2]])
    with torch.no_grad():
        close = torch.cosine_similarity(packed(**inputs).logits.float(), model(**inputs).logits, dim=-1)
    assert close.mean() > 0.9
    if form == "adapter":
        packed.save_pretrained(tmp_path / "again", weights="adapter")
        stored, again = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
        assert stored.keys() == again.keys()
        assert all(torch.allclose(stored[n].float(), again[n].float(), atol=1e-2) for n in stored)


# --- LoRA and quantisation options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 16}},
        {"lora_bias": True},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_lora_options_of_peft_survive_saving_and_merging(build_backbones, build_on_backbones, views, tmp_path, options):
    backbones = build_backbones(tmp_path / "backbones", bias="lora_bias" in options)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    model, processor = build_on_backbones(backbones, lora=lora)
    study = processor(images=[views[:2], views[2]])
    with torch.no_grad():
        logits = model(**study).logits
    for form in ("adapter", "full"):
        model.save_pretrained(tmp_path / form, weights=form)
        again = OTDRGForReportGeneration.from_pretrained(tmp_path / form)
        assert again.config.lora == lora
        assert_same(model, again, study)
    again.merge_lora()
    with torch.no_grad():
        assert torch.allclose(again(**study).logits, logits, atol=1e-4)


def test_lora_config_object_is_stored_as_its_fields(build_model, tmp_path):
    model, _ = build_model(lora=LoraConfig(r=4, target_modules={"v_proj", "q_proj"}, use_rslora=True))
    model.save_pretrained(tmp_path)
    lora = OTDRGConfig.from_pretrained(tmp_path).lora
    assert lora == {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}


def test_add_lora_bias_without_a_bias_to_merge_into_is_refused(build_model):
    model, _ = build_model()
    model.config.lora = {"target_modules": ["q_proj"], "lora_bias": True}
    with (
        pytest.warns(UserWarning, match="no bias"),
        pytest.raises(ValueError, match="lora_bias=True: expected modules"),
    ):
        model.add_lora()


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_add_lora_on_a_quantised_llm_refuses_what_cannot_be_merged(model, option):
    quantised = copy.deepcopy(model)
    quantised.language_model.is_quantized = True
    quantised.config.lora = {"r": 4, "target_modules": ["q_proj"], option: True}
    with pytest.raises(ValueError, match=rf"OTDRGConfig.lora.{option}=True: expected false, since the LLM is quantis"):
        quantised.add_lora()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [("2bit", "quantization_config='2bit': expected '4bit', '8bit'"), ({"bits": 4}, "quantization_config.bits: expec")],
)
def test_from_backbones_wrong_quantisation_is_named(backbones, quantization, message):
    with pytest.raises(ValueError, match=message):
        OTDRGForReportGeneration.from_backbones(**backbones, quantization_config=quantization)


# --- SHA-256 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Names of the files whose SHA-256 is computed, with a memory in a folder of the test."""
    names, digest = [], weight_files_otdrg._digest
    monkeypatch.setattr(weight_files_otdrg, "_digest", lambda path: names.append(Path(path).name) or digest(path))
    monkeypatch.setattr(weight_files_otdrg, "_SMALLEST_REMEMBERED", 0)
    monkeypatch.setattr(weight_files_otdrg, "_SETTLED_SECONDS", -1)
    monkeypatch.setattr(weight_files_otdrg.constants, "HF_HOME", str(tmp_path / "home"))
    return names


@pytest.mark.parametrize("home", ["writable", "not writable", "damaged"])
def test_from_pretrained_of_an_adapter_hashes_backbones_once(
    build_backbones, build_on_backbones, tmp_path, hashed, home
):
    model, _ = build_on_backbones(build_backbones(tmp_path))
    model.save_pretrained(tmp_path / "adapter", weights="adapter")
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    memory = tmp_path / "home" / "otdrg_sha256.json"
    if home == "not writable":
        memory.mkdir(parents=True)
    elif home == "damaged":
        memory.parent.mkdir()
        memory.write_text("{")
    counts = []
    for _ in range(2):
        hashed.clear()
        OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
        counts.append(len(hashed))
    assert counts == ([3, 3] if home == "not writable" else [3, 0])
    file = tmp_path / "text" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, {"format": "pt"})
    hashed.clear()
    with pytest.raises(OSError, match="an adapter of another text backbone"):
        OTDRGForReportGeneration.from_pretrained(tmp_path / "adapter")
    assert hashed[-1] == "model.safetensors"


def test_sha256_of_a_small_or_just_changed_file_is_not_remembered(tmp_path, hashed, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    for name, value in (("_SMALLEST_REMEMBERED", 8), ("_SETTLED_SECONDS", 60)):
        with monkeypatch.context() as patch:
            patch.setattr(weight_files_otdrg, name, value)
            hashed.clear()
            digests = {weight_files_otdrg.sha256(file), weight_files_otdrg.sha256(file)}
            assert digests == {hashlib.sha256(b"weights").hexdigest()} and len(hashed) == 2


def test_from_pretrained_damaged_weights_of_the_right_size_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    OTDRGForReportGeneration.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"model.safetensors is damaged, or does not belong to config.json beside it"):
        OTDRGForReportGeneration.from_pretrained(tmp_path)


def test_save_pretrained_lists_new_shards_only(model, tmp_path):
    for shards in ("200KB", "400KB", "50GB"):
        model.save_pretrained(tmp_path, max_shard_size=shards)
        content = json.loads((tmp_path / "config.json").read_text())["weights_sha256"]
        assert set(content) == {path.name for path in tmp_path.glob("*.safetensors")}
        OTDRGForReportGeneration.from_pretrained(tmp_path)


def test_save_pretrained_lists_weights_of_a_variant(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="half")
    listed = json.loads((tmp_path / "config.json").read_text())["weights_sha256"]
    assert set(listed) == {"model.safetensors", "model.half.safetensors"}
    for variant in (None, "half"):
        OTDRGForReportGeneration.from_pretrained(tmp_path, variant=variant)
    file = tmp_path / "model.half.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    OTDRGForReportGeneration.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.half\.safetensors is damaged"):
        OTDRGForReportGeneration.from_pretrained(tmp_path, variant="half")


def test_save_pretrained_without_weights_lists_none(model, tmp_path):
    # As DeepSpeed has it where the processes do not gather what they share.
    model.save_pretrained(tmp_path, state_dict={})
    assert json.loads((tmp_path / "config.json").read_text())["weights_sha256"] is None


def test_save_pretrained_other_process_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


def test_from_pretrained_configuration_of_another_model_brings_no_sums(model, build_model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    other, _ = build_model(seed=1)
    other.save_pretrained(tmp_path / "second")
    config = OTDRGConfig.from_pretrained(tmp_path / "first")
    again = OTDRGForReportGeneration.from_pretrained(tmp_path / "second", config=config)
    assert torch.equal(again.image_projector.linear.weight, other.image_projector.linear.weight)


def test_from_pretrained_folder_without_sums_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    del content["weights_sha256"]
    config.write_text(json.dumps(content))
    assert OTDRGForReportGeneration.from_pretrained(tmp_path).config.weights_sha256 is None


def test_save_pretrained_changed_model_has_new_sums(model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    again = OTDRGForReportGeneration.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        again.image_projector.linear.bias.add_(1)
    again.save_pretrained(tmp_path / "second")
    OTDRGForReportGeneration.from_pretrained(tmp_path / "second")
    sums = [json.loads((tmp_path / name / "config.json").read_text())["weights_sha256"] for name in ("first", "second")]
    assert all(one != other for one, other in pairwise(sums))


# --- weights that are not listed -------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    """A model in shards."""
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.half.safetensors",
        "model-00003-of-00003.safetensors",
        "renamed.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.half.bin",
        "adapter_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "adapter_config.json",
    ],
)
def test_from_pretrained_unlisted_weight_file_is_refused(saved, name):
    shard = next(saved.glob("model-*.safetensors"))
    shutil.copy(shard, saved / name)
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved / name))} is not among the weight files"):
        OTDRGForReportGeneration.from_pretrained(saved)


def test_from_pretrained_unlisted_variant_is_refused(saved):
    listed = json.loads((saved / "config.json").read_text())
    shutil.copy(next(saved.glob("model-*.safetensors")), saved / "model.half.safetensors")
    listed["weights_sha256"]["model.half.safetensors"] = "0"
    (saved / "config.json").write_text(json.dumps(listed))
    with pytest.raises(OSError, match=r"model\.half\.safetensors is damaged"):
        OTDRGForReportGeneration.from_pretrained(saved, variant="half")


def test_from_pretrained_index_that_leaves_out_a_listed_shard_is_refused(saved):
    index = saved / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    content["weight_map"] = {name: first for name in content["weight_map"]}
    index.write_text(json.dumps(content))
    with pytest.raises(OSError, match=r"model-00002-of-\d+\.safetensors of weights_sha256 .* is not among"):
        OTDRGForReportGeneration.from_pretrained(saved)


@pytest.mark.parametrize("has_list", [True, False])
@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "inner/other.safetensors",
        "/tmp/other.safetensors",
        "..\\other.safetensors",
        "C:other.safetensors",
        "pytorch_model.bin",
        "other.pt",
        "",
        5,
        None,
        ["model.safetensors"],
    ],
)
def test_from_pretrained_index_names_more_than_safetensors_beside_it_is_refused(saved, shard, has_list):
    index, config = saved / "model.safetensors.index.json", saved / "config.json"
    content = json.loads(index.read_text())
    content["weight_map"]["image_projector.linear.weight"] = shard
    index.write_text(json.dumps(content))
    if not has_list:
        config.write_text(json.dumps({**json.loads(config.read_text()), "weights_sha256": None}))
    with pytest.raises(ValueError, match=re.escape(str(index))):
        OTDRGForReportGeneration.from_pretrained(saved)


def test_from_pretrained_shard_that_is_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    shard = next(saved.glob("model-*.safetensors"))
    moved = shutil.move(shard, tmp_path / shard.name)
    shard.symlink_to(moved)
    with pytest.raises(ValueError, match=r"a link to another folder"):
        OTDRGForReportGeneration.from_pretrained(saved)
    # As the Hub's cache is laid out.
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "0"
    shutil.copytree(saved, snapshot, symlinks=True)
    blobs.mkdir()
    shutil.move(moved, blobs / "1")
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to("../../blobs/1")
    OTDRGForReportGeneration.from_pretrained(snapshot)


@pytest.mark.parametrize("name", ["other.safetensors", "../model.safetensors", "adapter_model.bin"])
def test_from_pretrained_transformers_weights_are_refused(saved, name):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(ValueError, match=r"config\.json: transformers_weights is"):
        OTDRGForReportGeneration.from_pretrained(saved)


def test_from_pretrained_weights_that_could_run_code_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=r"pytorch_model\.bin"):
        OTDRGForReportGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False: expected True"):
        OTDRGForReportGeneration.from_pretrained(tmp_path, use_safetensors=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    with pytest.raises(OSError, match=r"has no model\.safetensors, .* pytorch_model\.bin can run code"):
        OTDRGForReportGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vision", "text"])
def test_from_backbones_index_of_a_pickle_is_refused(build_backbones, tmp_path, part):
    backbones = build_backbones(tmp_path)
    folder = tmp_path / part
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "weights.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=rf"{part} backbone .* has no model\.safetensors"):
        OTDRGForReportGeneration.from_backbones(**backbones)
    index = {"metadata": {}, "weight_map": {name: "weights.bin" for name in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=rf"{part} backbone .* weight_map names 'weights\.bin'"):
        OTDRGForReportGeneration.from_backbones(**backbones)


@pytest.mark.parametrize("shards", [("200KB", "50GB"), ("50GB", "200KB")])
def test_save_pretrained_over_another_number_of_shards_leaves_none_of_them(model, build_model, tmp_path, shards):
    other, _ = build_model(seed=3)
    other.save_pretrained(tmp_path, max_shard_size=shards[0])
    model.save_pretrained(tmp_path, max_shard_size=shards[1])
    again = OTDRGForReportGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_save_pretrained_that_fails_keeps_the_former_weights(build_model, tmp_path):
    model, _ = build_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model.generation_config.temperature = 0.7  # without sampling, which transformers refuses to save
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".former*"))


@contextmanager
def full_disk(limit):
    """No file can have more bytes than the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("shards", [("200KB", "50GB"), ("200KB", "100KB"), ("50GB", "100KB")])
def test_save_pretrained_on_a_full_disk_keeps_the_former_model(model, build_model, tmp_path, shards):
    other, _ = build_model(seed=3, ot_weight=0.3)
    other.save_pretrained(tmp_path, max_shard_size=shards[0])
    before = files_of(tmp_path)
    with full_disk(60_000), pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(tmp_path, max_shard_size=shards[1])
    assert files_of(tmp_path) == before
    again = OTDRGForReportGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in other.state_dict().items())


def test_save_pretrained_after_a_killed_one_restores_or_replaces_its_former_weights(model, build_model, tmp_path):
    other, _ = build_model(seed=3)
    other.save_pretrained(tmp_path, max_shard_size="200KB")
    before = files_of(tmp_path)
    for name in list(before):
        if name.startswith(("model.", "model-")) or name.endswith("config.json"):
            (tmp_path / name).rename(tmp_path / f".former.{name}")
    with pytest.raises(OSError, match=r"has no config\.json.*interrupted.*\.former\.config\.json: rename them"):
        OTDRGForReportGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(before["config.json"])
    with pytest.raises(OSError, match=r"has no model\.safetensors.*the files before it are \.former\.generation_con"):
        OTDRGForReportGeneration.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"part")
    with full_disk(60_000), pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before
    (tmp_path / ".former.model.safetensors").write_bytes(b"part")
    model.save_pretrained(tmp_path)
    listed = json.loads((tmp_path / "config.json").read_text())["weights_sha256"]
    assert set(listed) == {"model.safetensors"} and not list(tmp_path.glob(".former*"))
    OTDRGForReportGeneration.from_pretrained(tmp_path)


def test_lora_that_is_not_attached_is_not_saved(build_model, study, tmp_path):
    model, _ = build_model()
    model.config.lora = LORA
    model.save_pretrained(tmp_path)
    assert model.config.lora == LORA
    again = OTDRGForReportGeneration.from_pretrained(tmp_path)
    assert again.config.lora is None
    with torch.no_grad():
        assert torch.equal(again(**study).logits, model(**study).logits)


def test_from_pretrained_with_lora_of_a_model_without_adapters_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no adapters, but OTDRGConfig\.lora.*add_lora"):
        OTDRGForReportGeneration.from_pretrained(tmp_path, lora=LORA)
    config = OTDRGConfig.from_pretrained(tmp_path, lora=LORA)
    with pytest.raises(ValueError, match="has no adapters"):
        OTDRGForReportGeneration.from_pretrained(tmp_path, config=config)


# --- permissions, sizes, folders in repositories ---------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("form", ["full", "adapter"])
def test_save_pretrained_follows_the_umask(trained, tmp_path, form, umask):
    before = os.umask(umask)
    try:
        trained[0].save_pretrained(tmp_path, weights=form)
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir() if path.is_file()}
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "hidden_size", 10**9),
        ("text_config", "hidden_size", 64),
        ("text_config", "vocab_size", 10**9),
        ("text_config", "intermediate_size", 10**9),
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_labels", 10**9),
        ("vision_config", "num_labels", 10**9),
        (None, "num_labels", 10**9),
        (None, "image_tokens", 10**9),
        (None, "image_size", 10**9),
    ],
)
def test_from_pretrained_configuration_of_a_larger_model_is_refused(model, tmp_path, part, field, value):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if part is None else config[part])[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json|OTDRGConfig"):
        OTDRGForReportGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_from_pretrained_subfolder_is_read(trained, study, tmp_path, form):
    model, processor = trained
    model.save_pretrained(tmp_path / "inner", weights=form)
    processor.save_pretrained(tmp_path / "inner")
    assert_same(model, OTDRGForReportGeneration.from_pretrained(tmp_path, subfolder="inner"), study)
    again = OTDRGProcessor.from_pretrained(tmp_path, subfolder="inner")
    assert again.default_prompt() == processor.default_prompt()
    for name in (OTDRGForReportGeneration, OTDRGProcessor, OTDRGConfig):
        with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path / 'outer'))} has no \w+\.json"):
            name.from_pretrained(tmp_path, subfolder="outer")


def test_from_pretrained_hub_repositories_are_checked_as_folders(model, processor, hub_server, tmp_path):
    """What repositories hold is refused or loaded as in folders, by the real client."""
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    processor.save_pretrained(tmp_path / "sharded")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir() if path.is_file()}
    shard = next(name for name in files if name.startswith("model-"))
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["image_projector.linear.weight"] = "inner/../../other.safetensors"
    unlisted = {**json.loads(files["config.json"]), "weights_sha256": None}
    without = {name: content for name, content in files.items() if not name.startswith("model")}
    unlisted_config = json.dumps(unlisted).encode()
    repos = {
        "org/right": files,
        "org/inner": {f"inner/{name}": content for name, content in files.items()},
        "org/whole": {**files, "model.safetensors": files[shard]},
        "org/index": {**files, "model.safetensors.index.json": json.dumps(index).encode()},
        "org/adapter": {**files, "adapter_config.json": b'{"base_model_name_or_path": "org/other"}'},
        "org/pickle": {**without, "config.json": unlisted_config, "pytorch_model.bin": files[shard]},
        "org/beside": {**files, "pytorch_model.bin": b"never read"},
    }
    for name, content in repos.items():
        hub_server.add_repo("models", name, content)
    code = """
import gc, json, sys
gc.disable()
from transformers import AutoModel, AutoProcessor, logging
from otdrg import OTDRGForReportGeneration, OTDRGProcessor
logging.set_verbosity_error()
found = {}
for name in json.loads(sys.argv[1]):
    where = {"subfolder": "inner"} if name == "org/inner" else {}
    try:
        OTDRGForReportGeneration.from_pretrained(name, **where)
        OTDRGProcessor.from_pretrained(name, **where)
        AutoModel.from_pretrained(name, trust_remote_code=True, **where) if where else None
        AutoProcessor.from_pretrained(name, trust_remote_code=True, **where) if where else None
        found[name] = "loaded"
    except (OSError, ValueError) as error:
        found[name] = str(error)
for name in (OTDRGForReportGeneration, OTDRGProcessor):
    try:
        name.from_pretrained("org/inner", subfolder="outer")
    except OSError as error:
        found[name.__name__] = str(error)
print(json.dumps(found))
"""
    environment = hub_server.environment(tmp_path / "home", HF_HUB_OFFLINE="0")
    command = [sys.executable, "-c", code, json.dumps(list(repos))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found[f"org/{name}"] for name in ("right", "inner", "beside")] == ["loaded"] * 3, found
    assert "org/whole/model.safetensors is not among the weight files" in found["org/whole"]
    assert "weight_map names 'inner/../../other.safetensors'" in found["org/index"]
    assert "org/adapter/adapter_config.json" in found["org/adapter"]
    assert "org/pickle has no model.safetensors" in found["org/pickle"]
    assert "pytorch_model.bin can run code" in found["org/pickle"]
    assert found["OTDRGForReportGeneration"] == "org/inner/outer has no config.json: expected a model"
    assert found["OTDRGProcessor"] == "org/inner/outer has no processor_config.json: expected a processor"
