"""Generation in batches against one study at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from measure import Line, Row, in_turns, ratios
from otdrg import OTDRGForReportGeneration, OTDRGProcessor
from otdrg.inference.attention import use_fastest_attention

from . import models

TITLE = "Generation"
ABOUT = (
    "Reports of exactly 16 tokens with 3 beams, from encoded features: reports per CPU second of a batch of 8 "
    "against four of the studies one at a time, and of a batch of 16 against two of 8. The preset `small` is in "
    "bfloat16, with LoRA merged; the published checkpoint `checkpoints/otdrg-iu-xray` in its own type. *Same "
    "text* is the share of reports, of up to 30 tokens in float32, that are the same in a batch of 4 as alone."
)
NOTES = (
    "In the profile of `small`, the matrix products of a batch of 8 take 2.4 times as long as those of one study: they "
    "alone allow 3.3 times the speed. Most of the rest is the cache, which is copied when beams are reordered.",
)
CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "otdrg-iu-xray"
_TOKENS, _STUDIES = 16, 16


def measure(rounds: int, folder: Path) -> Row:
    small, processor = models.small_model(*models.backbones(folder))
    small.merge_lora()
    lines = speeds("small", small, processor, rounds)
    lines.append(same_text("small", small, processor))
    checkpoint = OTDRGForReportGeneration.from_pretrained(CHECKPOINT)
    processor = OTDRGProcessor.from_pretrained(CHECKPOINT)
    lines += speeds("checkpoint", checkpoint, processor, rounds)
    lines.append(same_text("checkpoint", checkpoint, processor))
    return Row(lines, list(NOTES))


def speeds(name: str, model, processor, rounds: int) -> list[Line]:
    model.eval()
    use_fastest_attention(model)
    batch = prompts(model, processor)
    works = {
        "one": lambda: [write(model, batch, [place]) for place in range(4)],
        "eight": lambda: write(model, batch, range(8)),
        "two eights": lambda: [write(model, batch, range(8)), write(model, batch, range(8, 16))],
        "sixteen": lambda: write(model, batch, range(16)),
    }
    found = in_turns(works, rounds)
    return [
        Line(
            name,
            "reports/s, batch 8 / one at a time",
            ratios([2 * value for value in found["one"]], found["eight"]),
            "≥ 3.5",
        ),
        Line(name, "reports/s, batch 16 / batch 8", ratios(found["two eights"], found["sixteen"]), "≥ 1.0"),
        Line(name, "reports per CPU second, batch 8", [8 / seconds for seconds in found["eight"]]),
    ]


def prompts(model, processor) -> dict[str, torch.Tensor]:
    """Prompts of studies, with encoded features."""
    batch = dict(processor.encode_text([1] * _STUDIES))
    side = model.config.image_size
    pixels = torch.randn(_STUDIES, 1, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        batch["view_features"] = model.encode_views(pixels)
    return batch


def write(model, batch: dict[str, torch.Tensor], places, tokens: int = _TOKENS, exactly: bool = True) -> torch.Tensor:
    """The token ids of reports by 3 beams."""
    rows = {name: tensor[list(places)] for name, tensor in batch.items()}
    least = tokens if exactly else None
    ids = model.generate(**rows, num_beams=3, do_sample=False, max_new_tokens=tokens, min_new_tokens=least)
    return ids[:, rows["input_ids"].shape[1] :]


def same_text(name: str, model, processor) -> Line:
    """The share of 4 reports that are the same in a batch as alone, in float32."""
    model = model.float()
    batch = prompts(model, processor)

    def texts(places) -> list[str]:
        return processor.batch_decode(write(model, batch, places, 30, exactly=False), skip_special_tokens=True)

    together, alone = texts(range(4)), [texts([place])[0] for place in range(4)]
    same = sum(one == other for one, other in zip(together, alone, strict=True))
    return Line(name, "same text, float32", [same / 4], "≥ 1.0")
