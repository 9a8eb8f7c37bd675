"""`otdrg score`: any system's reports against the true ones, and against another system's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files_otdrg import write_json
from ..findings_otdrg import FINDING_STATES, FINDINGS, UNMENTIONED
from ..labelers import LABELERS
from ..labelers.as_typed import label_quietly, labeler_of, listed, parse_options
from ..metrics.protocols import add_protocol_arguments, reference_tokens, truncate_to_tokens
from ..metrics.rad_eval import RADEVAL_METRICS
from ..metrics.report_files import join_reports
from ..runtime.csv_files import write_csv
from ..runtime.output_lock import OutputLock
from ..runtime.printable import show
from ..studies.cleaning import CLEANING_STYLES, clean_report

if TYPE_CHECKING:
    import numpy as np

    from ..metrics.scoring import ReportScores
    from ..metrics.significance import Comparison, Interval

DESCRIPTION = """\
Score generated reports: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr, and clinical efficacy by a labeler's states, with
bootstrap intervals; where --metrics names them, RadGraph-F1, RadCliQ, RaTEScore and SRR-BERT by RadEval. With
--against, compare two systems by paired bootstrap and permutation tests. Files are CSV or .jsonl with id and report,
joined by id. Writes OUT.json, a row a study in OUT.csv beside it, and prints tables.
"""
EPILOG = """\
Examples:
  otdrg score --predictions ours.jsonl --references test.jsonl --cleaning r2gen_iu --output ours.json
  otdrg score --predictions ours.jsonl --references test.jsonl --against theirs.csv --output ours.json
  otdrg score --predictions ours.jsonl --references test.jsonl --metrics rouge_l radgraph --output ours.json
  otdrg score --predictions runs/quickstart/predictions.csv --output scores.json
"""

_NLG = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
_METRICS = ("bleu", *_NLG, "clinical_efficacy", *RADEVAL_METRICS)
_CONFIDENCE = 0.95


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    files = parser.add_argument_group("files")
    files.add_argument("--predictions", required=True, metavar="FILE", help="generated reports: id and report")
    files.add_argument("--references", metavar="FILE", help="true reports (default: in the predictions' file)")
    files.add_argument(
        "--reference-column",
        metavar="NAME",
        help="where the true reports are (default: report, or reference in the predictions' file)",
    )
    files.add_argument("--against", metavar="FILE", help="another system's reports: id and report")
    files.add_argument("--output", required=True, metavar="OUT.json", help="scores; studies go to OUT.csv")
    files.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    files.add_argument(
        "--allow-missing", action="store_true", help="score the ids that all files have, and list the others"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--cleaning", choices=CLEANING_STYLES, default="none", help="of all reports (default: none)")
    add_protocol_arguments(text)
    scores = parser.add_argument_group("scores")
    scores.add_argument("--metrics", nargs="+", choices=_METRICS, help="which (default: all but RadEval's)")
    scores.add_argument("--labeler", choices=LABELERS, help="reads the states of all reports (default: rules)")
    scores.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the labeler; repeatable"
    )
    scores.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples, 0 for no intervals (default: 1000)"
    )
    scores.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Read, join, score, write and print."""
    metrics, radeval_metrics, clinical = _chosen_metrics(options)
    tokens = reference_tokens(options, options.cleaning)
    _check_output(options)
    with OutputLock(options.output):
        _score(options, metrics, radeval_metrics, clinical, tokens)


def _score(
    options: argparse.Namespace, metrics: list[str], radeval_metrics: list[str], clinical: bool, tokens: int | None
) -> None:
    output, table = _outputs(options)
    labeler_options = parse_options(options.option)
    labeler = labeler_of(options.labeler or "rules", labeler_options) if clinical else None
    joined = join_reports(
        options.predictions, options.references, options.reference_column, options.against, options.allow_missing
    )
    texts = {
        name: [clean_report(report, options.cleaning) for report in reports] for name, reports in joined.reports.items()
    }
    # Before cleaning, which joins words: "scarring/atelectasis" becomes one.
    uncleaned = joined.uncleaned
    states = {} if labeler is None else {name: label_quietly(labeler, uncleaned[name]) for name in texts}
    if tokens is not None:
        texts["references"] = truncate_to_tokens(texts["references"], options.tokenizer, tokens)

    # Behind the checks, because what these import takes seconds.
    from ..metrics.scoring import score_reports
    from ..metrics.significance import bootstrap_intervals, compare_systems

    systems = {
        name: score_reports(
            texts[name], texts["references"], states.get(name), states.get("references"), [*metrics, *radeval_metrics]
        )
        for name in texts
        if name != "references"
    }
    system, resampling = systems["predictions"], (options.bootstrap, _CONFIDENCE, options.seed)
    asked = system.scores
    intervals, comparison = {}, {}
    if options.bootstrap:
        intervals = _chosen(bootstrap_intervals(system.statistics, *resampling), asked)
    if options.against:
        comparison = _chosen(compare_systems(system.statistics, systems["against"].statistics, *resampling), asked)
    blank = {
        name: [study for study, row in zip(joined.ids, rows, strict=True) if (row == UNMENTIONED).all()]
        for name, rows in states.items()
    }
    result = {
        "nlg": system.section("nlg"),
        "clinical_efficacy": system.section("clinical_efficacy"),
        "radeval": system.section("radeval"),
        "intervals": {name: {"low": interval.low, "high": interval.high} for name, interval in intervals.items()},
        "per_finding": system.details.get("per_finding", {}),
        **({"comparison": {name: it._asdict() for name, it in comparison.items()}} if options.against else {}),
        "labeler": labeler.name if labeler else None,
        "labeler_options": labeler_options,
        "cleaning": options.cleaning,
        "protocol": options.protocol,
        "tokenizer": options.tokenizer,
        "reference_tokens": tokens,
        "bootstrap": dict(zip(("resamples", "confidence", "seed"), resampling, strict=True)),
        "files": joined.files,
        "counts": {"studies": len(joined.ids), **joined.counts},
        "missing_from": joined.missing,
        "without_states": blank,
        "notes": _notes(options, system, intervals, states.get("references")),
    }
    _write_studies(table, joined.ids, texts, uncleaned, systems, states)
    write_json(output, result)
    _print_tables(result, system, intervals, comparison)
    show(f"\n{output} and {table}")
    for name, studies in joined.missing.items():
        if studies:
            show(f"left out, not in {joined.files[name]}: {len(studies):,} ids: {listed(studies)}", file=sys.stderr)
    for name, studies in blank.items():
        if studies:
            show(f"no state is read in {len(studies):,} of the {name}: {listed(studies)}", file=sys.stderr)


def _chosen(results: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result for name, result in results.items() if name in names}


# --- what was asked for ----------------------------------------------------------------------------------------------


def _chosen_metrics(options: argparse.Namespace) -> tuple[list[str], list[str], bool]:
    """Those of `nlg_scores`, those of RadEval, and whether clinical efficacy is among them."""
    asked = options.metrics or [*_NLG, "clinical_efficacy"]
    clinical = "clinical_efficacy" in asked
    if not clinical and (options.labeler or options.option):
        raise ValueError("--labeler and --option go with clinical_efficacy, which --metrics leaves out")
    if options.bootstrap < (1 if options.against else 0):
        least = "at least 1 with --against" if options.against else "0 or more"
        raise ValueError(f"--bootstrap is {options.bootstrap}: expected {least}")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}: expected 0 or more")
    fluency = [name for name in asked if name != "clinical_efficacy" and name not in RADEVAL_METRICS]
    return fluency, [name for name in asked if name in RADEVAL_METRICS], clinical


def _check_output(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.suffix.lower() != ".json":
        raise ValueError(f"--output {output}: expected a name that ends in .json")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}, expected one that exists")


def _outputs(options: argparse.Namespace) -> tuple[Path, Path]:
    """The files that are written, neither of which is an input or is to be kept."""
    output = Path(options.output)
    table = output.with_suffix(".csv")
    for path in (output, table):
        for name in ("predictions", "references", "against"):
            given = getattr(options, name)
            if given and path.exists() and Path(given).exists() and path.samefile(given):
                raise ValueError(f"{path} would be written over, and is --{name}: expected another --output")
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists: --overwrite replaces it")
    return output, table


# --- what is written and told ----------------------------------------------------------------------------------------


#: What a column is of, in the form of a training run's predictions.csv, so that this table can be scored, too.
_COLUMNS = {"references": "reference", "predictions": "report", "against": "report, against"}


def _write_studies(
    path: Path,
    ids: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    uncleaned: Mapping[str, Sequence[str]],
    systems: Mapping[str, ReportScores],
    states: Mapping[str, Any],
) -> None:
    """A row a study: what was compared, as it was compared, its scores, and the states of each report.

    Where they differ from what was compared, the texts that states were read from are in columns of their own.
    """
    read = {f"uncleaned {_COLUMNS[name]}": uncleaned[name] for name in texts if uncleaned[name] != texts[name]}
    scores = {
        score if name == "predictions" else f"{score}, {name}": values
        for name, system in systems.items()
        for score, values in system.per_study.items()
    }
    found = [f"{finding}, {_COLUMNS[name]}" for name in states for finding in FINDINGS]

    def rows() -> Iterator[list]:
        for position, study in enumerate(ids):
            yield [
                study,
                *(reports[position] for reports in (*texts.values(), *read.values())),
                *(f"{values[position]:.6f}" for values in scores.values()),
                *(FINDING_STATES[state] for rows in states.values() for state in rows[position]),
            ]

    write_csv(path, ["id", *(_COLUMNS[name] for name in texts), *read, *scores, *found], rows())


def _print_tables(
    result: Mapping[str, Any],
    system: ReportScores,
    intervals: Mapping[str, Interval],
    comparison: Mapping[str, Comparison],
) -> None:
    from ..metrics.tables import clinical_table, comparison_table, finding_table, nlg_table, radeval_table

    told = [f"{result['counts']['studies']:,} studies", f"cleaning {result['cleaning']}"]
    told.append(f"protocol {result['protocol']}")
    if result["reference_tokens"]:
        told.append(f"true reports up to {result['reference_tokens']} tokens of {result['tokenizer']}")
    if result["labeler"]:
        told.append(f"states by {result['labeler']}")
    show("; ".join(told))
    if result["nlg"]:
        show(f"\n{nlg_table(result['nlg'], intervals)}")
    if result["radeval"]:
        show(f"\n{radeval_table(result['radeval'], intervals)}")
    if result["clinical_efficacy"]:
        show(f"\n{clinical_table(result['clinical_efficacy'], intervals)}")
        show(f"\n{finding_table(result['per_finding']['uncertain_negative'])}")
    if comparison:
        show(f"\nagainst {result['files']['against']}\n\n{comparison_table(comparison)}")
    for name, note in result["notes"].items():
        show(f"\n{name}: {note}")


def _notes(
    options: argparse.Namespace, system: ReportScores, intervals: Mapping[str, Any], true_states: np.ndarray | None
) -> dict[str, str]:
    from ..metrics.efficacy import example_ceiling

    notes = dict(system.notes)
    if "cider" in intervals:
        notes["cider"] = (
            "its interval and tests are of the mean of the studies' values, with document frequencies of all references"
        )
    if "radcliq_v1" in system.per_study:
        notes["radcliq"] = (
            "1 / the mean of the studies' values, as RadEval has it: of the studies' values lower ones are better; it "
            "has no interval, because the mean may be 0 or less"
        )
    if true_states is not None and options.protocol != "full":
        notes["clinical_efficacy"] = "states are those of the whole true reports, which only fluency has truncated"
    ceiling = None if true_states is None else example_ceiling(true_states)
    if ceiling is not None:
        notes["example averages"] = ceiling
    return notes


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
