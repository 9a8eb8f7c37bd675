"""Checks of a recipe: what needs no data before anything is loaded, the rest before the first stage is trained."""

from __future__ import annotations

import math
import typing
from collections.abc import Collection
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from transformers import GenerationConfig, PreTrainedConfig
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..configuration_otdrg import OTDRGConfig
from ..labelers import labeler_class
from ..labelers.as_typed import labeler_of
from ..metrics import NLG_METRICS
from ..modeling_otdrg import OTDRGForReportGeneration
from ..studies import PREPARED, open_source, source_class
from ..studies.loading import prepared_splits
from . import report
from .build import StudySplits, check_backbones, lora_fields, quantization_config
from .recipe import LabelsRecipe, ModelRecipe, Recipe, StudiesRecipe, convert


def check_recipe(recipe: Recipe) -> None:
    """Check all sections of a recipe, those of stages that are not run too. No study and no backbone is read.

    Raises:
        ValueError: a source, labeler, metric, preset... that does not exist, an option that its source, labeler or
            configuration does not take, or a package that is not installed.
    """
    _check_reporting(recipe.report_to)
    _check_source(recipe.studies)
    _check_labels(recipe.labels)
    config = _check_model(recipe.model)
    quantization_config(recipe.model.quantization)
    for stage in recipe.stages:
        lora_fields(recipe, stage)
    evaluation = recipe.report.evaluation
    for name in evaluation.metrics:
        if name not in (*NLG_METRICS, "bleu"):
            raise ValueError(f"report.evaluation.metrics={name!r}: expected some of {', '.join(NLG_METRICS)}")
    if len(set(evaluation.metrics)) < len(evaluation.metrics):
        raise ValueError(f"report.evaluation.metrics={evaluation.metrics!r}: expected each once")
    try:
        _make_labeler(evaluation.labeler)
    except ValueError as error:
        raise ValueError(f"report.evaluation.labeler={evaluation.labeler!r}: {error}") from None
    report.check(recipe)
    try:
        GenerationConfig(**asdict(recipe.report.generation)).validate()
    except ValueError as error:
        raise ValueError(f"report.generation: {error}") from None
    if recipe.model.text is None and config.text_backbone is None:
        check_positions(recipe, config.text_config)


def check_studies(recipe: Recipe, studies: StudySplits, pending: Collection[str]) -> None:
    """Check what the stages that are to be run read of the studies.

    Raises:
        ValueError: a split that is not among the studies, or one whose finding states are not known.
    """
    wanted = recipe.report.evaluation.split
    if "report" in pending and wanted != "none" and wanted not in studies:
        raise ValueError(
            f"report.evaluation.split={wanted!r}: the studies have {', '.join(studies)}; or none, for no table"
        )
    if "predictor" in pending and recipe.predictor.fit_thresholds:
        validation = studies.get("validation")
        if validation is None or all(states is None for states in validation["finding_states"]):
            raise ValueError(
                "predictor.fit_thresholds=True: expected a validation split with finding states to fit them on"
            )


def check_model(recipe: Recipe, model: OTDRGForReportGeneration, pending: Collection[str]) -> None:
    """Check what the stages that are to be run need of the model that the first of them starts from.

    Raises:
        ValueError: LoRA of modules that a backbone does not have, or reports longer than the LLM's positions.
    """
    if "report" in pending:
        check_positions(recipe, model.config.text_config)
    own = model.config.predictor_encoder == "own"
    for stage in pending:
        towers = {"lora": model.language_model, "vision_lora": model.vision_tower}
        if stage == "predictor" and own:
            towers["vision_lora"] = model.finding_vision_tower
        for field, lora in lora_fields(recipe, stage).items():
            names = [name for name, _ in towers[field].named_modules()]
            if not any(check_target_module_exists(_targets(lora), name) for name in names if name):
                raise ValueError(
                    f"OTDRGConfig.{field}={lora!r}: Target modules are not in the backbone, expected some of "
                    f"{', '.join(_layer_names(towers[field]))}"
                )


def check_positions(recipe: Recipe, text_config: PreTrainedConfig) -> None:
    """Refuse reports that are longer than the positions the LLM has.

    Raises:
        ValueError: names the field.
    """
    most = getattr(text_config, "max_position_embeddings", None)
    for name, value in (
        ("report.max_report_tokens", recipe.report.max_report_tokens),
        ("report.generation.max_new_tokens", recipe.report.generation.max_new_tokens),
    ):
        if most is not None and value >= most:
            raise ValueError(f"{name}={value}: expected less than {most}, the positions of the LLM")


@lru_cache
def _make_labeler(name: str) -> None:
    """Make a labeler, which finds out whether its weights are there, and drop it."""
    labeler_of(name, {})


def _check_reporting(names: list[str]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        # Flyte's callback cannot be named to a Trainer.
        known = sorted(set(INTEGRATION_TO_CALLBACK) - {"flyte"})
        if name not in known:
            raise ValueError(f"report_to={name!r}: expected some of {', '.join(known)}")
        if name not in available:
            raise ValueError(f"report_to={name!r}: the package {name} is not installed")


def _check_source(studies: StudiesRecipe) -> None:
    if studies.source == PREPARED:
        if set(studies.options) != {"folder"} or not isinstance(studies.options["folder"], str):
            raise ValueError(f"studies.options={studies.options!r}: expected the option folder, a path, and no other")
        prepared_splits(studies.options["folder"])
        return
    try:
        source = source_class(studies.source)
    except ValueError as error:
        raise ValueError(f"studies.source={studies.source!r}: {error}") from None
    kinds = typing.get_type_hints(source)
    declared = {item.name for item in fields(source)}
    options = {
        name: convert(value, kinds[name], ("studies", "options", name)) if name in declared else value
        for name, value in studies.options.items()
    }
    try:
        open_source(studies.source, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"studies.options: {error}") from error


def _check_labels(labels: LabelsRecipe) -> None:
    if labels.labeler is None:
        if labels.options:
            raise ValueError(f"labels.options={labels.options!r}: expected none without labels.labeler")
        return
    try:
        labeler_class(labels.labeler, **labels.options)
    except ValueError as error:
        raise ValueError(f"labels.labeler={labels.labeler!r}: {error}") from None


def _check_model(model: ModelRecipe) -> OTDRGConfig:
    try:
        config = OTDRGConfig.from_preset(model.preset, **dict(model.overrides))
    except Exception as error:  # the configurations of backbones raise whatever their fields raise
        reason = " ".join(str(error).split())
        raise ValueError(reason if isinstance(error, ValueError) else f"model.overrides: {reason}") from error
    check_backbones(model, config)
    for field in ("lora", "vision_lora"):
        _check_lora(f"model.overrides.{field}", getattr(config, field))
    return config


def _check_lora(where: str, lora: dict[str, Any] | None) -> None:
    if lora is None:
        return

    def need(name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{where}.{name}={lora[name]!r}: expected {expected}")

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    if "r" in lora:
        need("r", is_number(lora["r"]) and isinstance(lora["r"], int) and lora["r"] > 0, "a positive integer")
    if "lora_alpha" in lora:
        need("lora_alpha", is_number(lora["lora_alpha"]) and lora["lora_alpha"] > 0, "a number above 0")
    if "lora_dropout" in lora:
        dropout = lora["lora_dropout"]
        need("lora_dropout", is_number(dropout) and 0 <= dropout < 1, "a number of at least 0 and below 1")
    if "bias" in lora:
        need("bias", lora["bias"] in ("none", "all", "lora_only"), "none, all or lora_only")
    if "use_rslora" in lora:
        need("use_rslora", isinstance(lora["use_rslora"], bool), "true or false")
    targets = lora["target_modules"]
    names = [targets] if isinstance(targets, str) else targets
    need(
        "target_modules",
        isinstance(names, list) and bool(names) and all(isinstance(name, str) and name for name in names),
        "names of modules, such as [q_proj, v_proj]",
    )


def _targets(lora: dict[str, Any]):
    from peft import LoraConfig

    return LoraConfig(target_modules=lora["target_modules"])


def _layer_names(tower) -> list[str]:
    """Last parts of the names of a backbone's linear layers."""
    from torch import nn

    return sorted({name.rpartition(".")[2] for name, part in tower.named_modules() if isinstance(part, nn.Linear)})


__all__ = ["check_model", "check_positions", "check_recipe", "check_studies"]
