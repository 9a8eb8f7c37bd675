"""What a card says of a model besides its scores: parts, data, training, all from the run's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..metrics.classification import MINIMUM_INTERVAL_POSITIVES
from ..metrics.tables import markdown_table
from ..studies import PREPARED
from ..studies.card import collection_name
from ..studies.phantom import LICENCE as PHANTOM_LICENCE
from .run_files import OWN_DATASET, RunFiles

NOT_RECORDED = "not recorded"


# --- data ------------------------------------------------------------------------------------------------------------


def training_data(files: RunFiles) -> dict[str, dict[str, Any]] | None:
    """By split, what the studies trained on are: `describe_studies` of the last sitting, or of an evaluation on the
    same dataset; None where neither has it, as in files of earlier versions."""
    own = [sitting.get("data") for sitting in reversed(files.sittings)]
    own += [found.get("data") for found in files.evaluations if found["dataset"] == OWN_DATASET]
    return next(filter(None, own), None)


def hub_dataset(files: RunFiles) -> str | None:
    """Id of the dataset on the Hub that the model was trained on, as far as one is recorded."""
    return next((sitting["hub_dataset"] for sitting in reversed(files.sittings) if sitting.get("hub_dataset")), None)


def training_licences(files: RunFiles) -> list[str]:
    """The licences of the training studies, "" for one that is not stated; empty where they are not recorded."""
    data = training_data(files)
    if data is not None and "train" in data:
        return data["train"]["licences"]
    return [PHANTOM_LICENCE] if source(files) == "phantom" else []


def dataset_name(files: RunFiles) -> str:
    """The dataset the model was trained on: its id on the Hub, its collection, or what it is, in words."""
    data, name = training_data(files), source(files)
    if hub_dataset(files) is not None:
        return hub_dataset(files)
    if data is not None and "train" in data:
        return ", ".join(data["train"]["collections"])
    if name is None:
        return "a dataset that is not recorded"
    return "a folder of otdrg prepare" if name == PREPARED else collection_name(name, "")


def evaluated_dataset(files: RunFiles, evaluation: Mapping[str, Any]) -> str:
    """The dataset of an evaluation, likewise."""
    if evaluation["dataset"] == OWN_DATASET:
        return dataset_name(files)
    data = evaluation.get("data", {}).get(evaluation["split"])
    return f"{', '.join(data['collections'])} (`{evaluation['dataset']}`)" if data else f"`{evaluation['dataset']}`"


def data_facts(files: RunFiles) -> list[str]:
    """What the model was trained on."""
    if files.recipe is None:
        return [f"The training data are {NOT_RECORDED}: this model came without the files of its run."]
    studies, labels = files.recipe["studies"], files.recipe["labels"]
    licences = [licence or "not stated" for licence in training_licences(files)]
    facts = [
        f"Dataset: {dataset_name(files)} (source `{studies['source']}`"
        + ("" if hub_dataset(files) else "; it has no id on the Hub that the run knows of")
        + ")",
        f"Licence of the studies: {', '.join(licences) or NOT_RECORDED}",
        f"Studies: {_split_counts(files) or NOT_RECORDED}",
        f"Views: {_views(files)}",
        f"Reports are made of {studies['sections']}, cleaning `{studies['cleaning']}`"
        + _limits_of_studies(studies.get("limit")),
    ]
    read_by = [f"the table `{labels['csv']}` for the studies it names"] if labels.get("csv") else []
    read_by += [f"the labeler `{labels['labeler']}`, which reads the reports"] if labels.get("labeler") else []
    facts.append(f"States of the 14 findings from {', else '.join(read_by) or 'the dataset itself'}")
    return facts


def source(files: RunFiles) -> str | None:
    """The source of the recipe's studies."""
    return None if files.recipe is None else files.recipe["studies"]["source"]


def _split_counts(files: RunFiles) -> str:
    counts = files.sittings[-1].get("studies", {}) if files.sittings else {}
    return ", ".join(f"{split} {count['studies']:,}" for split, count in counts.items())


def _views(files: RunFiles) -> str:
    train = (training_data(files) or {}).get("train")
    if train is None or train["views"] is None:
        return NOT_RECORDED
    kinds = ", ".join(
        f"{count:,} {'of unknown projection' if kind == 'unknown' else kind}" for kind, count in train["views"].items()
    )
    numbers = ", ".join(f"{count:,} with {views}" for views, count in train["views_a_study"].items())
    return f"{kinds}; training studies by views: {numbers}"


def _limits_of_studies(limits: Mapping[str, int] | None) -> str:
    return "; the first studies only: " + ", ".join(f"{s} {n:,}" for s, n in limits.items()) if limits else ""


# --- parts -----------------------------------------------------------------------------------------------------------


def backbones(files: RunFiles) -> dict[str, str | None]:
    """By part, vision and text, the id on the Hub it was initialised from; None where it has none that is known."""
    found = {}
    for part in ("vision", "text"):
        reference = files.config.get(f"{part}_backbone")
        if reference and reference.endswith(".gguf"):
            reference = "/".join(reference.split("/")[:2])
        found[part] = reference if reference and reference.count("/") == 1 else None
    return found


def is_from_scratch(files: RunFiles) -> bool:
    """Whether neither backbone was pretrained elsewhere."""
    if files.recipe is None:
        return False
    model = files.recipe["model"]
    return not any((model["vision"], model["text"], *backbones(files).values(), model.get("label_text_encoder")))


def how_it_works(files: RunFiles) -> str:
    """A paragraph on the model's parts, as its configuration has them."""
    config, scratch = files.config, is_from_scratch(files)
    parts = ((part, config[f"{part}_config"]) for part in ("vision", "text"))
    vision, text = (
        f"`{found.get('architecture') or found['model_type']}`{_origin(files, part)}" for part, found in parts
    )
    fusion = "averaged over the views" if config.get("view_fusion") == "mean" else "one view's behind another's"
    told = [
        f"A vision encoder ({vision}) turns each view into {config['image_tokens']} image tokens, {fusion}.",
        "A predictor reads the state of 14 findings, positive, negative, unclear or unmentioned, from the image.",
    ]
    if config.get("dle") and config.get("fiot"):
        told.append(
            "Image tokens and features of these states are projected into the LLM's embedding space and drawn together "
            f"there in training by optimal transport (entropic, epsilon {config['ot_epsilon']}, weight "
            f"{config['ot_weight']} in the loss). The LLM ({text}) reads image tokens, label tokens, the states as "
            "text and a prompt, and writes the report."
        )
    elif config.get("dle"):
        told.append(
            f"The LLM ({text}) reads the image tokens, the states as text and a prompt, and writes the report; optimal "
            "transport (FIOT) is switched off in this model."
        )
    else:
        told.append(
            f"The LLM ({text}) reads the image tokens and a prompt and writes the report; it is not told of the states "
            "(DLE and FIOT are switched off in this model)."
        )
    if scratch:
        told.append("Both were trained from scratch, on the training data alone.")
    return " ".join(told)


def needed(files: RunFiles, form: str) -> str:
    """The libraries beside transformers that the model is loaded with."""
    libraries = ["torch"]
    if files.config["vision_config"]["model_type"] == "timm_wrapper":
        libraries.append("timm")
    # LoRA is merged in whole weights.
    if form == "adapter":
        libraries.append("peft")
    return " and ".join(filter(None, (", ".join(libraries[:-1]), libraries[-1])))


def origin_names(files: RunFiles) -> list[str]:
    """What the backbones were initialised from, ids or bare names of local files; empty from scratch."""
    model = {} if files.recipe is None else files.recipe["model"]
    found = (backbones(files)[part] or model.get(part) for part in ("vision", "text"))
    return [name for name in (*found, model.get("label_text_encoder")) if name]


def _origin(files: RunFiles, part: str) -> str:
    if is_from_scratch(files):
        return ", from scratch"
    name = backbones(files)[part] or (files.recipe or {}).get("model", {}).get(part)
    return f", initialised from `{name}`" if name else f", its origin {NOT_RECORDED}"


# --- training --------------------------------------------------------------------------------------------------------


def training_facts(files: RunFiles) -> list[str]:
    """How the model came about, as `run.json` has it."""
    if not files.sittings:
        return [f"How it was trained is {NOT_RECORDED}."]
    last = files.sittings[-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items() if number)
    commits = {
        found["id"][:12] + (", with changes that were not committed" if found["dirty"] else ""): None
        for found in (sitting.get("commit") for sitting in files.sittings)
        if found
    }
    where = f"{last['device']}, {_counted(last['processes'], 'process', 'processes')}"
    where += f" of {_counted(last['threads'], 'thread', 'threads')}"
    if last.get("processor"):
        where += f"; processor {last['processor']}, {last['cores']} cores"
    else:
        where += f"; processor {NOT_RECORDED}"
    seconds = [sitting.get("seconds") for sitting in files.sittings]
    ended = sum(filter(None, seconds))
    time = f"{_duration(ended)} in {_counted(len(seconds), 'sitting', 'sittings')}"
    if None in seconds:
        time += f", without {seconds.count(None)} whose end is {NOT_RECORDED}"
    facts = [
        f"Hardware: {where}",
        f"Time, measured: {time}, evaluations included; energy was not measured",
        f"Versions: {versions}",
        f"Commit: {'; '.join(commits) or NOT_RECORDED}",
        f"Seed: {last['seed']}",
    ]
    if last["outcome"] != "finished":
        facts.append(f"**The last sitting did not finish**: {last['outcome'] or 'it was killed, or is still running'}")
    return facts


def stage_table(files: RunFiles) -> str:
    """A row a stage: steps, time, and what was trained; "" where there is no recipe."""
    if files.recipe is None:
        return ""
    rows = []
    for stage in files.recipe["stages"]:
        found, modes = files.results.get(stage), files.recipe[stage]
        seconds = [sitting["stages"][stage].get("seconds") for sitting in files.sittings if stage in sitting["stages"]]
        trained = [modes.get("vision", "–"), modes.get("text", "–")]
        # The predictor's own stage trains it, whatever else it trains.
        trained.append("full" if stage == "predictor" else modes.get("predictor", "–"))
        steps = f"{found['steps']:,}" if found else NOT_RECORDED
        rows.append([f"`{stage}`", steps, _duration(seconds[-1]) if seconds and seconds[-1] else "–", *trained])
    return markdown_table(["stage", "steps", "time of its last sitting", "vision encoder", "LLM", "predictor"], rows)


def stage_facts(files: RunFiles) -> list[str]:
    """What the stages measured on validation."""
    facts = []
    ircp, predictor, report = (files.results.get(stage, {}) for stage in ("ircp", "predictor", "report"))
    probes = [(ircp.get(when) or {}).get("probe") for when in ("before", "after")]
    if all(probe and probe["macro_auc"] is not None for probe in probes):
        before, after = (probe["macro_auc"] for probe in probes)
        facts.append(
            f"Contrastive pre-training (`ircp`): macro AUC of a linear probe on the encoder's features {before:.3f} "
            f"before, {after:.3f} after ({'better' if after > before else 'not better'}; no interval)"
        )
    validation = predictor.get("validation") or {}
    macro = validation.get("macro_auc_interval")
    if macro:
        facts.append(
            f"Label predictor: macro AUC {macro['auc']:.3f}, 95 % interval {macro['low']:.3f} to {macro['high']:.3f}, "
            f"over the {_counted(macro['findings'], 'finding', 'findings')} with at least "
            f"{MINIMUM_INTERVAL_POSITIVES} positives in validation, against the states the run was given"
        )
    elif validation.get("macro_auc") is not None:
        facts.append(
            f"Label predictor: macro AUC {validation['macro_auc']:.3f} over "
            f"{_counted(validation['auc_findings'], 'finding', 'findings')}, no interval"
        )
    best = report.get("best")
    if best and best.get("value") is not None:
        limit = (files.recipe or {}).get("report", {}).get("max_eval_samples")
        facts.append(
            f"The checkpoint was chosen on validation{f', its first {limit:,} studies' if limit else ''}: step "
            f"{best['step']}, `{best['metric']}` = {best['value']:.3f}"
        )
    return facts


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{seconds / 3600:.1f} hours"


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


__all__ = [
    "NOT_RECORDED",
    "backbones",
    "data_facts",
    "dataset_name",
    "evaluated_dataset",
    "how_it_works",
    "hub_dataset",
    "is_from_scratch",
    "needed",
    "origin_names",
    "source",
    "stage_facts",
    "stage_table",
    "training_data",
    "training_facts",
    "training_licences",
]
