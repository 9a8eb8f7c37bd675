"""Two recipes compared: whether a stage that was trained with the one may go on, or be built on, with the other."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .recipe import STAGES, Recipe

#: OTDRGConfig fields that earlier stages than these do not read; all others shape the first stage already.
FIRST_READ: dict[str, str] = {
    **dict.fromkeys(("focal_gamma", "focal_reduction", "predictor_dropout", "finding_thresholds"), "predictor"),
    **dict.fromkeys(
        (
            "dle",
            "fiot",
            "finding_text",
            "ot_epsilon",
            "ot_max_iterations",
            "ot_tolerance",
            "ot_cost_normalization",
            "ot_labels",
            "ot_gradient",
            "ot_weight",
            "ot_contrastive_weight",
            "ot_contrastive_temperature",
            "predicted_state_ratio",
            "lora",
        ),
        "report",
    ),
}
#: Fields of a stage's section that change what is watched and kept, or how it is computed, and not what is learned.
_WATCHING = (
    "eval_batch_size",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "probe_studies",
    "cache_features",
    "gradient_checkpointing",
    "compile",
)
#: Those that come into play when the training of the stage is over.
_AFTERWARDS = ("fit_thresholds", "evaluation")
#: What one optimizer step is made of, together with the number of processes.
_BATCH = ("batch_size", "gradient_accumulation")
#: Order of streamed studies.
_STREAM = ("studies.streaming", "studies.shuffle_buffer")

#: Field, value then, value now.
Changes = dict[str, tuple[Any, Any]]


def recipe_changes(before: dict[str, Any], recipe: Recipe) -> Changes:
    """Every field in which a recipe differs from an earlier one, `section.field`, with both values.

    Args:
        before: the earlier recipe as a dictionary (`dataclasses.asdict`).
        recipe: the recipe now.
    """
    old, new = _flat(before), _flat(asdict(recipe))
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def stage_changes(before: dict[str, Any], recipe: Recipe, stage: str, finished: bool, processes: tuple[int, int]):
    """The changes that matter to a stage, and those of its own section that do not.

    An unfinished stage may be watched differently, and may be made longer. It may be spread differently over batches,
    accumulation and processes, if as many studies make a step as before. Studies and labels are not compared by fields,
    for the same may lie elsewhere now: that is for their fingerprint.

    Args:
        before: the recipe it was trained with, as a dictionary.
        recipe: the recipe now.
        stage: its name.
        finished: whether it is finished.
        processes: their number then and now.

    Returns:
        Two dictionaries of changes.
    """
    changes = recipe_changes(before, recipe)
    told: Changes = {}
    harmless: Changes = {}
    same_batch = not finished and _studies_a_step(before[stage], stage, processes[0]) == _studies_a_step(
        asdict(recipe)[stage], stage, processes[1]
    )
    for name, (old, new) in changes.items():
        section, _, field = name.partition(".")
        if section == stage:
            field = field.partition(".")[0]
            if (
                field in _WATCHING
                or (not finished and field in _AFTERWARDS)
                or (not finished and field in ("epochs", "max_steps") and _is_longer(before[stage], recipe, stage))
                or (field in _BATCH and same_batch)
                or (field == "workers" and (finished or not recipe.studies.streaming))
            ):
                harmless[name] = (old, new)
            else:
                told[name] = (old, new)
        elif name == "seed" or (section == "model" and _reads(stage, field)) or (name in _STREAM and not finished):
            told[name] = (old, new)
    if not finished and processes[0] != processes[1] and not same_batch:
        told["the number of processes"] = processes
    return told, harmless


def data_changes(before: dict[str, Any], recipe: Recipe) -> Changes:
    """The changes that may be why the studies are others."""
    changes = recipe_changes(before, recipe)
    return {name: pair for name, pair in changes.items() if name.partition(".")[0] in ("studies", "labels", "seed")}


def format_changes(changes: Changes) -> str:
    """Changes in a line: "model.preset='small' then, 'tiny' now"."""

    def told(value: Any) -> str:
        return "unset" if value is None else repr(value)

    return "; ".join(f"{name}={told(old)} then, {told(new)} now" for name, (old, new) in sorted(changes.items()))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value != {}:
            flat[prefix + key] = value
    return flat


def _reads(stage: str, field: str) -> bool:
    """Whether a stage reads a field of the recipe's `model`, "preset" or "overrides.ot_epsilon"."""
    section, _, name = field.partition(".")
    order = list(STAGES)
    if section == "quantization":
        # The LLM is packed in this stage alone.
        return stage == order[-1]
    if section != "overrides":
        return True
    return order.index(stage) >= order.index(FIRST_READ.get(name.partition(".")[0], order[0]))


def _is_longer(before: dict[str, Any], recipe: Recipe, stage: str) -> bool:
    """Whether a stage is trained for longer now, as far as `epochs` and `max_steps` tell; steps go before epochs."""
    now = asdict(recipe)[stage]
    if (before["max_steps"] > 0) != (now["max_steps"] > 0):
        return False
    field = "max_steps" if now["max_steps"] > 0 else "epochs"
    return now[field] >= before[field]


def _studies_a_step(section: dict[str, Any], stage: str, processes: int) -> tuple[int, ...]:
    """What makes a step, as far as the loss knows: negatives of contrastive pre-training come from one batch."""
    batch = section["batch_size"] * processes
    return (batch, section["gradient_accumulation"]) if stage == "ircp" else (batch * section["gradient_accumulation"],)


__all__ = ["Changes", "data_changes", "format_changes", "recipe_changes", "stage_changes"]
