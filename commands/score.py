"""`otdrg score`: score the reports of any system, and test two systems against each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..labelers.as_typed import labeler_of, parse_options
from ..labelers.shared import placed_options
from ..metrics.registry import METRICS, default_metrics, wanted_scores
from ..runtime.output_lock import OutputLock
from ..runtime.printable import listed, show
from ..studies.cleaning import CLEANING_STYLES
from .arguments import (
    add_device,
    add_metrics,
    add_resamples,
    check_device,
    check_least,
    placement,
    reference_tokens,
)

DESCRIPTION = """\
Score generated reports: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr, clinical efficacy by a labeler's states and the share of
reports with invented comparisons, with bootstrap intervals; where --metrics names them, BERTScore, RadGraph-F1,
RadCliQ, RaTEScore, SRR-BERT, F1-temporal, GREEN and CRIMSON by RadEval. With --against, compare two systems by paired
bootstrap and permutation tests. Files are CSV or .jsonl with id and report, joined by id, or ReXrank's. Writes OUT.json
and OUT.csv, with one row per study, and prints tables.
"""
EPILOG = """\
Examples:
  otdrg score --predictions ours.jsonl --references test.jsonl --cleaning r2gen_iu --output ours.json
  otdrg score --predictions ours.jsonl --references test.jsonl --against theirs.csv --output ours.json
  otdrg score --predictions ours.jsonl --references test.jsonl --metrics rouge_l radgraph --output ours.json
  otdrg score --predictions runs/quickstart/predictions.csv --output scores.json
  otdrg score --format rexrank --predictions out.json --output scores.json
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    files = parser.add_argument_group("files")
    files.add_argument("--predictions", required=True, metavar="FILE", help="generated reports: id and report")
    files.add_argument(
        "--format",
        choices=("table", "rexrank"),
        default="table",
        help="form of the files: CSV or .jsonl, or ReXrank's JSON, in which model_prediction is the generated report "
        "and report the true one (default: table)",
    )
    files.add_argument(
        "--prediction-column",
        metavar="NAME",
        help="column of the predictions' generated reports (default: report, or model_prediction in ReXrank's files)",
    )
    files.add_argument("--references", metavar="FILE", help="true reports (default: in the predictions' file)")
    files.add_argument(
        "--reference-column",
        metavar="NAME",
        help="column of the true reports (default: report, or reference in the predictions' file)",
    )
    files.add_argument("--against", metavar="FILE", help="another system's reports: id and report")
    files.add_argument("--output", required=True, metavar="OUT.json", help="scores; studies go to OUT.csv")
    files.add_argument("--overwrite", action="store_true", help="replace the files at --output")
    files.add_argument(
        "--allow-missing", action="store_true", help="score the ids that all files have, and list the others"
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--cleaning", choices=CLEANING_STYLES, default="none", help="cleaning of all reports (default: none)"
    )
    add_metrics(scores, "all but RadEval's", labeler=None)
    add_resamples(scores, "--bootstrap")
    scores.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: 0)")
    add_device(parser, "the labeler")


def run(options: argparse.Namespace) -> None:
    """Read, join, score, write and print."""
    metrics = wanted_scores(default_metrics() if options.metrics is None else options.metrics)
    reads_states = any(METRICS[name].reads == "states" for name in metrics)
    if not reads_states and (options.labeler or options.option or any(placement(options).values())):
        raise ValueError("--labeler, --option and --device need clinical_efficacy, which --metrics does not name")
    check_device(options)
    labeler_options = placed_options(options.labeler or "rules", parse_options(options.option), placement(options))
    if options.against and options.bootstrap < 1:
        raise ValueError(f"--bootstrap is {options.bootstrap}: expected at least 1 with --against")
    check_least(options, bootstrap=0, seed=0)
    tokens = reference_tokens(options, options.cleaning)
    output = Path(options.output)
    if output.suffix.lower() != ".json":
        raise ValueError(f"--output {output}: expected a name that ends in .json")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}, expected one that exists")
    with OutputLock(options.output):
        _check_files(options, output)
        labeler = labeler_of(options.labeler or "rules", labeler_options) if reads_states else None

        # Imported after the checks, because it takes seconds.
        from ..evaluation.score_files import format_scored, join_reports, score_files, write_scored

        joined = join_reports(
            options.predictions,
            options.references,
            options.reference_column,
            options.against,
            options.allow_missing,
            options.prediction_column,
            options.format,
        )
        scored = score_files(
            joined,
            options.metrics,
            labeler,
            labeler_options,
            options.cleaning,
            options.tokenizer,
            tokens,
            options.bootstrap,
            options.seed,
        )
        write_scored(scored, output)
    show(f"{format_scored(scored)}\n\n{output} and {output.with_suffix('.csv')}")
    for name, studies in joined.missing.items():
        if studies:
            show(f"left out, not in {joined.files[name]}: {len(studies):,} ids: {listed(studies)}", file=sys.stderr)
    for name, studies in scored.without_states.items():
        if studies:
            show(f"no state is read in {len(studies):,} of the {name}: {listed(studies)}", file=sys.stderr)


def _check_files(options: argparse.Namespace, output: Path) -> None:
    """Refuse to write over an input, or, without --overwrite, over an earlier output."""
    for path in (output, output.with_suffix(".csv")):
        for name in ("predictions", "references", "against"):
            given = getattr(options, name)
            if given and path.exists() and Path(given).exists() and path.samefile(given):
                raise ValueError(f"{path} would be written over, and is --{name}: expected another --output")
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists: --overwrite replaces it")
