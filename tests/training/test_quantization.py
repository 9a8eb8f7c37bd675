"""LoRA on an LLM of 4 or 8 bits, by bitsandbytes, whose CPU backend is what is tested here."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.studies import load_studies
from otdrg.train_hf import main
from otdrg.training.collation import ReportCollator
from otdrg.training.model import load_model, quantization_config, set_trained_parts
from otdrg.training.recipe import load_recipe
from safetensors.torch import load_file

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install otdrg[quantization])",
)
KINDS = ["4bit", "8bit"]
LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def batch(trained_run):
    processor = OTDRGProcessor.from_pretrained(trained_run / "predictor")
    studies = load_studies("phantom", train=0, validation=3, test=0, image_size=112, views=["frontal"])
    return ReportCollator(processor, True, 20)(list(studies["validation"]))


def in_bfloat16(run):
    return replace(load_recipe(run / "recipe.yaml").model, dtype="bfloat16")


def linears(model):
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_load_model_quantised_packs_the_llm_only(trained_run, kind):
    model, _ = load_model(trained_run / "predictor", in_bfloat16(trained_run), kind)
    assert len(linears(model)) == 7 and all(name.startswith("language_model.model.") for name in linears(model))
    for name, weight in model.named_parameters():
        is_backbone = name.startswith(("vision_tower", "language_model"))
        packed = name.removesuffix(".weight") in linears(model)
        wanted = {"4bit": torch.uint8, "8bit": torch.int8}[kind] if packed else torch.bfloat16
        assert weight.dtype == (wanted if is_backbone else torch.float32), name
    packed = linears(model)
    model.merge_lora()
    whole, _ = load_model(trained_run / "predictor", in_bfloat16(trained_run))
    for name, weight in whole.named_parameters():
        error = (model.get_parameter(name).float() - weight.float()).norm()
        # NF4's error is 0.09 of a weight of 256 x 256; the CPU backend is coarser on ones as small as these.
        share = {"4bit": 0.5, "8bit": 0.02}[kind] if name.removesuffix(".weight") in packed else 0.0
        assert error <= share * weight.float().norm(), name


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_llm_gradients_equal_those_of_whole_weights(trained_run, kind, batch):
    """Also behind an evaluation, and as they pass through the same weights in full."""
    model, _ = load_model(trained_run / "predictor", in_bfloat16(trained_run), kind)
    model.config.lora = LORA
    model.add_lora()
    set_trained_parts(model, vision="frozen", text="lora", predictor="frozen", joining=True)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        evaluated = model.eval()(**batch).report_loss
    model.train()(**batch).loss.backward()
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("lora_A" in name for name in packed) and any("image_projector" in name for name in packed)
    model.zero_grad()
    model.merge_lora()
    assert not model.is_llm_quantized and not linears(model) and not model.has_lora
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert model.eval()(**batch).report_loss.item() == pytest.approx(evaluated.item(), abs=0.05)
    model.train()(**batch).loss.backward()
    for name, gradient in packed.items():
        if "projector" in name:
            exact = model.get_parameter(name).grad
            assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.9, name


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_report_stage_quantised_publishes_whole_weights(tiny_recipe, tmp_path, kind, caplog):
    run = [str(tiny_recipe), f"output_dir={tmp_path}", "model.dtype=bfloat16"]
    assert main([*run, "stages=[predictor]"]) == 0
    arguments = [*run, "stages=[report]", f"model.quantization={kind}", "report.learning_rate=1e-2"]
    assert main(arguments) == 0

    def losses():
        stage = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["report"]
        return [line["loss"] for line in stage["log_history"] if "loss" in line]

    unbroken, weights = losses(), load_file(tmp_path / "model" / "model.safetensors")
    saved = load_file(tmp_path / "report" / "checkpoint-2" / "model.safetensors")
    assert {name for name in saved if name.startswith("language_model.")} == {
        name for name in saved if "lora_" in name
    }, "the packed weights are those of the stage before"
    code = (
        "import sys\n"
        "sys.modules['bitsandbytes'] = None\n"
        "from otdrg import OTDRGForReportGeneration\n"
        f"model = OTDRGForReportGeneration.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(model.dtype, model.config.lora, model.is_llm_quantized)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert process.stdout.splitlines()[-1] == "torch.bfloat16 None False"

    (tmp_path / "report" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "report" / "checkpoint-4")
    caplog.clear()
    assert main([*arguments, "--resume"]) == 0
    assert losses() == pytest.approx(unbroken, abs=1e-5)
    assert "missing keys" not in caplog.text
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@needs_bitsandbytes
def test_from_backbones_quantised_saves_after_merging(trained_run, tmp_path):
    model = OTDRGForReportGeneration.from_pretrained(trained_run / "predictor")
    model.language_model.save_pretrained(tmp_path / "text")
    model.vision_tower.save_pretrained(tmp_path / "vision")
    OTDRGProcessor.from_pretrained(trained_run / "predictor").tokenizer.save_pretrained(tmp_path / "text")
    quantised = OTDRGForReportGeneration.from_backbones(
        vision=str(tmp_path / "vision"),
        text=str(tmp_path / "text"),
        image_size=112,
        image_tokens=9,
        quantization_config=quantization_config("4bit"),
    )
    assert quantised.is_llm_quantized and len(linears(quantised)) == 7
    with pytest.raises(ValueError, match="the LLM is quantised: call merge_lora"):
        quantised.save_pretrained(tmp_path / "whole")
    quantised.merge_lora()
    quantised.save_pretrained(tmp_path / "whole")
    OTDRGForReportGeneration.from_pretrained(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=2bit"], "model.quantization='2bit': expected one of 4bit, 8bit or a mapping or null"),
        (
            ["model={preset: small, overrides: null}", "report.text=full"],
            "report.text='full': expected lora or frozen where model.quantization is 4bit",
        ),
        pytest.param(
            ["stages=[report]", "model.overrides.dle=false", "model.overrides.fiot=false"],
            "model.quantization='4bit': expected null for a model from scratch",
            marks=needs_bitsandbytes,
        ),
    ],
)
def test_check_recipe_what_cannot_be_quantised_is_one_line(tiny_recipe, tmp_path, overrides, message, capsys):
    arguments = [str(tiny_recipe), f"output_dir={tmp_path / 'run'}", "model.quantization=4bit", *overrides]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_quantization_config_without_bitsandbytes_names_it(monkeypatch):
    monkeypatch.setattr("otdrg.weights_otdrg.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.quantization='8bit' needs bitsandbytes: pip install"):
        quantization_config("8bit")
