"""The parts of `benchmarks/gpu_check.sh`: each is a process that prints one line, or fails.

    python benchmarks/gpu_check.py generation check --cpu

Not run on a GPU yet, only with `--cpu`. Exit status 3: skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
GIB = 2**30
#: Dense bfloat16 peaks of the data sheets, in FLOP/s.
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "timm", "datasets", "bitsandbytes", "flash-attn")


class Skipped(Exception):
    """A part whose inputs are missing; the message says which."""


@dataclass
class Check:
    """What the parts share: the folder of logs and runs, and where they compute."""

    folder: Path
    cpu: bool

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights; many CPUs are slow in bfloat16."""
        return torch.float32 if self.cpu else torch.bfloat16

    def synchronize(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def peak(self) -> str:
        """The highest memory of the GPU since the last reset, as text."""
        return "" if self.cpu else f", peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB"

    def timed(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start


# --- models with random weights --------------------------------------------------------------------------------------


def random_model(check: Check) -> Any:
    """The preset `paper` with random weights and LoRA, as the report stage trains it; on a CPU the preset `tiny`."""
    from otdrg import OTDRGConfig, OTDRGForReportGeneration
    from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
    from otdrg.training.model import cast_backbones, set_trained_parts

    if not check.cpu and torch.cuda.get_device_properties(0).total_memory < 38 * GIB:
        raise Skipped("needs a card of 40 GB: 7 billion random weights are made in float32")
    config = OTDRGConfig.from_preset("tiny" if check.cpu else "paper")
    lora = config.lora or {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    size = config.text_config.vocab_size
    config.image_token_id, config.finding_token_id, config.finding_text_token_id = size - 3, size - 2, size - 1
    config.finding_text_token_ids = [[[1]] * len(FINDING_STATES)] * len(FINDINGS)
    config.lora = None
    with torch.device(check.device):
        model = OTDRGForReportGeneration(config)
        config.lora = lora
        model.add_lora()
    cast_backbones(model, str(check.dtype).removeprefix("torch."))
    for part in set_trained_parts(model, vision="frozen", text="lora", predictor="frozen", joining=True):
        part.eval()
    if not check.cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def random_batch(check: Check, config: Any, batch_size: int, text: int, report: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a model: features of one view, a prompt with `text` words, and a report as target unless it is 0."""
    image, labels = ([token] * count for token, count in ((config.image_token_id, 49), (config.finding_token_id, 14)))
    words = torch.randint(3, config.text_config.vocab_size - 3, (batch_size, text + report))
    ids = torch.cat((torch.tensor([image + labels] * batch_size), words), dim=1)
    width = {"cuda": 1024, "cpu": 128}[check.device]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "view_features": torch.randn(batch_size, 1, 49, width),
        "view_mask": torch.ones(batch_size, 1, dtype=torch.bool),
        "finding_states": torch.randint(0, 2, (batch_size, 14)),
    }
    if report:
        batch["labels"] = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - report, -100)
    return {name: tensor.to(check.device) for name, tensor in batch.items()}


def small_llama(**fields: Any) -> Any:
    """Configuration of a LLaMA of a few layers."""
    from transformers import LlamaConfig

    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=1000, **{**size, **fields})


# --- the parts -------------------------------------------------------------------------------------------------------


def versions(check: Check) -> str:
    """The head of the table, with the card and the versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    lines = ["CPU, tiny sizes: this is a test of the script, and says nothing about GPUs"]
    if not check.cpu:
        card = torch.cuda.get_device_properties(0)
        lines = [f"{card.name}, {card.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"]
    lines.append(f"Python {platform.python_version()}, {', '.join(f'{name} {found[name]}' for name in found)}")
    return "\n\n".join(lines) + "\n\n| part | result | seconds | note |\n|---|---|---|---|"


def bf16(check: Check) -> str:
    """A step of the tiny model under bfloat16 autocast has nearly the loss of float32, and finite gradients."""
    from otdrg import OTDRGConfig, OTDRGForReportGeneration

    config = OTDRGConfig.from_preset("tiny")
    config.image_token_id, config.finding_token_id, config.finding_text_token_id = 509, 510, 511
    config.finding_text_token_ids = [[[1]] * 4] * 14
    torch.manual_seed(0)
    model = OTDRGForReportGeneration(config).to(check.device).train()
    batch = random_batch(Check(check.folder, cpu=True), config, 2, 8, 8)
    batch = {name: tensor.to(check.device) for name, tensor in batch.items()}
    batch["view_features"] = model.encode_views(torch.randn(2, 1, 3, 112, 112, device=check.device))
    exact = model(**batch).loss
    with torch.autocast(check.device, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is not finite"
    assert abs(loss - exact) < 0.03 * abs(exact), f"loss {loss:.4f} in bfloat16, {exact:.4f} in float32"
    return f"loss {loss:.4f}, float32 {exact:.4f}, {len(gradients)} gradients"


def attention(check: Check, kind: str) -> str:
    """A kind of attention gives the logits of the eager one, with a padded row."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    eager = LlamaForCausalLM(small_llama(attn_implementation="eager")).eval().to(check.device, check.dtype)
    other = LlamaForCausalLM(small_llama(attn_implementation=kind)).eval().to(check.device, check.dtype)
    other.load_state_dict(eager.state_dict())
    ids = torch.randint(3, 1000, (2, 40) if check.cpu else (8, 512), device=check.device)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask).logits[mask.bool()].float() for model in (other, eager))
        seconds = [check.timed(lambda model=model: model(ids, attention_mask=mask)) for model in (other, eager)]
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 0.03, f"relative error of the logits {error:.3f}"
    return f"relative error {error:.4f}; {1e3 * seconds[0]:.1f} ms, eager {1e3 * seconds[1]:.1f} ms"


def sdpa(check: Check) -> str:
    return attention(check, "sdpa")


def flash_attention(check: Check) -> str:
    if check.cpu or find_spec("flash_attn") is None:
        raise Skipped("needs a GPU" if check.cpu else "flash-attn is not installed")
    return attention(check, "flash_attention_2")


def four_bits(check: Check) -> str:
    """A LLaMA loaded in 4 bits takes a LoRA step, and its logits resemble those of bfloat16."""
    if find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    from otdrg.training.model import quantization_config
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    size = {} if check.cpu else {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16}
    plain = LlamaForCausalLM(small_llama(**size)).to(torch.bfloat16)
    plain.save_pretrained(check.folder / "llama")
    config = quantization_config("4bit")
    packed = LlamaForCausalLM.from_pretrained(
        check.folder / "llama", quantization_config=config, device_map={"": check.device}
    )
    kinds = [type(module).__name__ for module in packed.modules()]
    assert kinds.count("Linear4bit") == 28, f"{kinds.count('Linear4bit')} layers of Linear4bit, expected 28"
    ids = torch.randint(3, 1000, (4, 32), device=check.device)
    packed.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), packed)
    # Training first: on a CPU, a forward pass of evaluation repacks the weights, which then have no backward pass.
    packed.train()(ids, labels=ids).loss.backward()
    gradients = [weight.grad for weight in packed.parameters() if weight.grad is not None]
    finite = sum(bool(gradient.isfinite().all()) for gradient in gradients)
    assert len(gradients) == finite == 16, f"{len(gradients)} gradients of LoRA, {finite} of them finite, expected 16"
    with torch.no_grad():
        found, expected = (model.eval()(ids).logits.float() for model in (packed, plain.to(check.device)))
    alike = torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1].item()
    assert alike > 0.9, f"correlation of the logits {alike:.3f}"
    return f"correlation with bfloat16 {alike:.3f}{check.peak()}"


def paper_step(check: Check) -> str:
    """Training steps of the report stage: time, share of the peak, and memory beside what memory.py computes."""
    from memory import memory
    from scale import ASSUMPTIONS, llama_flops

    model = random_model(check)
    config, steps, batch_size = model.config, 1 if check.cpu else 10, 2 if check.cpu else 6
    tokens, report = (int(ASSUMPTIONS[name].low) for name in ("padded_tokens", "head_tokens"))
    batch = random_batch(check, config, batch_size, tokens - report - 63, report)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)

    def step() -> None:
        with torch.autocast(check.device, torch.bfloat16, enabled=not check.cpu):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = check.timed(lambda: [step() for _ in range(steps)]) / steps
    reached = batch_size * llama_flops(config.text_config, tokens, report, config.lora).total / seconds
    needed = memory(config, "lora", 16, batch_size, tokens, report).total() / GIB
    note = f"{1e3 * seconds:.0f} ms for {batch_size} studies of {tokens} tokens, {reached / 1e12:.3g} TFLOP/s"
    if not check.cpu:
        card = torch.cuda.get_device_name()
        peak = next((peak for name, peak in PEAKS.items() if name in card), None)
        note += f" ({reached / peak:.2f} of the peak)" if peak else ""
    return f"{note}{check.peak()} (computed: {needed:.1f})"


def generation(check: Check) -> str:
    """Throughput of reports of 100 tokens, by greedy search of 8 and 32 studies and with 3 beams of 12."""
    model = random_model(check).eval()
    length, notes = (3 if check.cpu else 100), []

    def write(batch_size: int, beams: int, length: int) -> float:
        """Seconds of writing reports of this length."""
        batch = random_batch(check, model.config, batch_size, 82)
        options = {"max_new_tokens": length, "min_new_tokens": length, "num_beams": beams, "do_sample": False}
        start = time.perf_counter()
        written = model.generate(**batch, **options)
        check.synchronize()
        seconds = time.perf_counter() - start
        new = written.shape[1] - batch["input_ids"].shape[1]
        assert new == length, f"{new} tokens were generated, expected {length}"
        return seconds

    write(8, 1, 2)  # warm up
    for batch_size, beams in ((8, 1), (32, 1), (12, 3)):
        seconds = write(batch_size, beams, length)
        rates = f"{batch_size / seconds:.3g} reports/s, {1e3 * seconds / length:.0f} ms a step"
        notes.append(f"batch {batch_size}, beams {beams}: {rates}")
    return "; ".join(notes) + check.peak()


# --- the parts that train --------------------------------------------------------------------------------------------


def train(check: Check, name: str, recipe: str, overrides: list[str], *launch: str) -> dict[str, Any]:
    """Train by a recipe with `accelerate launch`, and return the content of `results.json`."""
    output = check.folder / name
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch, "--num_processes", "1"]
    if not launch:
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # Two threads on a busy CPU wait for each other.
    overrides = [*overrides, f"output_dir={output}", *(["cpu_threads=1"] if check.cpu else [])]
    command += ["train_hf.py", f"recipes/{recipe}", *overrides, "--overwrite"]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def losses(check: Check, name: str) -> tuple[float, float]:
    """The first and the last training loss of the report stage."""
    lines = (check.folder / name / "report" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert found and all(map(math.isfinite, found)), f"losses {found}, expected finite ones"
    # Two steps on a CPU need not lower it.
    assert check.cpu or found[-1] < found[0], f"the loss rose from {found[0]:.3f} to {found[-1]:.3f}"
    return found[0], found[-1]


def fsdp2(check: Check) -> str:
    """accelerate wraps the model by FSDP2, with one process."""
    if check.cpu:
        raise Skipped("accelerate has no FSDP on CPU")
    overrides = [
        "studies.options={train: 200, validation: 8, test: 8}",
        "stages=[predictor, report]",
        "predictor.max_steps=5",
        "predictor.thresholds=none",
        "report.max_steps=20",
        "report.bf16=true",
        "report.evaluation={split: none}",
    ]
    results = train(check, "fsdp2", "phantom_tiny.yaml", overrides, "--config_file", "recipes/accelerate/fsdp2.yaml")
    wrapper = results["report"]["wrapper"]
    assert wrapper == "FSDP2", f"wrapped by {wrapper}, expected FSDP2"
    first, last = losses(check, "fsdp2")
    return f"loss {first:.2f} to {last:.2f}"


def phantoms(check: Check) -> str:
    """The quick start, all stages, on half of its phantoms."""
    train_studies, others, steps = (16, 8, 2) if check.cpu else (1500, 100, -1)
    overrides = [
        f"studies.options={{train: {train_studies}, validation: {others}, test: {others}}}",
        *(f"{stage}.max_steps={steps}" for stage in ("ircp", "predictor", "report")),
        *(f"{stage}.bf16={str(not check.cpu).lower()}" for stage in ("ircp", "predictor", "report")),
        f"ircp.per_device_train_batch_size={8 if check.cpu else 64}",
        f"ircp.probe_studies={0 if check.cpu else 500}",
        f"report.logging_steps={1 if check.cpu else 20}",
        "report.evaluation={controls: [shuffled, constant], metrics: [bleu_4, rouge_l, cider]}",
    ]
    results = train(check, "phantoms", "phantom_tiny.yaml", overrides)
    auc, rows = results["predictor"]["validation"]["macro_auc"], results["report"]["evaluation"]["rows"]
    assert check.cpu or auc > 0.9, f"macro AUC {auc:.3f}, expected more than 0.9"
    scores = ", ".join(f"{name} {row['bleu_4']:.3f}" for name, row in rows.items())
    return f"macro AUC {auc if auc is None else round(auc, 3)}; BLEU-4: {scores}"


def iu_xray(check: Check) -> str:
    """A few hundred steps of `iu_xray_small.yaml`."""
    missing = [name for name in ("OTDRG_IU_XRAY", "OTDRG_DINOV2", "OTDRG_LLM") if not os.environ.get(name)]
    if missing:
        raise Skipped(f"{', '.join(missing)} not set")
    studies, others, steps = (8, 2, 2) if check.cpu else (800, 60, 300)
    overrides = [
        f"studies.limit={{train: {studies}, validation: {others}}}",
        *(["predictor.num_train_epochs=1"] if check.cpu else []),
        "predictor.calibration=none",
        "predictor.thresholds=rule",
        f"report.max_steps={steps}",
        f"report.logging_steps={1 if check.cpu else 20}",
        "report.eval_strategy=no",
        "report.load_best_model_at_end=false",
        "report.evaluation={controls: [constant], metrics: [bleu_4, rouge_l, cider]}",
        f"report.generation={{max_new_tokens: {4 if check.cpu else 100}}}",
    ]
    results = train(check, "iu_xray", "iu_xray_small.yaml", overrides)
    first, last = losses(check, "iu_xray")
    row = results["report"]["evaluation"]["rows"]["model"]
    return f"{steps} steps, loss {first:.2f} to {last:.2f}, BLEU-4 {row['bleu_4']:.3f}"


PARTS: dict[str, Callable[[Check], str]] = {
    "versions": versions,
    "bf16": bf16,
    "sdpa": sdpa,
    "flash_attention": flash_attention,
    "4bit": four_bits,
    "fsdp2": fsdp2,
    "paper_step": paper_step,
    "generation": generation,
    "phantoms": phantoms,
    "iu_xray": iu_xray,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path, help="for logs and runs")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: expected one, or --cpu", file=sys.stderr)
        return 1
    try:
        print(PARTS[options.part](Check(options.folder, options.cpu)))
    except Skipped as reason:
        print(reason)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
