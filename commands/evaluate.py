"""`otdrg evaluate`: score a model's reports of a dataset, compared with baselines and controls."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..labelers import labeler_class
from ..labelers.as_typed import labeler_of, parse_options
from ..labelers.shared import runs_model
from ..runtime.printable import show
from ..runtime.shared_work import shared_lock
from ..studies.cleaning import CLEANING_STYLES
from .arguments import (
    SPLITS,
    add_consensus,
    add_device,
    add_engine,
    add_guidance,
    add_metrics,
    add_resamples,
    check_consensus,
    check_device,
    check_engine,
    check_folder,
    check_guidance,
    check_least,
    placement,
    reference_tokens,
)

DESCRIPTION = """\
Let a model write the report of every study of a split, and compare their scores with baselines (best constant, nearest
neighbour, retrieval by expected utility) and controls (shuffled images, true states), with bootstrap intervals; measure
whether the reports state the findings they were conditioned on. Reports are saved as they are generated: the same
command continues an interrupted evaluation, and computes scores anew from reports that are complete. Writes
evaluation.md, evaluation.json, predictions.csv, scores.csv and contradictions.csv.
"""
EPILOG = """\
Examples:
  otdrg evaluate runs/iu_xray_small --split test
  otdrg evaluate runs/iu_xray_small mimic_cxr --split test --cleaning r2gen_mimic --output mimic_zero_shot
  otdrg evaluate runs/iu_xray_small --candidates 32 --bank bank --output consensus
  otdrg evaluate org/otdrg recipes/iu_xray_small.yaml --output evaluation
  accelerate launch -m otdrg evaluate runs/iu_xray_small --split test
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    parser.add_argument(
        "dataset",
        nargs="?",
        metavar="DATASET",
        help="recipe, whose studies and labels are read, or folder of otdrg prepare (default: the run's own recipe)",
    )
    studies = parser.add_argument_group("studies")
    studies.add_argument("--split", choices=SPLITS[1:], default="validation", help="default: validation")
    studies.add_argument(
        "--limit", type=int, metavar="N", help="maximum number of studies, from the start of the split"
    )
    studies.add_argument("--cleaning", choices=CLEANING_STYLES, help="cleaning of all reports (default: the recipe's)")
    studies.add_argument(
        "--train-from",
        metavar="DATASET",
        help="training studies of the baselines (default: those of the model, or else the dataset's)",
    )
    reports = parser.add_argument_group("reports")
    reports.add_argument("--num-beams", type=int, metavar="N", help="beams; 1 is greedy search (default: the model's)")
    reports.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of a report (default: the model's)")
    add_guidance(reports)
    add_consensus(reports)
    add_engine(reports)
    reports.add_argument("--batch-size", type=int, default=8, metavar="N", help="studies in a batch (default: 8)")
    reports.add_argument(
        "--indication",
        action=argparse.BooleanOptionalAction,
        help="read the studies' indication (default: as the run's recipe does, or if the label predictor reads it)",
    )
    scores = parser.add_argument_group("scores")
    add_metrics(scores, "all but RadEval's; clinical_efficacy is always computed", labeler="rules")
    scores.add_argument(
        "--floor",
        type=int,
        default=10,
        metavar="N",
        help="faithfulness: fewest studies given a finding in a state for this pair to count (default: 10)",
    )
    add_resamples(scores, "--bootstrap")
    scores.add_argument("--seed", type=int, default=0, help="seed of shuffling, flips and resamples (default: 0)")
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, metavar="DIR", help="default: evaluation-SPLIT in the model's folder")
    files.add_argument("--overwrite", action="store_true", help="generate all reports again")
    files.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="folder of cached image features (default: the run's, or features in the output)",
    )
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Check the options, then generate, score, write and print."""
    check_least(options, limit=1, num_beams=1, max_new_tokens=1, batch_size=1, floor=1, bootstrap=0, seed=0)
    check_guidance(options)
    check_consensus(options)
    check_device(options)
    check_engine(options)
    if options.output is None and not Path(options.model).is_dir():
        raise ValueError(f"{options.model} is not a folder here: expected --output, the folder of the evaluation")
    output = options.output or Path(options.model) / f"evaluation-{options.split}"
    check_folder("--output", output)
    with shared_lock(output):
        try:
            show(f"{_evaluate(options, output)}\n\n{output}")
        except KeyboardInterrupt as stop:
            reports = output / "reports"
            kept = f"reports are kept in {reports}; the same command continues" if reports.is_dir() else None
            raise type(stop)(kept or "nothing was written") from stop


def _evaluate(options: argparse.Namespace, output: Path) -> str:
    """Read the studies, generate and score; returns the content of evaluation.md."""
    labeler_options = parse_options(options.option)
    if options.device is not None and runs_model(options.labeler):
        labeler_options.setdefault("device", options.device)
    if runs_model(options.labeler):
        # Its model is loaded after the reports are written, and by one process.
        labeler_class(options.labeler, **labeler_options)
    else:
        labeler_of(options.labeler, labeler_options)

    # Imported after the checks, because it takes seconds.
    from ..evaluation.published import EvaluationOptions, evaluate_published
    from ..training.data import describe_studies, evaluation_studies
    from ..training.recipe import find_run, published_recipe

    folder, own = find_run(options.model), published_recipe(options.model)
    studies = evaluation_studies(
        options.dataset, options.split, own, options.train_from, options.cleaning, options.labeler, labeler_options
    )
    rows = studies.rows.select(range(min(options.limit or len(studies.rows), len(studies.rows))))
    indication = options.indication
    if indication is None and own is not None:
        indication = own.gives_indication
    facts = {
        "dataset": studies.dataset,
        "split": options.split,
        "zero_shot": studies.zero_shot,
        "training_from": studies.training_from,
        "counts": studies.counts,
        "data": describe_studies({options.split: rows, "train": studies.training}),
        "warnings": studies.warnings,
        "cleaning": studies.cleaning,
    }
    return evaluate_published(
        options.model,
        rows,
        studies.training,
        output,
        facts,
        options.feature_cache or (own and own.feature_cache) or (folder or output) / "features",
        EvaluationOptions(
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            guidance_scale=options.guidance_scale,
            candidates=options.candidates,
            bank=options.bank,
            retrieved=options.retrieved,
            agreement_weight=options.agreement_weight,
            batch_size=options.batch_size,
            indication=indication,
            metrics=options.metrics,
            labeler=options.labeler,
            labeler_options=labeler_options,
            floor=options.floor,
            bootstrap=options.bootstrap,
            seed=options.seed,
            engine=options.engine,
            engine_url=options.engine_url,
            **placement(options),
        ),
        clean_generated=studies.cleaning != "none" and (own is None or own.studies.cleaning != studies.cleaning),
        tokenizer=options.tokenizer,
        reference_tokens=reference_tokens(options, studies.cleaning),
        overwrite=options.overwrite,
    )
