"""`otdrg generate`: the reports of studies, with the states they were written from and a check against these."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..image_processing_otdrg import without_credentials
from ..inference.listing import ListedStudy, listed_studies, prepared_studies, read_lines, typed_findings, typed_studies
from ..runtime.interruptions import fault_of_study, is_out_of_memory
from ..runtime.journal import Journal
from ..runtime.output_lock import OutputLock
from ..runtime.printable import one_line, printable
from .terminal import format_record, terminal_width, wants_colour

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Write the report of each study from its views. With it come the states of the 14 findings that the model was told, the
predictor's probability of each, and where the report, read by the labeler "rules", says otherwise than told.
"""
EPILOG = """\
A list of studies has a line each: the paths of the views with tabs between them, or a JSON object
  {"id": "s1", "images": ["frontal.png", "lateral.png"], "indication": "cough", "findings": {"edema": "positive"}}
of which all but "images" may be left out. A study of a list or a dataset that cannot be read is left out and named, and
the exit status is 1.

Examples:
  otdrg generate runs/quickstart --study frontal.png lateral.png --findings edema=positive --heatmap heatmaps
  ls images/*.png | otdrg generate runs/quickstart --studies - --json
  otdrg generate org/otdrg --studies studies.jsonl --output reports.jsonl --batch-size 8
  otdrg generate org/otdrg --studies studies.jsonl --output reports.jsonl --batch-size 8 --resume
"""

#: Longest part of a picture's name that is from the study's id.
_LONGEST_NAME = 60


@dataclass
class _Outcome:
    """What has become of the studies so far."""

    written: int = 0
    skipped: int = 0


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    studies = parser.add_argument_group("studies, one of").add_mutually_exclusive_group(required=True)
    studies.add_argument(
        "--study", nargs="+", action="append", metavar="VIEW", help="the views of one study; repeatable"
    )
    studies.add_argument(
        "--studies", metavar="LIST", help="file with a study a line, - for standard input, or folder of otdrg prepare"
    )
    told = parser.add_argument_group("what the model is told")
    told.add_argument("--split", metavar="NAME", help="of a folder of otdrg prepare")
    told.add_argument(
        "--findings",
        nargs="+",
        action="extend",
        default=[],
        metavar="FINDING=STATE",
        help="states to write the reports from, in place of predicted ones: positive, negative, unclear, unmentioned",
    )
    told.add_argument(
        "--indication",
        metavar="TEXT",
        help="why the studies were made (default of a dataset: its own, if the model was trained with indications)",
    )
    told.add_argument("--num-beams", type=int, metavar="N", help="beams; 1 is greedy search (default: the model's)")
    told.add_argument("--max-new-tokens", type=int, metavar="N", help="most of a report (default: the model's)")
    told.add_argument("--batch-size", type=int, default=1, metavar="N", help="studies read at once (default: 1)")
    output = parser.add_argument_group("where to")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON object a study, not text")
    form.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write them to a .jsonl file as they come, and print nothing",
    )
    output.add_argument("--resume", action="store_true", help="go on with --output: studies that are in it are kept")
    output.add_argument("--overwrite", action="store_true", help="replace --output")
    output.add_argument("--heatmap", type=Path, metavar="DIR", help="folder for a picture of each transport plan")


def run(options: argparse.Namespace) -> None:
    """Read what is asked for, write the reports, and name the studies that had to be left out."""
    _check(options)
    if options.output is None:
        _run(options)
        return
    with OutputLock(options.output):
        if options.output.exists() and not options.resume and not options.overwrite:
            raise ValueError(f"{options.output} exists: --resume goes on with it, --overwrite replaces it")
        _run(options)


def _run(options: argparse.Namespace) -> None:
    findings = typed_findings(options.findings)
    studies = _studies(options, findings)

    # Behind the checks, because what these import takes seconds.
    from transformers.utils import logging

    logging.set_verbosity_error()
    if options.study:
        # A wrong file is better told of before a large model is loaded than after.
        for study in studies:
            study.read_views(sys.maxsize)
    if options.resume:
        Journal(options.output)

    from ..inference.loading import decoding, load_pipeline
    from ..inference.resumption import begin_output, settings_of

    pipe = load_pipeline(options.model)
    options.batch_size = min(options.batch_size, len(studies))
    arguments = decoding(pipe.model, options.num_beams, options.max_new_tokens, options.batch_size)
    journal, kept = None, 0
    if options.output is not None:
        settings = settings_of(pipe, studies, arguments, options.heatmap)
        journal, missing = begin_output(options.output, options.resume, settings, studies)
        studies, kept = missing, len(studies) - len(missing)
    outcome = _Outcome()
    try:
        _write(pipe, studies, options, arguments, journal, outcome)
    except KeyboardInterrupt as stop:
        written = f"{outcome.written:,} of {len(studies):,} studies were written"
        raise type(stop)(
            written if journal is None else f"{written} to {options.output}; --resume goes on with the others"
        ) from None
    if journal is not None:
        told = f", {kept:,} were there" if options.resume else ""
        counted = f"{outcome.written:,} report{'' if outcome.written == 1 else 's'}"
        print(f"{counted} written{told}: {options.output}", file=sys.stderr)
    if outcome.skipped:
        raise ValueError(
            f"{outcome.skipped:,} of {len(studies):,} studies were left out, for the reasons above; "
            "the others were written"
        )


def _check(options: argparse.Namespace) -> None:
    for name in ("num_beams", "max_new_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: expected 1 or more")
    if options.output is None and (options.resume or options.overwrite):
        raise ValueError(f"--{'resume' if options.resume else 'overwrite'} goes with --output: expected both")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite were both given: expected one")
    if options.split is not None and not (options.studies and Path(options.studies).is_dir()):
        raise ValueError("--split goes with --studies and a folder of otdrg prepare: expected both")
    if options.output is not None:
        if options.output.is_dir() or options.output.suffix != ".jsonl":
            # By its suffix `otdrg score` and `otdrg label` know what it is.
            what = "this is a folder" if options.output.is_dir() else "another kind of file"
            raise ValueError(f"--output {options.output}: {what}, expected the name of a .jsonl file")
        nearest = next(folder for folder in options.output.absolute().parents if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"--output {options.output}: {nearest} is no folder that can be written to")
    if options.heatmap is not None and options.heatmap.exists() and not options.heatmap.is_dir():
        raise ValueError(f"--heatmap {options.heatmap}: this is a file, expected a folder")
    if options.heatmap is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--heatmap needs matplotlib: pip install 'otdrg[demo]'")


def _studies(options: argparse.Namespace, findings: dict[str, str]) -> list[ListedStudy]:
    if options.study:
        return typed_studies(options.study, options.indication, findings)
    if options.studies != "-" and Path(options.studies).is_dir():
        from ..training.recipe import published_recipe

        recipe = published_recipe(options.model)
        indications = recipe is not None and recipe.report.indication
        return prepared_studies(options.studies, options.split, options.indication, indications, findings)
    name = "standard input" if options.studies == "-" else options.studies
    return listed_studies(read_lines(options.studies), name, options.indication, findings)


# --- reports ---------------------------------------------------------------------------------------------------------


def _write(pipe, studies: list[ListedStudy], options, arguments: dict[str, int], journal, outcome: _Outcome) -> None:
    """Write the studies' reports batch by batch, and tell of those that cannot be read."""
    from tqdm.auto import tqdm

    printing = journal is None
    # On a terminal that is written to, a bar would be in the way.
    hidden = True if len(studies) == 1 or (printing and sys.stdout.isatty()) else None
    colour = printing and wants_colour(sys.stdout)
    faults: list[str] = []
    try:
        with tqdm(total=len(studies), unit="study", disable=hidden) as bar:

            def skip(study: ListedStudy, error: Exception) -> None:
                if options.study:
                    raise error
                reason = fault_of_study(error)
                faults.append(reason if reason.startswith(f"{study.id}:") else f"{study.id}: {reason}")
                outcome.skipped += 1
                bar.update()

            for batch in _batches(pipe, studies, options.batch_size, skip):
                for record in _records_or_skip(pipe, batch, options.heatmap, arguments, skip):
                    if not printing:
                        journal.add([record])
                    elif options.json:
                        print(printable(json.dumps(record, ensure_ascii=False)), flush=True)
                    else:
                        print(format_record(record, terminal_width(), colour), flush=True)
                    outcome.written += 1
                    bar.update()
    finally:
        for fault in faults:
            print(f"left out: {one_line(fault)}", file=sys.stderr)


def _batches(pipe, studies, batch_size: int, skip) -> Iterator[list[tuple[ListedStudy, list[Image.Image]]]]:
    """Studies with their views, so many at a time and all of one steering; those that cannot be read are skipped."""
    for _, steered in groupby(studies, key=lambda study: study.findings):
        readable = _readable(pipe.processor, steered, skip)
        while batch := list(islice(readable, batch_size)):
            yield batch


def _readable(processor, studies, skip) -> Iterator[tuple[ListedStudy, list[Image.Image]]]:
    for study in studies:
        try:
            views = study.read_views(processor.max_image_pixels)
            # An indication may hold what stands for the study in a prompt.
            processor.encode_text([len(views)], indication=study.indication)
        except Exception as error:  # a damaged file raises whatever its decoder meets
            skip(study, error)
        else:
            yield study, views


def _records_or_skip(pipe, batch, heatmap: Path | None, arguments: dict[str, int], skip) -> Iterator[dict[str, Any]]:
    """What is written of each study of a batch; a study that its batch fails at is skipped, and the others written."""
    try:
        records = list(_records(pipe, batch, heatmap, arguments))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fault_of_study(error)
        records = []
        for study, views in batch:
            try:
                records += _records(pipe, [(study, views)], heatmap, arguments)
            except Exception as fault:
                skip(study, fault)
        if not records and len(batch) > 1:
            raise
    yield from records


def _records(pipe, batch, heatmap: Path | None, arguments: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What is written of each study of a batch."""
    outputs = pipe(
        [{"images": views, "indication": study.indication} for study, views in batch],
        batch_size=len(batch),
        findings=batch[0][0].findings or None,
        return_heatmaps=heatmap is not None,
        # A model that is told of nothing has nothing to contradict.
        return_contradictions=pipe.model.config.dle,
        **arguments,
    )
    for (study, views), (output, *_) in zip(batch, outputs, strict=True):
        report, heatmaps = output.pop("generated_text"), output.pop("heatmaps", None)
        record = {**study.asked(), "report": report, **output}
        if heatmaps is not None:
            from ..inference.heatmaps import draw_heatmaps

            heatmap.mkdir(parents=True, exist_ok=True)
            path = heatmap / _picture_name(study)
            draw_heatmaps(views, heatmaps, record["findings"], path, report=report)
            record["heatmap"] = str(path)
        yield record


def _picture_name(study: ListedStudy) -> str:
    """A file's name that no other study of the list has: the id if it can be one, else what is like it and a digest."""
    like = study.id
    if study.images is not None and study.id == " + ".join(map(without_credentials, study.images)):
        like = "_".join(Path(image).stem for image in study.images)
    name = re.sub(r"[^\w.-]+", "_", like)[:_LONGEST_NAME].lstrip(".")
    if name == study.id:
        return f"{name}.png"
    return f"{name}_{hashlib.blake2b(study.id.encode(), digest_size=4).hexdigest()}.png"


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
