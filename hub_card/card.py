"""The model card: what a model is, how it was made and what was measured of it, filled from its run's own files.

Nothing in a card is written by hand: what the files do not have is said not to be recorded, and a model without an
evaluation has no scores. Figures are rounded in the text and whole in the metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from jinja2 import TemplateError

from ..evaluation.evaluate import ROWS
from ..files_otdrg import describe
from ..metrics import LABEL_SETS, NLG_METRICS, UNCERTAIN_POLICIES
from ..metrics.classification import MINIMUM_INTERVAL_POSITIVES
from ..metrics.clinical_efficacy.clinical_efficacy import AVERAGES
from ..metrics.tables import NLG_NAMES
from ..studies.card import HUB_LICENCES
from . import facts
from .limits import limits
from .measured import Measured, decoding_words, labeler_words, measured, protocol_words, title
from .run_files import OWN_DATASET, RunFiles, own_evaluation, published_recipe, read_run

#: How a repository can hold the weights, and what that makes of its base models on the Hub.
FORMS: dict[str, str] = {"full": "finetune", "adapter": "adapter"}
#: Not a licence: the name under which the Hub lists weights that are bound by what they were made from.
TERMS = "terms-of-data-and-base-models"

_TEMPLATE = Path(__file__).with_name("model_card.md")
#: The Hub's own task of that name; the repository brings the pipeline, which transformers 5 has no more.
_TASK = "image-to-text"
_TAGS = ("otdrg", "radiology", "chest-x-ray", "radiology-report-generation", "optimal-transport", "medical")
_METRIC_TYPES = {"meteor": "meteor", "rouge_l": "rouge", "cider": "cider"}
_LABEL_WORDS = {"14": "14 findings", "5": "CheXpert's 5 findings", "13": "13 findings, without No Finding"}
#: Tokens that the example in the text asks for where the model does not say.
_NEW_TOKENS = 120


def build_card(
    run: Path,
    repo_id: str,
    evaluations: Sequence[Path] = (),
    form: str = "full",
    base_models: Sequence[str] = (),
    license: str | None = None,
    model_digest: str | None = None,
) -> ModelCard:
    """The card of a trained model.

    Weights that were trained from scratch on nothing but Apache-2.0 studies (phantoms) are put under Apache-2.0. All
    others are `other`, and the text names the terms of data and base models, which are for people to weigh.

    Args:
        run: folder of a run, or of a model without one.
        repo_id: where it will be, "org/name".
        evaluations: folders or `evaluation.json` files that `otdrg evaluate` wrote; by default those that lie in the
            run's folder. The report stage's own stands too, where none of them is of the same.
        form: of the weights, one of `FORMS`.
        base_models: ids on the Hub of what it was initialised from; by default those the configuration has.
        license: of the weights, by the Hub's name; by default as above.
        model_digest: [`otdrg.inference.features.model_digest`] of the model, for evaluations to be held against.

    Raises:
        ValueError: a form there is not, an evaluation of another model, or a fault in the files.
        OSError: an evaluation that does not exist.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: expected one of {', '.join(FORMS)}")
    files = read_run(run, evaluations)
    _check_model(files, model_digest)

    def card(files: RunFiles) -> ModelCard:
        return _card(files, repo_id, form, base_models, license)

    try:
        return card(files)
    except (KeyError, TypeError, AttributeError, IndexError, TemplateError) as error:
        raise ValueError(f"{_file_at_fault(files, card)}: {describe(error)}") from error


def _file_at_fault(files: RunFiles, card: Callable[[RunFiles], ModelCard]) -> str:
    """The file of a run without which its card can be written."""
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
            card(replace(files, **absent))
            return str(files.folder / name)
    return str(files.folder)


def _card(files: RunFiles, repo_id: str, form: str, base_models: Sequence[str], license: str | None) -> ModelCard:
    metadata = _metadata(files, repo_id, form, base_models, license)
    found = _measured(files)
    return ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        form=form,
        results_in_short=_results_in_short(found),
        how_it_works=facts.how_it_works(files),
        needed=facts.needed(files, form),
        max_new_tokens=_new_tokens(files),
        data_facts=facts.data_facts(files),
        evaluations=found,
        least_positives=MINIMUM_INTERVAL_POSITIVES,
        stage_facts=facts.stage_facts(files),
        limits=limits(files),
        training_facts=facts.training_facts(files),
        stages=facts.stage_table(files),
        recipe=published_recipe(files),
        licence=_licence_text(files, metadata, license),
    )


def _measured(files: RunFiles) -> list[Measured]:
    """The evaluations as the card shows them; titles that would be the same are told apart."""
    predictor = files.results.get("predictor", {}).get("validation")
    names = [facts.evaluated_dataset(files, evaluation) for evaluation in files.evaluations]
    titles = [title(evaluation, name) for evaluation, name in zip(files.evaluations, names, strict=True)]
    found = []
    for evaluation, name, heading in zip(files.evaluations, names, titles, strict=True):
        one = measured(evaluation, name, predictor if evaluation["dataset"] == OWN_DATASET else None)
        if titles.count(heading) > 1:
            one = replace(one, title=f"{heading}, {decoding_words(evaluation)}, {evaluation['studies']:,} studies")
        found.append(one)
    return found


def _check_model(files: RunFiles, model_digest: str | None) -> None:
    if model_digest is None:
        return
    for evaluation in files.evaluations:
        evaluated = evaluation["generation"].get("model")
        if evaluated not in (None, model_digest):
            raise ValueError(
                f"the evaluation of split {evaluation['split']} is of another model than {files.name}'s: expected one "
                "that otdrg evaluate made of these very weights, with this version of the package"
            )


def _results_in_short(found: Sequence[Measured]) -> str:
    if not found:
        return "**Its reports have not been evaluated: no measured result lies with this model.**"
    first = found[0]
    lines = [f"Measured on {first.title}:", "", *(f"- {told}" for told in first.in_short)]
    return "\n".join(lines)


def _new_tokens(files: RunFiles) -> int:
    return ((files.recipe or {}).get("report", {}).get("generation") or {}).get("max_new_tokens", _NEW_TOKENS)


# --- licence ---------------------------------------------------------------------------------------------------------


def _licence_fields(files: RunFiles, repo_id: str, base_models: Sequence[str], license: str | None) -> dict[str, str]:
    if license is not None:
        return {"license": license}
    hub_names = {HUB_LICENCES.get(licence) for licence in facts.training_licences(files)}
    if hub_names == {"apache-2.0"} and facts.is_from_scratch(files) and not base_models:
        return {"license": "apache-2.0"}
    return {
        "license": "other",
        "license_name": TERMS,
        "license_link": f"{constants.ENDPOINT}/{repo_id}#licence",
    }


def _licence_text(files: RunFiles, metadata: ModelCardData, license: str | None) -> str:
    licences = [licence or "not stated" for licence in facts.training_licences(files)]
    known = ", ".join(licences) or f"licence {facts.NOT_RECORDED}"
    data = f"the training data ({facts.dataset_name(files)}: {known})"
    base_models = metadata.base_model or facts.origin_names(files)
    bases = "no base model"
    if base_models:
        bases = f"the base models ({', '.join(f'`{name}`' for name in base_models)}, each under its own licence)"
    elif not facts.is_from_scratch(files):
        bases = f"base models that are {facts.NOT_RECORDED}"
    if license is not None:
        told = f"The weights: `{license}`, as said by those who published them. They were made from {data} and {bases}."
    elif metadata.license == "apache-2.0":
        told = f"The weights: Apache-2.0. They were made from {data} and {bases}."
    else:
        told = (
            f"The weights come under no licence of their own (`{TERMS}`): they were made from {data} and {bases}, and "
            "whoever uses or passes them on is to read these terms first. Where they forbid commercial use, changed "
            "copies or passing on, take it that the same holds for the weights."
        )
    return f"{told}\n\nThe code in this repository: Apache-2.0."


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(
    files: RunFiles, repo_id: str, form: str, base_models: Sequence[str], license: str | None
) -> ModelCardData:
    bases = list(base_models) or [name for name in facts.backbones(files).values() if name]
    dataset = facts.hub_dataset(files)
    results = [result for evaluation in files.evaluations for result in _report_results(files, evaluation)]
    results += _predictor_results(files)
    return ModelCardData(
        language="en",
        **_licence_fields(files, repo_id, bases, license),
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=list(_TAGS),
        datasets=[dataset] if dataset else None,
        base_model=bases or None,
        base_model_relation=FORMS[form] if bases else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _report_results(files: RunFiles, evaluation: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Every score of fluency and every F1 of the model's reports."""
    scores = evaluation["rows"][ROWS["model"]]
    protocol, labeler = protocol_words(evaluation), f"labeler {labeler_words(evaluation)}"
    for column, type_, name, told in _columns():
        if scores.get(column) is None:
            continue
        how = [protocol] if column in NLG_METRICS else [*told, labeler, protocol]
        yield EvalResult(
            task_type=_TASK,
            task_name="Radiology report generation",
            # With what tells two protocols apart, or the Hub would show their figures as one system's.
            dataset_config=f"{protocol}, {labeler}, {decoding_words(evaluation)}, {evaluation['studies']:,} studies",
            metric_type=type_,
            metric_value=scores[column],
            metric_name=f"{name} ({'; '.join(how)})",
            **_dataset_fields(files, evaluation),
        )


def _predictor_results(files: RunFiles) -> Iterator[EvalResult]:
    """The area under the curve of the label predictor, on validation."""
    validation = files.results.get("predictor", {}).get("validation") or {}
    macro = validation.get("macro_auc_interval")
    value, count = (
        (macro["auc"], macro["findings"])
        if macro
        else (
            validation.get("macro_auc"),
            validation.get("auc_findings"),
        )
    )
    if value is None:
        return
    studies = max(row["studies"] for row in validation["findings"].values())
    told = {"dataset": OWN_DATASET, "split": "validation", "studies": studies}
    yield EvalResult(
        task_type="image-classification",
        task_name="Label prediction",
        dataset_config="states as the run was given them",
        metric_type="roc_auc",
        metric_value=value,
        metric_name=f"macro AUC of the label predictor, {count} findings",
        **_dataset_fields(files, told),
    )


def _dataset_fields(files: RunFiles, evaluation: Mapping[str, Any]) -> dict[str, str]:
    own = evaluation["dataset"] == OWN_DATASET
    name = facts.evaluated_dataset(files, evaluation).replace("`", "")
    # Where it has no id on the Hub, a name that is nobody's there.
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "not-on-the-hub"
    return {
        "dataset_type": (facts.hub_dataset(files) if own else None) or slug,
        "dataset_name": f"{name}, split {evaluation['split']}, {evaluation['studies']:,} studies",
        "dataset_split": evaluation["split"],
    }


def _columns() -> Iterator[tuple[str, str, str, list[str]]]:
    """Scores of a row that the metadata have: key, the Hub's name of the metric, ours, and what qualifies it."""
    for name in NLG_METRICS:
        yield name, _METRIC_TYPES.get(name, "bleu"), NLG_NAMES[name], []
    for policy in UNCERTAIN_POLICIES:
        for average in AVERAGES:
            for labels in LABEL_SETS:
                words = [_LABEL_WORDS[labels], policy.replace("_", " as ")]
                yield f"{average}_f1_{labels}_{policy}", "f1", f"{average}-F1", words


__all__ = ["FORMS", "TERMS", "build_card"]
