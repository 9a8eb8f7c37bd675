"""Where a model's figures and reports are not to be trusted, as far as its run's files tell."""

from __future__ import annotations

from collections.abc import Iterable

from ..findings_otdrg import FINDING_DISPLAY_NAMES
from .facts import NOT_RECORDED, dataset_name, evaluated_dataset, source, training_data
from .measured import FEW_POSITIVES, never_written, rare_findings
from .run_files import OWN_DATASET, RunFiles

#: Fewer training positives than this are told of as a limit.
_FEW_TRAINING_POSITIVES = 50


def limits(files: RunFiles) -> list[str]:
    """Where the model's figures and reports are not to be trusted, as far as its files tell."""
    return [*_limits_of_data(files), *_limits_of_evaluations(files), *_limits_of_reports(files)]


def _limits_of_data(files: RunFiles) -> Iterable[str]:
    counts = files.sittings[-1].get("studies", {}) if files.sittings else {}
    size = f"{counts['train']['studies']:,} studies" if "train" in counts else f"studies whose number is {NOT_RECORDED}"
    if files.recipe is None:
        yield f"What it was trained on is {NOT_RECORDED}: of which images it can write is not known."
    elif source(files) == "phantom":
        yield (
            f"Trained on {size} of **phantoms**, drawn by a program: it has seen no radiograph of a patient and cannot "
            "read one."
        )
    else:
        yield (
            f"Trained on {size} of {dataset_name(files)}. Other hospitals, devices, views, ages and reporting habits "
            "may give quite other results."
        )
    train = (training_data(files) or {}).get("train")
    if train is None:
        yield f"How often each finding occurs in training, and in which views, is {NOT_RECORDED}."
    else:
        few = [
            f"{FINDING_DISPLAY_NAMES[name]} ({count})"
            for name, count in train["positives"].items()
            if count < _FEW_TRAINING_POSITIVES
        ]
        if few:
            yield f"Positive in fewer than {_FEW_TRAINING_POSITIVES} training studies: {', '.join(few)}."
    side = files.config["image_size"]
    yield f"Views are brought to {side} x {side} pixels: small findings may be lost."
    yield "One language, English. Earlier studies are not shown to it: comparisons with them in a report are invented."


def _limits_of_evaluations(files: RunFiles) -> Iterable[str]:
    for evaluation in files.evaluations:
        where = f"{evaluated_dataset(files, evaluation)}, split {evaluation['split']}"
        silent, rare = never_written(evaluation), rare_findings(evaluation)
        if silent:
            yield f"**Never written as positive** on {where}, though true reports have them: {', '.join(silent)}."
        if rare:
            yield (
                f"Too rare on {where} to say anything of (fewer than {FEW_POSITIVES} true reports): {', '.join(rare)}."
            )
        if evaluation["split"] == "validation" and evaluation["dataset"] == OWN_DATASET:
            yield (
                "Figures on validation flatter: checkpoints and thresholds may have been chosen on the same studies."
            )
    if files.evaluations:
        labelers = ", ".join(dict.fromkeys(f"`{found['labeler']}`" for found in files.evaluations))
        yield (
            f"Clinical efficacy compares states that a program ({labelers}) reads in two texts: its mistakes are in "
            "the figures, true reports may be wrong or leave things out, and no radiologist judged the generated ones."
        )
    if not any(found.get("zero_shot") for found in files.evaluations):
        yield "Not evaluated on another dataset than that of training."
    yield "Not evaluated by sex, age, origin, device or hospital: whom it serves worse than others is not known."


def _limits_of_reports(files: RunFiles) -> Iterable[str]:
    for evaluation in files.evaluations:
        told = ((evaluation.get("faithfulness") or {}).get("conditions") or {}).get("predicted")
        if told:
            found = told["model"]
            yield (
                f"Over {told['studies']:,} studies its reports contradict {found['contradicted']:,} of the states it "
                f"predicted, leave out {found['omitted']:,} and add {found['added']:,}: report and states are to be "
                "read side by side."
            )
            break
    recipe = files.recipe
    if recipe is not None:
        yield f"It learned from at most {recipe['report']['max_report_tokens']} tokens of a report: long ones are cut."
        if recipe["studies"]["cleaning"] != "none":
            yield "Reports are written as those it learned from were cleaned: lower case, sentence by sentence."
    if files.config.get("dle") and files.config.get("fiot"):
        yield "A heatmap shows where the transport plan puts a finding, which need not be where the finding is."
    yield "People tend to believe what is written fluently: a wrong report can mislead its reader more than none."


__all__ = ["limits"]
