"""`otdrg label`: label the 14 findings of a dataset or a table of reports, or compare two tables of states."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..findings_otdrg import UNMENTIONED
from ..labelers import LABELERS
from ..labelers.as_typed import label_quietly, labeler_of, parse_options
from ..labelers.csv_states import read_states, write_states
from ..labelers.report_table import read_reports
from ..labelers.shared import label_together, placed_options, runs_model
from ..runtime.printable import listed, show
from ..runtime.shared_work import (
    by_main_process,
    continue_alone,
    discard_journals,
    is_begun,
    shared_lock,
    temporary_journal,
)
from .arguments import PLACEMENT, add_device, check_device, check_folder, placement

DESCRIPTION = """\
Read the states of the 14 findings from reports, in one of three forms:
  DATASET    fills finding_states of a dataset written by otdrg prepare, from its column "report" (the text a model
             learns) or from a CSV (--labeler csv); studies with states keep them unless --relabel is set
  --reports  reads a table of reports and writes a table of states in chexpert-labeler's format: 1, 0, -1 or blank
  --compare  measures the agreement of two tables of states, finding by finding
"""
EPILOG = """\
Examples:
  otdrg label studies --labeler rules
  otdrg label studies --labeler csv --csv chexpert.csv
  otdrg label --reports reports.csv --labeler rules --output states.csv
  otdrg label --compare chexpert.csv states.csv --output agreement
  accelerate launch -m otdrg label studies --labeler llm --option model=HuggingFaceTB/SmolLM2-1.7B-Instruct
"""

#: Reports labelled at once.
_BATCH = 1000


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    what = parser.add_argument_group("input, one of")
    what.add_argument("dataset", nargs="?", metavar="DATASET", help="folder written by otdrg prepare")
    what.add_argument("--reports", metavar="FILE", help="CSV with the columns id and report, or .jsonl with these keys")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="CSVs of states: a reference and another")
    labeler = parser.add_argument_group("labeler")
    labeler.add_argument("--labeler", choices=[*LABELERS, "csv"], help="labeler that reads the states (default: rules)")
    labeler.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the labeler; repeatable"
    )
    labeler.add_argument("--csv", metavar="FILE", help="states in chexpert-labeler's format, for --labeler csv")
    labeler.add_argument(
        "--id-column", metavar="NAME", help="column of --csv with the ids of the studies (default: id)"
    )
    labeler.add_argument("--relabel", action="store_true", help="also label studies of DATASET that have states")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        metavar="PATH",
        help="dataset (default: DATASET), CSV of states, or folder of the comparison",
    )
    output.add_argument(
        "--resume", action="store_true", help="continue an interrupted labelling of DATASET, or by a model of --reports"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace --output or, without --resume, an interrupted labelling"
    )
    tasks = output.add_mutually_exclusive_group()
    tasks.add_argument(
        "--shard",
        metavar="I/N",
        help="label only share I of N of the files of DATASET, from 1/N to N/N, as one task of a cluster; the same "
        "command continues an interrupted share",
    )
    tasks.add_argument("--merge", action="store_true", help="make the dataset of all shares labelled by --shard")
    add_device(parser, "the labeler")


def run(options: argparse.Namespace) -> None:
    """Label or compare, depending on the input."""
    given = [name for name in ("dataset", "reports", "compare") if getattr(options, name)]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'nothing'} given: expected one of DATASET, --reports and --compare")
    _check_form(options, given[0])
    {"dataset": _label_dataset, "reports": _label_reports, "compare": _compare}[given[0]](options)


def _check_form(options: argparse.Namespace, form: str) -> None:
    refused = {"dataset": (), "reports": ("csv", "id_column", "relabel", "shard", "merge")}
    for name in refused.get(form, ("labeler", "option", "resume", *PLACEMENT, *refused["reports"])):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} cannot be used with --{form}: remove it")
    if options.overwrite and (options.shard is not None or options.merge):
        work = f"{options.output or options.dataset}.partial"
        raise ValueError(f"--overwrite cannot be used with --shard or --merge: to start again, delete {work}")
    if form != "compare" and options.labeler is None:
        options.labeler = "rules" if options.csv is None else "csv"
    if form != "dataset" and options.labeler == "csv":
        raise ValueError("--labeler csv joins states to studies by id: expected a DATASET")
    if (options.labeler == "csv") != (options.csv is not None):
        raise ValueError("--labeler csv and --csv FILE: expected both or neither")
    if options.id_column and options.csv is None:
        raise ValueError("--id-column is a column of --csv: expected both or neither")
    if options.option and options.labeler == "csv":
        raise ValueError("--option cannot be used with --labeler csv: remove it")
    if form != "compare":
        check_device(options)
        options.option = placed_options(options.labeler, parse_options(options.option), placement(options))
        if options.resume and form == "reports" and not runs_model(options.labeler):
            raise ValueError(f"--resume cannot be used with --reports and --labeler {options.labeler}: remove it")


# --- a table of reports ----------------------------------------------------------------------------------------------


def _label_reports(options: argparse.Namespace) -> None:
    if options.output is None:
        raise ValueError("--output is missing: expected the CSV of states to be written")
    output = Path(options.output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder: expected the name of a CSV")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}, expected one that exists")
    with shared_lock(output):
        _write_labels(options, output)


def _write_labels(options: argparse.Namespace, output: Path) -> None:
    if by_main_process(output.exists) and not options.overwrite:
        raise ValueError(f"{output} exists: --overwrite replaces it")
    if output.exists() and output.samefile(options.reports):
        raise ValueError(f"{output} holds the reports themselves: expected another --output")
    journal = output.with_name(f".{output.name}.jsonl")
    by_model = runs_model(options.labeler)
    if by_model and by_main_process(lambda: is_begun(journal)) and not options.resume and not options.overwrite:
        raise ValueError(
            f"{journal} is an unfinished labelling: --resume continues it, --overwrite deletes it and starts again"
        )
    labeler = labeler_of(options.labeler, options.option)
    if not by_model:
        continue_alone()
        _write_states(options, output, labeler.name, lambda reports: label_quietly(labeler, reports))
        return
    settings = {"labeler": options.labeler, "options": options.option}
    if options.overwrite and not options.resume:
        by_main_process(lambda: discard_journals(journal))
    how = "--resume --overwrite" if options.overwrite else "--resume"
    with (
        temporary_journal(journal, lambda: settings, options.overwrite, how),
        closing(read_reports(options.reports)) as rows,
    ):
        reports = list(dict.fromkeys(report for _, report in rows))
        states = label_together(labeler, reports, journal)
        continue_alone()
        known = dict(zip(reports, states, strict=True))
        _write_states(options, output, labeler.name, lambda batch: np.stack([known[report] for report in batch]))


def _write_states(
    options: argparse.Namespace, output: Path, name: str, read: Callable[[list[str]], np.ndarray]
) -> None:
    """Write the table of states, which `read` gives for reports."""
    blank: list[str] = []
    count = 0

    def rows() -> Iterator[tuple[str, list[int]]]:
        nonlocal count
        with closing(read_reports(options.reports)) as reports:
            while batch := list(islice(reports, _BATCH)):
                states = read([report for _, report in batch])
                count += len(batch)
                for (study, _), row in zip(batch, states.tolist(), strict=True):
                    if set(row) == {UNMENTIONED}:
                        blank.append(study)
                    yield study, row

    write_states(output, rows())
    if blank:
        show(f"{len(blank):,} reports have no state, empty or not understood: {listed(blank)}", file=sys.stderr)
    show(f"{count:,} reports labelled by {name}: {output}")


# --- a dataset -------------------------------------------------------------------------------------------------------


def _label_dataset(options: argparse.Namespace) -> None:
    from ..labelers.labelling import label_dataset, label_share, merge_labels
    from ..studies.shards import Share

    share = None if options.shard is None else Share.parse(options.shard)
    settings: dict[str, Any] = {"labeler": options.labeler}
    prepare = None
    if options.labeler == "csv":
        id_column = options.id_column or "id"
        known = read_states(options.csv, id_column)
        # An interrupted labelling is not continued with a file that has changed.
        content = hashlib.sha256(Path(options.csv).read_bytes()).hexdigest()
        settings.update(csv=str(Path(options.csv).resolve()), csv_sha256=content, id_column=id_column)
        ids = _dataset_ids(options, known)
        absent, unused = [study for study in ids if study not in known], known.keys() - set(ids)

        def read(ids, reports):
            return [known.get(study) for study in ids]

    else:
        settings["options"] = options.option
        # Nothing is labelled by --merge, which may run on a machine without a GPU.
        labeler = None if options.merge else labeler_of(options.labeler, options.option)
        known: dict[str, np.ndarray] = {}

        def read(ids, reports):
            return [known[report] for report in reports] if known else label_quietly(labeler, list(reports))

        if runs_model(options.labeler):

            def prepare(reports, journal):
                known.update(zip(reports, label_together(labeler, reports, journal), strict=True))

    where: dict[str, Any] = {"output": options.output, "relabel": options.relabel}
    if share is not None or options.merge:
        continue_alone()
    if share is not None:
        show(label_share(options.dataset, read, settings, share, **where))
        return
    if options.merge:
        report = merge_labels(options.dataset, settings, **where)
    else:
        how = {"resume": options.resume, "overwrite": options.overwrite, "prepare": prepare}
        report = label_dataset(options.dataset, read, settings, **where, **how)
    show(str(report))
    if options.labeler == "csv":
        if absent:
            show(f"not in {options.csv}: {len(absent):,} studies: {listed(absent)}", file=sys.stderr)
        if unused:
            show(f"{len(unused):,} ids of {options.csv} belong to no study", file=sys.stderr)


def _dataset_ids(options: argparse.Namespace, known: dict) -> list[str]:
    """Ids of all studies of the dataset; a `ValueError` if none of them is known."""
    from ..studies.loading import prepared_column, prepared_splits

    ids = [
        study for split in prepared_splits(options.dataset) for study in prepared_column(options.dataset, split, "id")
    ]
    if not any(study in known for study in ids):
        raise ValueError(
            f"{options.csv}: none of the {len(ids):,} studies is in it (studies: {ids[0]!r}, file: "
            f"{next(iter(known), 'none')!r}), expected the ids of the studies"
        )
    return ids


# --- two tables of states --------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> None:
    with nullcontext() if options.output is None else shared_lock(options.output):
        continue_alone()
        _measure_agreement(options, None if options.output is None else Path(options.output))


def _measure_agreement(options: argparse.Namespace, folder: Path | None) -> None:
    from ..labelers.agreement import format_agreement, measure_agreement, write_agreement

    check_folder("--output", folder)
    if folder is not None and folder.exists() and any(folder.iterdir()) and not options.overwrite:
        raise ValueError(f"{folder} exists and is not empty: --overwrite writes into it")
    paths = [Path(path) for path in options.compare]
    tables = [read_states(path) for path in paths]
    ids = [study for study in tables[0] if study in tables[1]]
    if not ids:
        raise ValueError(f"{paths[0]} and {paths[1]} have no id in common: expected states of the same reports")
    reference, candidate = (np.array([table[study] for study in ids]) for table in tables)
    result = measure_agreement(reference, candidate)
    show(format_agreement(result))
    only = [[study for study in table if study not in other] for table, other in (tables, tables[::-1])]
    for path, missing in zip(paths, only, strict=True):
        if missing:
            show(f"only in {path}: {len(missing):,} reports: {listed(missing)}", file=sys.stderr)
    if folder is not None:
        result["only_in_reference"], result["only_in_candidate"] = only
        write_agreement(folder, result, ids, reference, candidate)
        show(f"\nagreement.json, agreement.csv and disagreements.csv: {folder}")
