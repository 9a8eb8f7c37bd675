"""The paper's recipes, all three stages, on small backbones of the classes that they name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.studies import load_studies
from otdrg.train_hf import main
from otdrg.training.recipe import load_recipe
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast, TimmWrapperConfig

RECIPES = Path(__file__).parents[2] / "recipes"
#: The shape of Llama-2-chat's own, which knows a system turn only as a part of the first, and no turn out of order.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def llama_tokenizer(reports):
    """A tokenizer of Llama-2's kind: SentencePiece's marks of spaces, bytes for what it does not know, no pad token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        reports, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    return LlamaTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of a Swin by timm's names and a LLaMA, as the Hub's are written."""
    folder = tmp_path_factory.mktemp("backbones")
    size = {"img_size": 224, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 7}
    config = TimmWrapperConfig(architecture="swin_base_patch4_window7_224", model_args=size)
    AutoModel.from_config(config).save_pretrained(folder / "swin")
    studies = load_studies("phantom", train=20, validation=0, test=0, image_size=32, views=["frontal"])
    tokenizer = llama_tokenizer(studies["train"]["report"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


def write_r2gen(folder, name, views):
    """Phantoms as R2Gen publishes its collections: images in a folder and one JSON file."""
    splits = load_studies("phantom", train=4, validation=2, test=2, image_size=64, views=views)
    annotation = {}
    for split, named in (("train", "train"), ("validation", "val"), ("test", "test")):
        entries = annotation[named] = []
        for position, study in enumerate(splits[split]):
            paths = []
            for number, image in enumerate(study["images"]):
                paths.append(f"{split}_{position}/{number}.png")
                (folder / "images" / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / "images" / paths[-1])
            known = {"id": f"CXR{position}_{split}"}
            if name == "mimic_cxr":
                known = {"id": f"{split}-{position}", "study_id": position, "subject_id": position}
            entries.append({**known, "report": study["report"], "image_path": paths, "split": named})
    (folder / "annotation.json").write_text(json.dumps(annotation), encoding="utf-8")


SHORT = [
    "ircp.max_steps=1",
    "ircp.per_device_train_batch_size=2",
    "predictor.max_steps=1",
    "predictor.per_device_train_batch_size=2",
    "report.max_steps=2",
    "report.per_device_train_batch_size=2",
    "report.generation.max_new_tokens=8",
    "report.evaluation.metrics=[bleu_4, rouge_l]",
    "report.evaluation.controls=[true_states]",
]


@pytest.mark.parametrize(
    ("name", "views"),
    [("iu_xray", ["frontal", "lateral"]), pytest.param("mimic_cxr", ["frontal"], marks=pytest.mark.slow)],
)
def test_paper_recipe_small_backbones_run_all_stages(name, views, backbones, tmp_path, monkeypatch):
    write_r2gen(tmp_path, name, views)
    monkeypatch.setenv(f"OTDRG_{name.upper()}", str(tmp_path))
    monkeypatch.setenv("OTDRG_SWIN", str(backbones / "swin"))
    monkeypatch.setenv("OTDRG_LLM", str(backbones / "llama"))
    path = RECIPES / f"{name}_paper.yaml"
    assert main([str(path), f"output_dir={tmp_path / 'run'}", *SHORT]) == 0

    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [results[stage]["steps"] for stage in ("ircp", "predictor", "report")] == [1, 1, 2]
    assert results["report"]["evaluation"]["studies"] == 2
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    model = OTDRGForReportGeneration.from_pretrained(tmp_path / "run" / "model")
    assert type(model.vision_tower).__name__ == "TimmWrapperModel"
    assert type(model.language_model).__name__ == "LlamaForCausalLM"
    for field, value in recipe["model"]["overrides"].items():
        if field != "lora":
            assert getattr(model.config, field) == value, field
    processor = OTDRGProcessor.from_pretrained(tmp_path / "run" / "model")
    view = tmp_path / "images" / "test_0" / "0.png"
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text(encoding="utf-8"))["text_backbone"] is None
    adapter = OTDRGForReportGeneration.from_pretrained(tmp_path / "run" / "adapter")
    assert adapter.has_lora and not model.has_lora
    inputs = OTDRGProcessor.from_pretrained(tmp_path / "run" / "adapter")(images=[view])
    with torch.no_grad():
        assert torch.allclose(adapter(**inputs).logits.float(), model(**inputs).logits.float(), atol=0.02)
    prompt = processor.tokenizer.decode(processor(images=[view])["input_ids"][0])
    assert prompt.startswith("<s>") and prompt.count("[INST]") == 1 and "<s><s>" not in prompt.replace(" ", "")


def test_paper_recipe_has_the_papers_values(monkeypatch):
    for name in ("OTDRG_IU_XRAY", "OTDRG_MIMIC_CXR"):
        monkeypatch.setenv(name, "/somewhere")
    for name in ("OTDRG_SWIN", "OTDRG_LLM"):
        monkeypatch.delenv(name, raising=False)
    iu_xray, mimic_cxr = (load_recipe(RECIPES / f"{name}_paper.yaml") for name in ("iu_xray", "mimic_cxr"))
    for recipe in (iu_xray, mimic_cxr):
        assert recipe.stages == ["ircp", "predictor", "report"]
        assert recipe.model.vision == "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k"
        assert recipe.model.text == "meta-llama/Llama-2-7b-chat-hf" and recipe.model.quantization is None
        assert (recipe.ircp.sigma, recipe.ircp.temperature) == (0.1, 0.5)
        assert (recipe.ircp.noise, recipe.ircp.similarity) == ("normalized", "cosine")
        assert (recipe.report.generation["num_beams"], recipe.report.generation["repetition_penalty"]) == (3, 1.0)
        assert (recipe.report.learning_rate, recipe.report.lr_scheduler_type, recipe.report.text) == (
            1e-4,
            "cosine",
            "lora",
        )
    assert (
        iu_xray.report.num_train_epochs,
        iu_xray.report.per_device_train_batch_size,
        iu_xray.report.max_report_tokens,
    ) == (15, 16, 60)
    assert (
        mimic_cxr.report.num_train_epochs,
        mimic_cxr.report.per_device_train_batch_size,
        mimic_cxr.report.max_report_tokens,
    ) == (5, 6, 100)
    assert iu_xray.ircp.per_device_train_batch_size == iu_xray.predictor.per_device_train_batch_size == 16
    for name in ("iu_xray", "mimic_cxr"):
        given = yaml.safe_load((RECIPES / f"{name}_paper.yaml").read_text(encoding="utf-8"))["ircp"]
        assert {"noise", "similarity"} <= given.keys()
    assert (iu_xray.studies.cleaning, mimic_cxr.studies.cleaning) == ("r2gen_iu", "r2gen_mimic")
