"""Checks of a recipe that need other modules, made before a study or a backbone is read."""

from __future__ import annotations

import typing
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..configuration_otdrg import OTDRGConfig
from ..labelers import labeler_class
from ..modeling_otdrg import OTDRGForReportGeneration
from ..studies import PREPARED, open_source, source_class
from ..studies.loading import prepared_splits
from .callbacks import FIGURES
from .data import StudySplits
from .fields import convert, need
from .model import check_backbones, lora_fields, preset_config, quantization_config
from .recipe import LabelsRecipe, ModelRecipe, Recipe, StudiesRecipe
from .stages import STAGES, stage_of


def check_recipe(recipe: Recipe) -> None:
    """Check all sections of a recipe, including those of stages that are not run.

    Raises:
        ValueError: a source, labeler, metric, preset... that does not exist, an option that its source, labeler or
            configuration does not have, or a package that is not installed.
    """
    _check_reporting(recipe)
    _check_source(recipe.studies)
    _check_labels(recipe.labels)
    _check_model(recipe.model)
    for name in recipe.stages:
        lora_fields(recipe, name)
    for name in STAGES:
        stage, section = stage_of(name), getattr(recipe, name)
        stage.check(recipe)
        try:
            section.best.check(("loss", *FIGURES, *stage.score_names()))
        except ValueError as error:
            raise ValueError(f"{name}.metric_for_best_model={error}") from None
    quantization_config(recipe.model.quantization)


def check_arguments(recipe: Recipe, pending: Collection[str]) -> None:
    """Complete the arguments of every stage that is run, which fails if this machine cannot do what they ask for.

    Raises:
        ValueError: names the stage; transformers' own message follows.
    """
    for name in pending:
        getattr(recipe, name).prepare(Path(recipe.output_dir) / name, recipe.seed, recipe.report_to, evaluates=True)


def check_model(recipe: Recipe, model: OTDRGForReportGeneration, pending: Collection[str]) -> None:
    """Check what the stages that are run need of the model that the first of them starts from.

    Raises:
        ValueError: LoRA of modules that a backbone does not have, or whatever a stage refuses.
    """
    for name in pending:
        stage_of(name).check_model(recipe, model)
        own = model.config.predictor_encoder == "own" and stage_of(name).trains_own_encoder
        towers = {
            "lora": model.language_model,
            "vision_lora": model.finding_vision_tower if own else model.vision_tower,
        }
        for field, lora in lora_fields(recipe, name).items():
            config = LoraConfig(**lora)
            names = [part for part, _ in towers[field].named_modules()]
            all_linear = str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
            if not all_linear and not any(check_target_module_exists(config, part) for part in names if part):
                raise ValueError(
                    f"OTDRGConfig.{field}={lora!r}: Target modules are not in the backbone, expected some of "
                    f"{', '.join(_layer_names(towers[field]))}"
                )


def _check_reporting(recipe: Recipe) -> None:
    available = get_available_reporting_integrations()
    # A Trainer does not accept Flyte's callback by its name.
    known = sorted(set(INTEGRATION_TO_CALLBACK) - {"flyte"})
    places = {
        "report_to": recipe.report_to,
        **{f"{name}.report_to": getattr(recipe, name).report_to for name in STAGES},
    }
    for place, names in places.items():
        for name in [names] if isinstance(names, str) else names or ():
            if name in ("none", "all"):
                continue
            if name not in known:
                raise ValueError(f"{place}={name!r}: expected some of {', '.join(known)}")
            if name not in available:
                raise ValueError(f"{place}={name!r}: the package {name} is not installed")


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
        config = preset_config(model)
    except Exception as error:  # the configurations of backbones raise whatever their fields raise
        reason = " ".join(str(error).split())
        raise ValueError(reason if isinstance(error, ValueError) else f"model.overrides: {reason}") from error
    check_backbones(model, config)
    for field in ("lora", "vision_lora"):
        if getattr(config, field) is not None:
            _check_lora(f"model.overrides.{field}", getattr(config, field))
    return config


def _check_lora(where: str, lora: dict[str, Any]) -> None:
    """Check types and bounds of LoRA fields, where peft accepts values that fail later or train nothing."""
    kinds = {**typing.get_type_hints(LoraConfig), "lora_alpha": float}
    for name, value in lora.items():
        if kinds.get(name) in (bool, float) or name in ("r", "target_modules", "bias"):
            convert(value, kinds[name], (*where.split("."), name))
    for name in ("r", "lora_alpha"):
        need(lora.get(name, 8) > 0, f"{where}.{name}", lora.get(name), "a number above 0")
    dropout = lora.get("lora_dropout", 0.0)
    need(0 <= dropout < 1, f"{where}.lora_dropout", dropout, "a number of at least 0 and below 1")
    targets = lora.get("target_modules")
    need(
        bool(targets) and all(targets), f"{where}.target_modules", targets, "names of modules, such as [q_proj, v_proj]"
    )


def _layer_names(tower: nn.Module) -> list[str]:
    """Last parts of the names of a backbone's linear layers."""
    return sorted({name.rpartition(".")[2] for name, part in tower.named_modules() if isinstance(part, nn.Linear)})


def check_studies(recipe: Recipe, studies: StudySplits, pending: Collection[str]) -> None:
    """Check what the stages that are run read of the studies.

    Raises:
        ValueError: a split that is not among the studies, or one whose finding states are not known.
    """
    for name in pending:
        stage_of(name).check_studies(recipe, studies)


__all__ = ["check_arguments", "check_model", "check_recipe", "check_studies"]
