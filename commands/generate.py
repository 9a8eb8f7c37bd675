"""`otdrg generate`: write the reports of studies, with their finding states and a comparison of both."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..inference.listing import (
    ListedStudy,
    listed_studies,
    prepared_studies,
    read_lines,
    rexrank_studies,
    typed_findings,
    typed_studies,
)
from ..runtime.interruptions import fault_of_study
from ..runtime.printable import one_line, printable, show
from ..runtime.shared_work import (
    by_main_process,
    exchange,
    is_begun,
    process_place,
    read_journals,
    share_work,
    shared_lock,
)
from ..studies.rexrank import write_predictions
from .arguments import (
    add_consensus,
    add_device,
    add_engine,
    add_guidance,
    check_consensus,
    check_device,
    check_engine,
    check_folder,
    check_guidance,
    check_least,
    placement,
)
from .terminal import format_record, terminal_width, wants_colour

DESCRIPTION = """\
Write the report of each study from its views. The output also has the states of the 14 findings that the report is
conditioned on, the predictor's probability of each, and the findings whose state in the report, as read by the labeler
"rules", differs.
"""
FORMATS = ("jsonl", "rexrank")
EPILOG = """\
A list of studies has a line for each: the paths of the views separated by tabs, or a JSON object
  {"id": "s1", "images": ["frontal.png", "lateral.png"], "indication": "cough", "findings": {"edema": "positive"}}
in which only "images" is required; "prior_images" and "prior_report", an earlier study of the patient, are for models
that read them. A study of a list or dataset that cannot be read is skipped and listed, and the exit status is 1. With
--format rexrank, --studies and --output are ReXrank's JSON files.

Examples:
  otdrg generate runs/quickstart --study frontal.png lateral.png --findings edema=positive --heatmap heatmaps
  ls images/*.png | otdrg generate runs/quickstart --studies - --json
  otdrg generate runs/quickstart --study frontal.png --candidates 32 --bank bank --runners-up 4
  otdrg generate org/otdrg --studies studies.jsonl --output reports.jsonl --batch-size 8
  otdrg generate org/otdrg --studies studies.jsonl --output reports.jsonl --batch-size 8 --resume
  otdrg generate org/otdrg --format rexrank --studies in.json --image-root images --output out.json
  accelerate launch -m otdrg generate org/otdrg --studies studies.jsonl --output reports.jsonl --batch-size 8
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    studies = parser.add_argument_group("studies, one of").add_mutually_exclusive_group(required=True)
    studies.add_argument(
        "--study", nargs="+", action="append", metavar="VIEW", help="the views of one study; repeatable"
    )
    studies.add_argument(
        "--studies",
        metavar="LIST",
        help="file with a study on each line, - for standard input, or folder of otdrg prepare",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="form of --studies and --output; rexrank: a JSON object of studies, and the same with model_prediction "
        "(default: jsonl)",
    )
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="with --format rexrank, the folder of the images"
    )
    conditions = parser.add_argument_group("how reports are written")
    conditions.add_argument("--split", metavar="NAME", help="split of a folder of otdrg prepare")
    conditions.add_argument(
        "--findings",
        nargs="+",
        action="extend",
        default=[],
        metavar="FINDING=STATE",
        help="states that replace the predicted ones: positive, negative, unclear, unmentioned, not_given",
    )
    conditions.add_argument(
        "--indication",
        metavar="TEXT",
        help="reason for the studies (default for a dataset: its own, if the model was trained with indications)",
    )
    conditions.add_argument(
        "--num-beams", type=int, metavar="N", help="beams; 1 is greedy search (default: the model's)"
    )
    conditions.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum number of tokens of a report (default: the model's)"
    )
    add_guidance(conditions)
    add_consensus(conditions)
    add_engine(conditions)
    conditions.add_argument("--batch-size", type=int, default=1, metavar="N", help="studies in a batch (default: 1)")
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON object for each study instead of text")
    form.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write each report to a .jsonl file as soon as it is finished, and print nothing",
    )
    output.add_argument("--resume", action="store_true", help="continue --output: reports in it are kept")
    output.add_argument("--overwrite", action="store_true", help="replace --output")
    output.add_argument(
        "--runners-up", type=int, metavar="N", help="with --candidates or --bank, also the N next best candidates"
    )
    output.add_argument("--heatmap", type=Path, metavar="DIR", help="folder for a picture of each transport plan")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Write the reports of the given studies, and list the studies that cannot be read."""
    _check(options)
    if options.output is None:
        _run(options)
        return
    if options.format == "rexrank":
        options.predictions = options.output
        # A name of its own: a .jsonl file of the same name may be another output.
        options.output = options.output.with_suffix(".otdrg.jsonl")
    with shared_lock(options.output):
        begun = by_main_process(lambda: is_begun(options.output))
        if begun and not options.resume and not options.overwrite:
            raise ValueError(f"{options.output} exists: --resume continues it, --overwrite replaces it")
        if options.format == "rexrank" and options.predictions.exists() and not begun and not options.overwrite:
            raise ValueError(f"{options.predictions} exists, and no {options.output.name}: --overwrite replaces it")
        _run(options)


def _run(options: argparse.Namespace) -> None:
    """Load the model, and write or print the reports."""
    findings = typed_findings(options.findings)
    studies = _studies(options, findings)

    # Imported after the checks, because it takes seconds.
    from transformers.utils import logging

    logging.set_verbosity_error()
    if options.study:
        # Find unreadable files before a large model is loaded.
        for study in studies:
            study.read_views(sys.maxsize)
    from ..inference.loading import asked_decoder, decoding, described_consensus, load_pipeline
    from ..inference.resumption import begin_output, read_output, settings_of
    from ..inference.vllm import asked_engine

    if options.resume:
        # Find a file that cannot be continued before a large model is loaded.
        by_main_process(lambda: read_output(options.output))
    pipe = load_pipeline(options.model, **placement(options))
    if not pipe.model.config.dle and any(study.findings for study in studies):
        raise ValueError("findings were given, but OTDRGConfig.dle=False: this model does not use finding states")
    if options.heatmap is not None and not pipe.model.has_heatmaps:
        raise ValueError("--heatmap was given, but OTDRGConfig.fiot=False: this model has no transport plan")
    own = studies[0].rows is not None or options.format == "rexrank"
    if own and pipe.model.config.indication_reader != "report":
        studies = _studies(options, findings, indications=True)
    options.batch_size = min(options.batch_size, len(studies))
    decoder = asked_decoder(pipe.model, pipe.processor, vars(options))
    asked = options.num_beams, options.max_new_tokens, options.batch_size, options.guidance_scale
    engine = asked_engine(pipe.model, pipe.processor, vars(options))
    arguments = decoding(pipe.model, *asked, decoder if engine is None else None)
    if engine is not None:
        arguments, decoder = engine.decoding(arguments, decoder), engine.decoder(decoder)
    if decoder is None and options.runners_up is not None:
        raise ValueError("--runners-up needs --candidates or --bank: expected one of them")
    described = {**arguments, **described_consensus(decoder)}
    if engine is not None:
        described["engine"] = engine.name
    if decoder is None:
        arguments["candidates"] = 1
    else:
        arguments = {"max_new_tokens": arguments["max_new_tokens"], "consensus": decoder}
        if options.runners_up is not None:
            described["runners_up"] = options.runners_up
            arguments["return_candidates"] = options.runners_up + 1
    kept = 0
    if options.output is not None:

        def begin() -> int:
            settings = settings_of(pipe, studies, described, options.heatmap)
            return begin_output(options.output, options.resume, settings, studies)

        kept = by_main_process(begin)
    try:
        with engine or nullcontext():
            rows, left_out = _write(pipe, studies, options, arguments, engine)
    except KeyboardInterrupt as stop:
        raise type(stop)(*_so_far(options, studies)) from None
    if options.output is not None:
        existing = f", {kept:,} were there" if options.resume else ""
        count = len(rows) - kept
        path = options.predictions if options.format == "rexrank" else options.output
        show(f"{count:,} report{'' if count == 1 else 's'} written{existing}: {path}", file=sys.stderr)
    if options.format == "rexrank":
        reports = {study: row["report"] for study, row in rows.items()}
        by_main_process(lambda: write_predictions(options.predictions, options.studies, reports))
    if left_out:
        others = "; the others were written" if rows else ""
        raise ValueError(f"{left_out:,} of {len(studies):,} studies were left out, for the reasons above{others}")


def _so_far(options: argparse.Namespace, studies: list[ListedStudy]) -> list[str]:
    """What an interrupted command has written, in one line, if it writes a file."""
    if options.output is None or process_place()[0] > 0:
        return []
    rows = read_journals(options.output)
    count = sum(study.id in rows for study in studies)
    return [f"{count:,} of {len(studies):,} studies were written to {options.output}; --resume continues"]


def _check(options: argparse.Namespace) -> None:
    check_least(options, num_beams=1, max_new_tokens=1, batch_size=1, runners_up=1)
    check_guidance(options)
    check_consensus(options)
    check_device(options)
    check_engine(options)
    if options.output is None and (options.resume or options.overwrite):
        raise ValueError(f"--{'resume' if options.resume else 'overwrite'} needs --output: expected both")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite were both given: expected one")
    if options.split is not None and not (options.studies and Path(options.studies).is_dir()):
        raise ValueError("--split needs --studies with a folder of otdrg prepare: expected both")
    _check_rexrank(options)
    if options.output is not None:
        suffix = ".json" if options.format == "rexrank" else ".jsonl"
        if options.output.is_dir() or options.output.suffix != suffix:
            # `otdrg score` and `otdrg label` recognise it by its suffix.
            what = "this is a folder" if options.output.is_dir() else "another kind of file"
            raise ValueError(f"--output {options.output}: {what}, expected the name of a {suffix} file")
        listed = options.studies
        if listed and options.output.exists() and os.path.exists(listed) and options.output.samefile(listed):
            raise ValueError(f"{options.output} would be written over, and is --studies: expected another --output")
        _check_writable("--output", options.output, options.output.parent)
    check_folder("--heatmap", options.heatmap)
    if options.heatmap is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--heatmap needs matplotlib: pip install 'otdrg[demo]'")
    if options.heatmap is not None:
        _check_writable("--heatmap", options.heatmap, options.heatmap)


def _check_writable(flag: str, given: Path, folder: Path) -> None:
    """Raise a `ValueError` unless the folder is writable, or can be made."""
    folder = folder.absolute()
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{flag} {given}: {nearest} is not a writable folder")


def _check_rexrank(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options that do not fit to the format."""
    if options.format != "rexrank":
        if options.image_root is not None:
            raise ValueError("--image-root needs --format rexrank: expected both or neither")
        return
    needed = {"--studies": options.studies, "--output": options.output, "--image-root": options.image_root}
    for flag, given in needed.items():
        if given is None:
            raise ValueError(
                f"--format rexrank needs --studies IN.json, --output OUT.json and --image-root: {flag} is missing"
            )
    if not options.image_root.is_dir():
        raise ValueError(f"--image-root {options.image_root}: expected a folder that exists")


def _studies(options: argparse.Namespace, findings: dict[str, str], indications: bool = False) -> list[ListedStudy]:
    """The studies that were typed, listed in a file, or prepared in a folder, where they can have own indications."""
    if options.study:
        return typed_studies(options.study, options.indication, findings)
    is_rexrank = options.format == "rexrank"
    if is_rexrank or (options.studies != "-" and Path(options.studies).is_dir()):
        from ..training.recipe import published_recipe

        recipe = published_recipe(options.model)
        indications = indications or (recipe is not None and recipe.gives_indication)
        if is_rexrank:
            return rexrank_studies(options.studies, options.image_root, options.indication, indications, findings)
        return prepared_studies(options.studies, options.split, options.indication, indications, findings)
    name = "standard input" if options.studies == "-" else options.studies
    # Standard input can be read once.
    lines = by_main_process(lambda: read_lines(options.studies))
    return listed_studies(lines, name, options.indication, findings)


def _write(
    pipe, studies: list[ListedStudy], options, arguments: dict[str, Any], engine
) -> tuple[dict[str, dict[str, Any]], int]:
    """Write or print the reports of the studies, and list those that cannot be read.

    Returns the rows of the reports by id, and the number of studies that were left out.
    """
    from ..inference.records import study_blocks, study_records

    printing, several = options.output is None, process_place()[1] > 1
    faults: dict[str, str] = {}

    def skip(study: ListedStudy, error: Exception) -> None:
        if options.study:
            raise error
        reason = fault_of_study(error)
        faults[study.id] = reason if reason.startswith(f"{study.id}:") else f"{study.id}: {reason}"

    def write_batch(block) -> list[dict[str, Any]]:
        return study_records(pipe, [studies[place] for place in block], arguments, skip, options.heatmap)

    def work(blocks) -> Iterator[list[dict[str, Any]]]:
        for records in (map if engine is None else engine.map)(write_batch, blocks):
            if printing and not several:
                _print(records, options.json)
            yield records

    # A progress bar would be between the reports on a terminal.
    hidden = True if len(studies) == 1 or (printing and sys.stdout.isatty()) else None
    blocks, ids = study_blocks(studies, options.batch_size), [study.id for study in studies]
    try:
        records = share_work(ids, blocks, work, options.output, progress="reports", hidden=hidden)
        for theirs in exchange(faults):
            faults |= theirs
        if printing and several and process_place()[0] == 0:
            _print(records.values(), options.json)
    finally:
        for study in studies:
            if study.id in faults:
                print(f"left out: {one_line(faults[study.id])}", file=sys.stderr)
    return records, len(faults)


def _print(records: Iterable[dict[str, Any]], as_json: bool) -> None:
    for record in records:
        text = printable(json.dumps(record, ensure_ascii=False)) if as_json else None
        print(text or format_record(record, terminal_width(), wants_colour(sys.stdout)), flush=True)
