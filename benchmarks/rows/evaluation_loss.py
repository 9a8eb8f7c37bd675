"""Memory of the validation loss with and without the logits of all positions."""

from __future__ import annotations

from pathlib import Path

import torch
from measure import Line, Row, in_process, peak_bytes

from . import models

TITLE = "Evaluation loss"
ABOUT = (
    "The loss of the preset `small` on 16 studies in bfloat16, without gradients, in a new process: how far the "
    "resident set rises, at its peak. *Report only* is how our Trainer evaluates: logits from the first report "
    "token on."
)
NOTES: tuple[str, ...] = ()
_BATCH_SIZE = 16


def measure(rounds: int, folder: Path) -> Row:
    backbones = models.backbones(folder)
    rises = [in_process(rise, report_only, *backbones) for report_only in (True, False)]
    values = [rises[0] / rises[1]]
    return Row([Line("small", "peak rise, report only / all logits", values, "≤ 0.6")], list(NOTES))


def rise(report_only: bool, vision: str, text: str) -> int:
    """How many bytes the resident set rises at its peak."""
    model, processor = models.small_model(vision, text)
    model.eval()
    batch = models.small_batch(processor, model.config.placeholder_token_ids[0], batch_size=_BATCH_SIZE)
    with torch.no_grad():
        batch["view_features"] = model.encode_views(batch.pop("pixel_values"), batch["view_mask"])
        batch = model.expand_finding_text(**batch)
        # One study first, for what a process computes only once.
        small = {name: tensor[:1] for name, tensor in batch.items()}
        model(**small, report_only=report_only)
        before, peak = peak_bytes(lambda: model(**batch, report_only=report_only))
    return peak - before
