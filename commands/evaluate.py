"""`otdrg evaluate`: a model's reports of a dataset, scored beside baselines and controls."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files_otdrg import write_text
from ..labelers import LABELERS
from ..labelers.as_typed import labeler_of, parse_options
from ..metrics.protocols import add_protocol_arguments, reference_tokens, truncate_to_tokens
from ..runtime.journal import differing_settings
from ..runtime.output_lock import OutputLock
from ..runtime.printable import show
from ..studies.cleaning import CLEANING_STYLES, clean_report

if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation.evaluate import Evaluation
    from ..evaluation.steering import Steering
    from ..training.recipe import Recipe

DESCRIPTION = """\
Let a model write the report of every study of a split, and score the reports beside baselines (best constant, nearest
neighbour, consensus of 30 neighbours) and controls (shuffled images, true states), with bootstrap intervals; measure
whether the reports say the states they were written from. Reports are kept as they are written: the same command goes
on where it was interrupted, and scores anew without writing anew. Leaves evaluation.md, evaluation.json,
predictions.csv, scores.csv and contradictions.csv.
"""
EPILOG = """\
Examples:
  otdrg evaluate runs/iu_xray_small --split test
  otdrg evaluate runs/iu_xray_small mimic_cxr --split test --cleaning r2gen_mimic --output mimic_zero_shot
  otdrg evaluate org/otdrg recipes/iu_xray_small.yaml --output evaluation
"""

_NLG = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
_SETTINGS, _REPORTS = "settings.json", "reports"


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    parser.add_argument(
        "dataset",
        nargs="?",
        metavar="DATASET",
        help="recipe, of which studies and labels are read, or folder of otdrg prepare (default: the run's own recipe)",
    )
    studies = parser.add_argument_group("studies")
    studies.add_argument("--split", choices=("validation", "test"), default="validation", help="default: validation")
    studies.add_argument("--limit", type=int, metavar="N", help="most studies, from the split's start")
    studies.add_argument("--cleaning", choices=CLEANING_STYLES, help="of all reports (default: the recipe's)")
    studies.add_argument(
        "--train-from",
        metavar="DATASET",
        help="what the baselines are from (default: the studies the model was trained on, or else the dataset's)",
    )
    reports = parser.add_argument_group("reports")
    reports.add_argument("--num-beams", type=int, metavar="N", help="beams; 1 is greedy search (default: the model's)")
    reports.add_argument("--max-new-tokens", type=int, metavar="N", help="of a report (default: the model's)")
    reports.add_argument("--batch-size", type=int, default=8, metavar="N", help="studies read at once (default: 8)")
    reports.add_argument(
        "--indication",
        action=argparse.BooleanOptionalAction,
        help="put the studies' indication into the prompt (default: as the run's recipe does)",
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument("--metrics", nargs="+", choices=_NLG, default=_NLG, help="of fluency (default: all)")
    scores.add_argument("--labeler", choices=LABELERS, default="rules", help="reads states (default: rules)")
    scores.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the labeler; repeatable"
    )
    add_protocol_arguments(scores)
    scores.add_argument(
        "--floor", type=int, default=10, metavar="N", help="times told for a finding's state to count (default: 10)"
    )
    scores.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples, 0 for no intervals (default: 1000)"
    )
    scores.add_argument("--seed", type=int, default=0, help="of shuffling, flips and resamples (default: 0)")
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, metavar="DIR", help="default: evaluation-SPLIT in the model's folder")
    files.add_argument("--overwrite", action="store_true", help="write all reports anew")
    files.add_argument(
        "--feature-cache", metavar="DIR", help="features of views (default: the run's, or features in the output)"
    )


def run(options: argparse.Namespace) -> None:
    """Read, generate what is not there yet, score, write and print."""
    output = _checked_output(options)
    with OutputLock(output):
        try:
            _evaluate(options, output)
        except KeyboardInterrupt as stop:
            reports = output / _REPORTS
            message = (
                f"reports are kept in {reports}; the same command goes on"
                if reports.is_dir()
                else "nothing was written"
            )
            raise type(stop)(message) from stop


def _evaluate(options: argparse.Namespace, output: Path) -> None:
    labeler_options = parse_options(options.option)
    labeler_of(options.labeler, labeler_options)

    # Behind the checks, because what these import takes seconds.
    from ..evaluation.evaluate import CONTROLS, evaluate_model
    from ..evaluation.steering import measure_steering
    from ..inference.features import cache_features
    from ..inference.loading import load_published
    from ..training.data import describe_studies
    from ..training.evaluation_studies import evaluation_studies, run_folder
    from ..training.recipe import load_recipe

    folder = run_folder(options.model)
    own = None if folder is None else load_recipe(folder / "recipe.yaml")
    studies = evaluation_studies(
        options.dataset,
        options.split,
        own,
        options.train_from,
        options.cleaning,
        options.labeler,
        labeler_options,
    )
    rows = studies.rows.select(range(min(options.limit or len(studies.rows), len(studies.rows))))
    texts, tokens = list(rows["report"]), reference_tokens(options, studies.cleaning)
    if tokens is not None:
        texts = truncate_to_tokens(texts, options.tokenizer, tokens)
    references = dict(zip(rows["id"], texts, strict=True))
    data = describe_studies({options.split: rows, "train": studies.training})
    model, processor = load_published(options.model)
    options.batch_size = min(options.batch_size, len(rows))
    settings = _settings(options, own, model, processor, rows)
    _enter(output, settings, options.overwrite)
    cache = options.feature_cache or (own and own.feature_cache) or (folder or output) / "features"
    left_out: dict[str, str] = {}
    rows, training = (
        cache_features(model, processor, some, cache, options.batch_size, left_out) for some in (rows, studies.training)
    )
    if not len(rows):
        raise ValueError(f"no study is left: {next(iter(left_out.values()))}")
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    references = [references[study] for study in rows["id"]]
    foreign = studies.cleaning != "none" and (own is None or own.studies.cleaning != studies.cleaning)
    evaluation = evaluate_model(
        model,
        processor,
        rows,
        training,
        batch_size=options.batch_size,
        generation={name: settings[name] for name in ("num_beams", "max_new_tokens")},
        controls=(*CONTROLS, "flipped"),
        labeler=options.labeler,
        metrics=options.metrics,
        seed=options.seed,
        indication=settings["indication"],
        labeler_options=labeler_options,
        references=references,
        clean=(lambda report: " ".join(clean_report(report, studies.cleaning).split())) if foreign else None,
        journals=output / _REPORTS,
    )
    steering = measure_steering(evaluation, training["finding_states"], options.floor)
    told = {
        "model": options.model,
        "dataset": studies.dataset,
        "split": options.split,
        "zero_shot": studies.zero_shot,
        "training_from": studies.training_from,
        "counts": studies.counts,
        "data": data,
        "warnings": [*studies.warnings, *(f"left out: {reason}" for reason in left_out.values())],
        "cleaning": studies.cleaning,
        "generated_reports_cleaned": foreign,
        "protocol": options.protocol,
        "tokenizer": options.tokenizer,
        "reference_tokens": tokens,
        "labeler_options": labeler_options,
        "generation": settings,
        "bootstrap": {"resamples": options.bootstrap, "confidence": 0.95, "seed": options.seed},
    }
    show(_write(output, told, evaluation, steering))
    show(f"\n{output}")


def _checked_output(options: argparse.Namespace) -> Path:
    """The folder that is written to, once what was typed makes sense."""
    least = {"limit": 1, "num_beams": 1, "max_new_tokens": 1, "batch_size": 1, "floor": 1, "bootstrap": 0, "seed": 0}
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and value < number:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: expected {number} or more")
    if options.output is None and not Path(options.model).is_dir():
        raise ValueError(f"{options.model} is not a folder here: expected --output, where the evaluation is to go")
    output = options.output or Path(options.model) / f"evaluation-{options.split}"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: this is a file, expected a folder")
    return output


def _settings(options: argparse.Namespace, own: Recipe | None, model, processor, rows: Dataset) -> dict[str, Any]:
    """What generated reports depend on."""
    from ..inference.features import model_digest
    from ..inference.loading import decoding
    from ..studies.fingerprint import fingerprint

    indication = own is not None and own.report.indication
    return {
        "model": model_digest(model, processor),
        "studies": fingerprint({options.split: rows}),
        **decoding(model, options.num_beams, options.max_new_tokens, options.batch_size),
        "indication": indication if options.indication is None else options.indication,
        "seed": options.seed,
    }


def _enter(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder, or see to it that the reports in it are of the same settings."""
    from ..files_otdrg import write_json

    path = output / _SETTINGS
    if overwrite:
        shutil.rmtree(output / _REPORTS, ignore_errors=True)
    elif path.is_file():
        told = differing_settings(path, settings, ("model", "studies"))
        if told is not None:
            raise ValueError(
                f"{output} holds reports of other settings ({told}): expected the same, another --output, or "
                "--overwrite, which writes all of them anew"
            )
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _write(output: Path, told: dict[str, Any], evaluation: Evaluation, steering: Steering) -> str:
    """Leave all files in the folder; what evaluation.md says is returned."""
    from ..evaluation.report import (
        bootstrap_rows,
        format_scores,
        format_steering,
        write_contradictions,
        write_predictions,
        write_scores,
    )
    from ..files_otdrg import write_json

    resampling = told["bootstrap"]
    intervals, differences = {}, {}
    if resampling["resamples"]:
        intervals, differences = bootstrap_rows(evaluation, resampling["resamples"], resampling["seed"])
    found = evaluation.scores()
    result = {
        **told,
        **found,
        "intervals": {
            row: {name: {"low": it.low, "high": it.high} for name, it in scores.items()}
            for row, scores in intervals.items()
        },
        "differences": {
            row: {name: it._asdict() for name, it in scores.items()} for row, scores in differences.items()
        },
        "faithfulness": {"labeler": evaluation.labeler, **steering.scores()},
    }
    missing = [f"{name}: {note}" for name, note in evaluation.rows["model"].found.notes.items()]
    if intervals and "cider" in found["rows"]["model"]:
        missing.append("CIDEr's intervals are of the mean of the studies' values, with document frequencies of all")
    blocks = [
        f"# Evaluation of {told['model']}",
        _preamble(told, len(evaluation.ids)),
        format_scores(evaluation, intervals, differences),
        "## Do reports say what they were told?",
        format_steering(result["faithfulness"]),
        "\n".join(f"- {note}" for note in (*told["warnings"], *missing, *evaluation.notes)),
    ]
    document = "\n\n".join(block for block in blocks if block)
    write_json(output / "evaluation.json", result)
    write_text(output / "evaluation.md", document + "\n")
    write_predictions(evaluation, output / "predictions.csv")
    write_scores(evaluation, output / "scores.csv")
    write_contradictions(steering, evaluation, output / "contradictions.csv")
    return document


def _preamble(told: dict[str, Any], studies: int) -> str:
    """What was compared with what, and how."""
    protocol = told["protocol"]
    if told["reference_tokens"]:
        protocol += f", true reports up to {told['reference_tokens']} tokens of {told['tokenizer']}"
    kind = {True: "zero-shot: the model was trained on another dataset", False: "the dataset the model was trained on"}
    counts = []
    for split, count in told["counts"].items():
        unit = count["unit"] or "studies"
        published = "" if count["published"] is None else f" (published: {count['published']:,})"
        counts.append(f"{split} {count[unit]:,} {unit}{published}")
    decoding = told["generation"]
    beams = "greedy search" if decoding["num_beams"] == 1 else f"{decoding['num_beams']} beams"
    lines = [
        f"{studies:,} studies of split {told['split']} of {told['dataset']}",
        kind.get(told["zero_shot"], "whether the model was trained on this dataset is not known"),
        f"in all: {'; '.join(counts)}",
        f"constants and neighbours from {told['training_from']}",
        f"cleaning {told['cleaning']}" + (", of generated reports too" if told["generated_reports_cleaned"] else ""),
        f"protocol {protocol}",
        f"{beams}, up to {decoding['max_new_tokens']} tokens" + (", with indication" if decoding["indication"] else ""),
    ]
    return "\n".join(f"- {line}" for line in lines)


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
