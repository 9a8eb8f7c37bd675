"""The share of the machine's matrix-multiplication peak that our training step reaches."""

from __future__ import annotations

from pathlib import Path

import torch
from measure import Line, Row, cpu_seconds, measured_in_turns
from torch.utils.flop_counter import FlopCounterMode

from . import models
from .training_step import step_of

TITLE = "Share of the GEMM peak"
ABOUT = (
    "FLOPs of the step of the preset `small` (as above, views encoded), counted by torch's `FlopCounterMode`, per "
    "CPU second, divided by the FLOPs per CPU second of multiplying two matrices of 2048 × 2048 in the same "
    "round."
)
NOTES = (
    "What is missing in bfloat16 is attention and LoRA's dropout, which are no large products (see the profile of the "
    "training step).",
)
_SIZE = 2048


def measure(rounds: int, folder: Path) -> Row:
    vision, text = models.backbones(folder)
    lines = []
    for name, reach in (("bfloat16", "≥ 0.6"), ("float32", "")):
        dtype = models.TYPES[name]
        model, processor = models.small_model(vision, text, name)
        batch = models.small_batch(processor, model.config.placeholder_token_ids[0])
        step = step_of(model, lambda m=model, b=batch: m(**m.expand_finding_text(**b)).loss, dtype)
        with FlopCounterMode(display=False) as counter:
            step()
        work, square = counter.get_total_flops(), torch.randn(_SIZE, _SIZE).to(dtype)
        gemm = 4 * 2 * _SIZE**3
        functions = {"step": lambda s=step: cpu_seconds(s), "gemm": lambda x=square: cpu_seconds(lambda: multiply(x))}
        found = measured_in_turns(functions, rounds, warm_up=1)
        pairs = list(zip(found["step"], found["gemm"], strict=True))
        lines.append(
            Line(name, "share of the GEMM peak", [(work / ours) / (gemm / peak) for ours, peak in pairs], reach)
        )
        lines.append(Line(name, "GEMM peak, GFLOP/s", [gemm / peak / 1e9 for _, peak in pairs]))
    return Row(lines, list(NOTES))


def multiply(square: torch.Tensor) -> None:
    for _ in range(4):
        square @ square
