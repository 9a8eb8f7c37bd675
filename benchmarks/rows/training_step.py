"""A training step of the preset `small` against R2GenGPT's design on the same backbones, and of the quick start."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Line, Row, in_process, in_turns, peak_bytes, ratios

from . import models

TITLE = "Training step"
ABOUT = (
    f"Forward, backward and AdamW on {models.BATCH_SIZE} studies of one view with reports of "
    f"{models.REPORT_TOKENS} tokens, bfloat16 autocast: DINOv2-small (frozen) and SmolLM2-135M with LoRA (rank 16, "
    "dropout 0.1, `q_proj` and `v_proj`). R2GenGPT is its design from its paper, rebuilt with classes of "
    "transformers and peft; it is not its authors' file. It reads the image tokens in a prompt, and computes the "
    "logits of all positions. Ours reads label tokens and the label text as well, and computes the transport; "
    "*same function* is ours without them (`dle` and `fiot` off). *Cached* is ours with the features of the "
    "frozen encoder computed before, as training does by default."
)
_SAME = {"dle": False, "fiot": False}


def measure(rounds: int, folder: Path) -> Row:
    vision, text = models.backbones(folder)
    names = ("ours", "cached", "same", "49 tokens", "257 tokens")
    steps = {name: small_step(name, vision, text) for name in names}
    seconds = in_turns({name: step for name, (step, _) in steps.items()}, rounds)
    memory = {
        name: in_process(peak_of_step, name, vision, text) for name in ("ours", "same", "49 tokens", "257 tokens")
    }
    speed, space = "samples/s, ours / R2GenGPT", "peak memory, ours / R2GenGPT"
    lines = []
    for work, ours, theirs, faster, smaller in (
        ("49 image tokens each", "ours", "49 tokens", "≥ 1.5", "≤ 1.0"),
        ("49 image tokens each, cached", "cached", "49 tokens", "", ""),
        ("49 image tokens each, same function", "same", "49 tokens", "≥ 2.0", ""),
        ("49 image tokens against R2GenGPT's 257", "ours", "257 tokens", "≥ 3.0", "≤ 0.6"),
    ):
        lines.append(Line(work, speed, ratios(seconds[theirs], seconds[ours]), faster))
        lines.append(Line(work, "tokens, ours / R2GenGPT", [steps[ours][1] / steps[theirs][1]]))
        if ours in memory:
            lines.append(Line(work, space, [memory[ours] / memory[theirs]], smaller))
    lines.append(Line("ours", "CPU seconds a step", seconds["ours"]))
    lines.append(Line("ours", "peak memory, GiB", [memory["ours"] / 2**30]))
    lines.append(tiny_cache(rounds))
    return Row(lines, list(NOTES))


NOTES = (
    "At first, 38 % of the profile of ours was matrix products of frozen weights, 30 % attention, 11 % LoRA's "
    "dropout and copies, and 6 % the gradient of the softmax over the vocabulary; R2GenGPT's was the same, so "
    "that what can be saved beside the products is small. Ours reads 1.5 times as many tokens, for the label "
    "tokens and the label text: being 1.5 times as fast with no more memory would need 2.3 times the speed and "
    "two thirds of the memory for each token.",
)


def small_step(name: str, vision: str, text: str) -> tuple[Callable[[], None], int]:
    """A step of a design, as a function that makes it, and how many tokens the LLM reads for each study."""
    if name in ("49 tokens", "257 tokens"):
        theirs = models.R2GenGPT(vision, text, torch.bfloat16, 7 if name == "49 tokens" else None).train()
        vocabulary = theirs.llm.config.vocab_size
        views = models.random_views(models.BATCH_SIZE)
        report = models.random_report(models.BATCH_SIZE, models.REPORT_TOKENS, vocabulary)
        return step_of(theirs, lambda: theirs(views, report)), theirs.length(report)
    model, processor = models.small_model(vision, text, **(_SAME if name == "same" else {}))
    batch = models.small_batch(processor, model.config.placeholder_token_ids[0])
    if name == "same":
        del batch["finding_states"]
    if name == "cached":
        with torch.no_grad():
            batch["view_features"] = model.encode_views(batch.pop("pixel_values"), batch["view_mask"])
    tokens = model.expand_finding_text(**batch)["input_ids"].shape[1]
    return step_of(model, lambda: model(**model.expand_finding_text(**batch)).loss), tokens


def step_of(model: torch.nn.Module, loss: Callable[[], torch.Tensor], dtype: torch.dtype = torch.bfloat16):
    """A function that makes a step of AdamW."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_of_step(name: str, vision: str, text: str) -> int:
    """The peak of the resident set during the second step, in bytes."""
    step, _ = small_step(name, vision, text)
    step()
    return peak_bytes(step)[1]


def tiny_cache(rounds: int) -> Line:
    """A step of the quick start's report stage from images against one from cached features, collating included."""
    from otdrg.inference.features import cache_features
    from otdrg.training.collation import ReportCollator
    from otdrg.training.data import build_studies
    from otdrg.training.model import build_model, set_trained_parts
    from otdrg.training.recipe import load_recipe

    size = 16
    phantoms = f"studies.options={{train: {size}, validation: 0, test: 0}}"
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "phantom_tiny.yaml", [phantoms])
    images = build_studies(recipe.studies, recipe.labels)["train"]
    torch.manual_seed(recipe.seed)
    model, processor = build_model(recipe.model, images["report"])
    frozen = set_trained_parts(model, vision="frozen", text="full", predictor="frozen", joining=True)
    collator = ReportCollator(processor, True, recipe.report.max_report_tokens)
    with tempfile.TemporaryDirectory() as cache:
        features = cache_features(model, processor, images, cache, size)
        model.train()
        for part in frozen:
            part.eval()
        rows = {"images": images, "features": features}
        batches = {name: lambda kept=kept: collator([kept[i] for i in range(size)]) for name, kept in rows.items()}
        steps = {
            name: step_of(model, lambda batch=batch: model(**model.expand_finding_text(**batch())).loss, torch.float32)
            for name, batch in batches.items()
        }
        found = in_turns({name: lambda step=step: [step() for _ in range(5)] for name, step in steps.items()}, rounds)
    return Line(
        "quick start, 16 phantoms", "steps/s, cached features / images", ratios(found["images"], found["features"])
    )
