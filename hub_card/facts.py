"""The facts of a model that its card states, derived once from the files of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..findings_otdrg import FINDING_DISPLAY_NAMES
from ..studies import PREPARED
from ..studies.card import collection_name
from ..studies.phantom import LICENCE as PHANTOM_LICENCE
from ..training.model import SCRATCH
from .evaluations import EvaluationFacts
from .run_files import OWN_DATASET, RunFiles

#: Findings with fewer positive training studies are named as a limit.
FEW_TRAINING_POSITIVES = 50


@dataclass(frozen=True)
class Facts:
    """Facts derived from several files of a run; the template reads all others from the files.

    Args:
        dataset: display name of the training dataset.
        hub_dataset: its id on the Hub, if one is recorded.
        train: description of the training studies, by [`describe_studies`]; None in files of earlier versions.
        rare_in_training: findings with few positive training studies, with their number.
        split_sizes: number of studies by split; empty where not recorded.
        licences: licences of the training studies, "" for one that is not stated; empty where not recorded.
        backbones: Hub id of the vision and the text backbone; None where unknown.
        origins: what the model was initialised from, by part: Hub ids or names of local files.
        from_scratch: whether no part was pretrained elsewhere.
        evaluations: the evaluations, with distinct titles.
    """

    dataset: str
    hub_dataset: str | None
    train: dict[str, Any] | None
    rare_in_training: list[str]
    split_sizes: dict[str, int]
    licences: list[str]
    backbones: dict[str, str | None]
    origins: dict[str, str]
    from_scratch: bool
    evaluations: list[EvaluationFacts]

    @property
    def row_names(self) -> set[str]:
        """Names of the rows of all evaluations."""
        return {name for found in self.evaluations for name in found.rows}


def gather(files: RunFiles) -> Facts:
    """Derive the facts of a card."""
    hub_dataset = next((each["hub_dataset"] for each in reversed(files.sittings) if each.get("hub_dataset")), None)
    described = [sitting.get("data") for sitting in reversed(files.sittings)]
    described += [found.get("data") for found in files.evaluations if found["dataset"] == OWN_DATASET]
    train = (next(filter(None, described), None) or {}).get("train")
    source = None if files.recipe is None else files.recipe["studies"]["source"]
    counts = files.sittings[-1].get("studies", {}) if files.sittings else {}
    backbones = {part: _hub_id(files.config.get(f"{part}_backbone")) for part in ("vision", "text")}
    parts = {} if files.recipe is None else files.recipe["model"]
    origins = {part: backbones[part] or parts.get(part) for part in backbones if parts.get(part) != SCRATCH}
    origins["label_text_encoder"] = parts.get("label_text_encoder")
    dataset = _dataset(hub_dataset, train, source)
    return Facts(
        dataset=dataset,
        hub_dataset=hub_dataset,
        train=train,
        rare_in_training=[
            f"{FINDING_DISPLAY_NAMES[name]} ({count})"
            for name, count in (train or {"positives": {}})["positives"].items()
            if count < FEW_TRAINING_POSITIVES
        ],
        split_sizes={split: count["studies"] for split, count in counts.items()},
        licences=train["licences"] if train else [PHANTOM_LICENCE] if source == "phantom" else [],
        backbones=backbones,
        origins={part: name for part, name in origins.items() if name},
        from_scratch=files.recipe is not None and not any(origins.values()),
        evaluations=_evaluations(files, dataset),
    )


def _dataset(hub_dataset: str | None, train: Mapping[str, Any] | None, source: str | None) -> str:
    if hub_dataset is not None:
        return hub_dataset
    if train is not None:
        return ", ".join(train["collections"])
    if source is None:
        return "a dataset that is not recorded"
    return "a folder written by otdrg prepare" if source == PREPARED else collection_name(source, "")


def _hub_id(reference: str | None) -> str | None:
    if reference and reference.endswith(".gguf"):
        reference = "/".join(reference.split("/")[:2])
    return reference if reference and reference.count("/") == 1 else None


def _evaluations(files: RunFiles, dataset: str) -> list[EvaluationFacts]:
    predictor = files.results.get("predictor", {}).get("validation")
    facts = []
    for evaluation in files.evaluations:
        own = evaluation["dataset"] == OWN_DATASET
        data = evaluation.get("data", {}).get(evaluation["split"])
        name = f"`{evaluation['dataset']}`"
        if data:
            name = f"{', '.join(data['collections'])} ({name})"
        facts.append(EvaluationFacts(evaluation, dataset if own else name, predictor if own else None))
    titles = [found.title for found in facts]
    for found in facts:
        if titles.count(found.title) > 1:
            found.title += f", {found.decoding}, {found.evaluation['studies']:,} studies"
    return facts
