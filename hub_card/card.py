"""The model card: a template filled from the files of a model's run.

The card states only what these files hold: a missing value is called "not recorded", and a model without an evaluation
has no scores. Scores are rounded in the text and exact in the metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from jinja2 import Environment, StrictUndefined, Template, TemplateError

from ..evaluation.evaluate import ROWS
from ..files_otdrg import describe
from ..metrics.classification import MINIMUM_INTERVAL_POSITIVES
from ..metrics.efficacy import F1_SCORES
from ..runtime.printable import enumerated
from ..studies.card import HUB_LICENCES
from .evaluations import FEW_POSITIVES, EvaluationFacts, score_headings
from .facts import FEW_TRAINING_POSITIVES, Facts, gather
from .run_files import OWN_DATASET, RunFiles, own_evaluation, read_run

#: Forms of published weights, each with its relation to the base models as the Hub names it.
FORMS: dict[str, str] = {"full": "finetune", "adapter": "adapter"}
#: `license_name` of weights that are bound by the terms of the data and base models they were made from.
TERMS = "terms-of-data-and-base-models"

_TEMPLATE = Path(__file__).with_name("model_card.md")
#: A task of the Hub; transformers 5 has no pipeline of this name, so the repository brings one.
_TASK = "image-to-text"
_TAGS = ["otdrg", "radiology", "chest-x-ray", "radiology-report-generation", "optimal-transport", "medical"]
#: The Hub's types of metrics, by the beginning of the score's name; others are their own type.
_METRIC_TYPES = {"bleu": "bleu", "rouge": "rouge"}
_LABEL_WORDS = {"14": "14 findings", "5": "CheXpert's 5 findings", "13": "13 findings, without No Finding"}


def build_card(
    run: Path,
    repo_id: str,
    evaluations: Sequence[Path] = (),
    form: str = "full",
    base_models: Sequence[str] = (),
    license: str | None = None,
    model_digest: str | None = None,
) -> ModelCard:
    """Build the card of a trained model.

    Weights trained from scratch on Apache-2.0 studies only (phantoms) are licensed under Apache-2.0. For all others the
    licence is `other`, and the text names the terms of the data and the base models.

    Args:
        run: folder of a run, or of a model without one.
        repo_id: the repository, "org/name".
        evaluations: folders or `evaluation.json` files written by `otdrg evaluate`; by default those in the run's
            folder. The report stage's own evaluation is added unless one of these is on the same studies.
        form: form of the weights, one of `FORMS`.
        base_models: Hub ids of the models it was initialised from; by default those in the configuration.
        license: licence of the weights, by the Hub's name; by default as described above.
        model_digest: [`otdrg.inference.digests.model_digest`] of the model; evaluations of another model are refused.

    Raises:
        ValueError: the form is unknown, an evaluation belongs to another model, or a file has the wrong content.
        OSError: an evaluation does not exist.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: expected one of {', '.join(FORMS)}")
    files = read_run(run, evaluations)
    for evaluation in files.evaluations:
        if model_digest and evaluation["generation"].get("model") not in (None, model_digest):
            raise ValueError(
                f"the evaluation of split {evaluation['split']} belongs to another model than {files.name}: expected "
                "one that otdrg evaluate made from these weights, with this version of the package"
            )
    try:
        return _card(files, repo_id, form, base_models, license)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, TemplateError) as error:
        at_fault = _file_at_fault(files, repo_id, form, base_models, license)
        raise ValueError(f"{at_fault}: {describe(error)}") from error


def _file_at_fault(files: RunFiles, *arguments) -> Path:
    """The damaged file of a run: the card can be built without it."""
    own = own_evaluation(files)
    others = [found for found in files.evaluations if found != own]
    for name, absent in (
        ("results.json", {"results": {}, "evaluations": others}),
        ("evaluation.json", {"evaluations": [own] if own in files.evaluations else []}),
        ("run.json", {"sittings": []}),
        ("recipe.yaml", {"recipe": None}),
        ("config.json", {"config": {}}),
    ):
        with suppress(Exception):
            _card(replace(files, **absent), *arguments)
            return files.folder / name
    return files.folder


def _card(files: RunFiles, repo_id: str, form: str, base_models: Sequence[str], license: str | None) -> ModelCard:
    facts = gather(files)
    metadata = _metadata(files, facts, repo_id, form, base_models, license)
    text = _template().render(
        card_data=metadata.to_yaml(),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        form=form,
        license=license,
        base_models=metadata.base_model or list(facts.origins.values()),
        terms=TERMS,
        files=files,
        facts=facts,
        fewest_auc_positives=MINIMUM_INTERVAL_POSITIVES,
        few_positives=FEW_POSITIVES,
        few_training_positives=FEW_TRAINING_POSITIVES,
        own_dataset=OWN_DATASET,
        rows=ROWS,
        metadata=metadata,
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))


@cache
def _template() -> Template:
    # Not `ModelCard.from_template`: it prints an undefined value as nothing, where a card must fail.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(listed=enumerated, duration=_duration, counted=_counted)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


# --- filters of the template -----------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{seconds / 3600:.1f} hours"


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(
    files: RunFiles, facts: Facts, repo_id: str, form: str, base_models: Sequence[str], license: str | None
) -> ModelCardData:
    bases = list(base_models) or [name for name in facts.backbones.values() if name]
    results = [result for found in facts.evaluations for result in _report_results(found, facts)]
    results += _predictor_results(files, facts)
    licence = {"license": license}
    if license is None:
        apache = {HUB_LICENCES.get(name) for name in facts.licences} == {"apache-2.0"}
        licence = {"license": "apache-2.0"}
        if not (apache and facts.from_scratch and not base_models):
            licence = {"license": "other", "license_name": TERMS}
            licence["license_link"] = f"{constants.ENDPOINT}/{repo_id}#licence"
    return ModelCardData(
        language="en",
        **licence,
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=list(_TAGS),
        datasets=[facts.hub_dataset] if facts.hub_dataset else None,
        base_model=bases or None,
        base_model_relation=FORMS[form] if bases else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _report_results(found: EvaluationFacts, facts: Facts) -> Iterator[EvalResult]:
    """Every score and every F1 of the model's reports."""
    labeler, studies = f"labeler {found.labeler}", f"{found.evaluation['studies']:,} studies"
    names = {name: (heading, [found.protocol]) for name, heading in score_headings().items()}
    for name in F1_SCORES:
        average, _, labels, policy = name.split("_", 3)
        qualified = [_LABEL_WORDS[labels], policy.replace("_", " as "), labeler, found.protocol]
        names[name] = f"{average}-F1", qualified
    for name, (heading, qualified) in names.items():
        if found.model.get(name) is None:
            continue
        kind = name.partition("_")[0]
        yield EvalResult(
            task_type=_TASK,
            task_name="Radiology report generation",
            # Names everything in which two evaluations differ; otherwise the Hub would merge them.
            dataset_config=f"{found.protocol}, {labeler}, {found.decoding}, {studies}",
            metric_type="f1" if name in F1_SCORES else _METRIC_TYPES.get(kind, name),
            metric_value=found.model[name],
            metric_name=f"{heading} ({'; '.join(qualified)})",
            **_dataset_fields(found.dataset, found.evaluation, facts),
        )


def _predictor_results(files: RunFiles, facts: Facts) -> Iterator[EvalResult]:
    """The area under the curve of the label predictor, on validation."""
    validation = files.results.get("predictor", {}).get("validation") or {}
    macro = validation.get("macro_auc_interval")
    if macro is None:
        macro = {"auc": validation.get("macro_auc"), "findings": validation.get("auc_findings")}
    if macro["auc"] is None:
        return
    studies = max(row["studies"] for row in validation["findings"].values())
    evaluation = {"dataset": OWN_DATASET, "split": "validation", "studies": studies}
    yield EvalResult(
        task_type="image-classification",
        task_name="Label prediction",
        dataset_config="states as given to the run",
        metric_type="roc_auc",
        metric_value=macro["auc"],
        metric_name=f"macro AUC of the label predictor, {macro['findings']} findings",
        **_dataset_fields(facts.dataset, evaluation, facts),
    )


def _dataset_fields(name: str, evaluation: dict, facts: Facts) -> dict[str, str]:
    name = name.replace("`", "")
    hub_id = facts.hub_dataset if evaluation["dataset"] == OWN_DATASET else None
    # A dataset without an id on the Hub gets a name that is not an id.
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "not-on-the-hub"
    return {
        "dataset_type": hub_id or slug,
        "dataset_name": f"{name}, split {evaluation['split']}, {evaluation['studies']:,} studies",
        "dataset_split": evaluation["split"],
    }
