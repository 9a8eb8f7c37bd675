"""Fills the finding states of a dataset of studies on disk, shard by shard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..files_otdrg import interpret, read_json, write_json, write_text
from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, UNMENTIONED
from ..runtime.journal import WorkSettings
from ..runtime.output_lock import OutputLock
from ..studies.schema import STUDY_FEATURES
from ..studies.shards import SUMMARY, ShardWriter, check_output, publish_shards, put_in_place
from ..studies.source import SPLITS

#: Ids and reports to state ids, None where there are none.
StateReader = Callable[[Sequence[str], Sequence[str]], Sequence[Sequence[int] | None]]

#: Studies whose states are not known, or are all unmentioned.
UNLABELLED = "unlabelled.txt"

_SETTINGS, _SHARDS = "label.json", "shards"
_COPIED_ROWS = 100


@dataclass
class LabelReport:
    """What was labelled.

    Args:
        folder: the dataset.
        studies: `{split: {"studies", "labelled", "kept", "unknown"}}`; kept ones had states before.
        states: `{finding: {state: studies}}` over all studies whose states are known.
        unlabelled: ids of the studies that stay without states, and of those that got nothing but unmentioned.
    """

    folder: Path
    studies: dict[str, dict[str, int]] = field(default_factory=dict)
    states: dict[str, dict[str, int]] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["| split | studies | labelled | kept | unknown |", "|---" * 5 + "|"]
        lines += [f"| {split} | {' | '.join(f'{n:,}' for n in row.values())} |" for split, row in self.studies.items()]
        lines += ["", f"| finding | {' | '.join(FINDING_STATES)} |", "|---" * 5 + "|"]
        for name, row in self.states.items():
            lines.append(f"| {FINDING_DISPLAY_NAMES[name]} | {' | '.join(f'{n:,}' for n in row.values())} |")
        if self.unlabelled:
            listed = self.folder / UNLABELLED
            lines += ["", f"{len(self.unlabelled):,} studies without a state, or with nothing mentioned: {listed}"]
        return "\n".join([*lines, "", f"dataset: {self.folder}"])


class _Shard(NamedTuple):
    """A shard that is labelled; its file `NAME.json` holds this, and is written last."""

    name: str
    digest: str
    studies: dict[str, int]
    states: list[list[int]]
    unlabelled: list[str]


def label_dataset(
    folder: str | os.PathLike,
    read: StateReader,
    settings: dict[str, Any],
    *,
    output: str | os.PathLike | None = None,
    relabel: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> LabelReport:
    """Fill `finding_states` of a dataset that `otdrg prepare` has written; images are copied as they are.

    The new dataset is built in `OUTPUT.partial` and takes its place in one step.

    Args:
        folder: of the dataset.
        read: gives the states of studies by their ids and the text of their column `report`.
        settings: what the states are read with; an interrupted run is only gone on with by the same.
        output: folder of the labelled dataset; by default it takes the place of the other.
        relabel: label the studies that have states, too.
        resume: go on with an interrupted run; one that is whole is left as it is.
        overwrite: replace a dataset at `output`, and start an interrupted run anew.

    Raises:
        OutputLockedError: another process labels or builds the dataset at `output`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
        ValueError: the folder is not a built dataset, `output` is there or lies in it, or an interrupted run is there.
    """
    # Not abspath: of a link to a dataset, the dataset is replaced, not the link.
    folder = Path(os.path.realpath(folder))
    output = folder if output is None else Path(os.path.realpath(output))
    work = output.with_name(f"{output.name}.partial")
    settings = json.loads(json.dumps({"dataset": str(folder), "relabel": relabel, **settings}, default=str))
    with OutputLock(output):
        try:
            return _label_locked(folder, output, work, read, settings, relabel, resume, overwrite)
        except KeyboardInterrupt as stop:
            kept = len(list((work / _SHARDS).glob("*.json")))
            told = f"{kept:,} whole shards are kept in {work}; --resume goes on with the others"
            raise type(stop)(told if work.exists() else "nothing was labelled yet") from stop


def _label_locked(
    folder: Path,
    output: Path,
    work: Path,
    read: StateReader,
    settings: dict[str, Any],
    relabel: bool,
    resume: bool,
    overwrite: bool,
) -> LabelReport:
    if resume and (finished := _finish(output, work, settings, overwrite=overwrite or output == folder)):
        return finished
    files, summary = _files(folder), _summary(folder)
    _check_output(folder, output, overwrite)
    _enter(work, settings, resume, overwrite)
    arrow = (folder / "dataset_dict.json").is_file()
    shards = []
    with tqdm(total=sum(pq.read_metadata(file).num_rows for _, file in files), unit="study", disable=None) as bar:
        for name, file in files:
            shards.append(_label_shard(name, file, work / _SHARDS, read, relabel, arrow))
            bar.update(shards[-1].studies["studies"])
    report = _report(output, shards)
    named = [(shard.name.rpartition("-")[0], shard.name) for shard in shards]
    digest = hashlib.sha256(repr([(shard.name, shard.digest, shard.states) for shard in shards]).encode()).hexdigest()
    _copy_rest(folder, work)
    # Last, and quick: what is cut off from here on is labelled anew.
    publish_shards(work / _SHARDS, work, named, digest)
    _write_summary(work, summary, report, settings)
    put_in_place(output, work)
    return report


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Name and Parquet file of each shard, by split."""
    files = [
        (f"{split}-{position:05d}", file)
        for split in SPLITS
        for position, file in enumerate(sorted((folder / "data").glob(f"{split}-*.parquet")))
    ]
    if not files or not (folder / SUMMARY).is_file():
        raise ValueError(
            f"{folder} is not a built dataset: expected a folder written by otdrg prepare "
            "(otdrg prepare hub --dataset FOLDER makes one of any other)"
        )
    for _, file in files:
        try:
            names = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read ({error}): otdrg prepare makes it anew") from error
        if missing := set(STUDY_FEATURES) - set(names):
            raise ValueError(f"{file}: no column {min(missing)!r}, expected those that otdrg prepare writes")
    return files


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / SUMMARY)
    except ValueError as error:
        raise ValueError(f"{folder / SUMMARY} is damaged: {error}") from None


def _finish(output: Path, work: Path, settings: dict[str, Any], overwrite: bool) -> LabelReport | None:
    """The report of this labelling if it is whole; cut off just before, it is put in its place."""
    if _finished(work, settings) and not (work / _SETTINGS).exists():
        check_output(output, overwrite)
        put_in_place(output, work)
    return None if work.exists() else _finished(output, settings)


def _finished(output: Path, settings: dict[str, Any]) -> LabelReport | None:
    """The report of the labelling of a dataset, provided that it is this one."""
    labels = _summary(output).get("labels") if (output / SUMMARY).is_file() else None
    if labels is None:
        return None
    report = interpret(output / SUMMARY, lambda: LabelReport(output, labels.pop("studies"), labels.pop("states")))
    if labels != settings:
        return None
    if (output / UNLABELLED).is_file():
        report.unlabelled = (output / UNLABELLED).read_text(encoding="utf-8").splitlines()
    return report


def _check_output(folder: Path, output: Path, overwrite: bool) -> None:
    if folder in output.parents:
        raise ValueError(f"{output} lies in the dataset {folder}: expected an --output beside it")
    for name in (_SETTINGS, _SHARDS):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} has the name of a file of the labelling: expected none of this name")
    if output != folder:
        check_output(output, overwrite)


def _enter(work: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    if work.exists():
        if not (work / _SETTINGS).is_file():
            raise ValueError(f"{work} is in the way: expected none of this name, or one of an interrupted labelling")
        if overwrite:
            shutil.rmtree(work)
        elif not resume:
            raise ValueError(
                f"{work} is an interrupted labelling: --resume goes on with it, --overwrite starts anew and deletes it"
            )
        else:
            WorkSettings(work, settings).check(read_json(work / _SETTINGS))
            # Of a run that was cut off while its files were being put in their places.
            for path in work.iterdir():
                if path.is_dir() and not path.is_symlink() and path.name != _SHARDS:
                    shutil.rmtree(path)
                elif path.name not in (_SETTINGS, _SHARDS):
                    path.unlink()
    (work / _SHARDS).mkdir(parents=True, exist_ok=True)
    write_json(work / _SETTINGS, settings)


def _label_shard(name: str, file: Path, folder: Path, read: StateReader, relabel: bool, arrow: bool) -> _Shard:
    """Label one shard, or take it as it is if it was labelled before."""
    record, stat = folder / f"{name}.json", file.stat()
    digest = f"{stat.st_size}-{stat.st_mtime_ns}"
    if record.is_file():
        before = read_json(record, parse=lambda content: _Shard(**content))
        if before.digest == digest and record.with_suffix(".parquet").is_file():
            return before
    columns = pq.read_table(file, columns=["id", "report", "finding_states"]).to_pydict()
    states = columns["finding_states"]
    wanted = [place for place, row in enumerate(states) if relabel or row is None]
    ids, reports = ([columns[column][place] for place in wanted] for column in ("id", "report"))
    found = read(ids, reports) if wanted else []
    labelled = 0
    for place, row in zip(wanted, found, strict=True):
        if row is not None:
            states[place] = [int(state) for state in row]
            labelled += 1
    _write(file, folder / name, states, arrow)
    counts = Counter((column, state) for row in states if row is not None for column, state in enumerate(row))
    shard = _Shard(
        name,
        digest,
        {
            "studies": len(states),
            "labelled": labelled,
            "kept": sum(row is not None for row in states) - labelled,
            "unknown": sum(row is None for row in states),
        },
        [[counts[column, state] for state in range(len(FINDING_STATES))] for column in range(len(FINDINGS))],
        [study for study, row in zip(columns["id"], states, strict=True) if row is None or set(row) == {UNMENTIONED}],
    )
    write_json(record, shard._asdict())
    return shard


def _write(file: Path, path: Path, states: list[list[int] | None], arrow: bool) -> None:
    schema = STUDY_FEATURES.arrow_schema
    start = 0
    # Row group by row group: batches that reach over several hold more images than were ever in memory at once.
    with pq.ParquetFile(file) as source, ShardWriter(path, arrow=arrow) as writer:
        for group in range(source.num_row_groups):
            for batch in source.iter_batches(_COPIED_ROWS, row_groups=[group]):
                rows = states[start : start + len(batch)]
                start += len(batch)
                column = pa.array(rows, schema.field("finding_states").type)
                arrays = [column if name == "finding_states" else batch.column(name) for name in schema.names]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _report(output: Path, shards: list[_Shard]) -> LabelReport:
    report = LabelReport(output, states={name: dict.fromkeys(FINDING_STATES, 0) for name in FINDINGS})
    for shard in shards:
        split = report.studies.setdefault(shard.name.rpartition("-")[0], dict.fromkeys(shard.studies, 0))
        for name, count in shard.studies.items():
            split[name] += count
        for finding, counts in zip(FINDINGS, shard.states, strict=True):
            for state, count in zip(FINDING_STATES, counts, strict=True):
                report.states[finding][state] += count
        report.unlabelled += shard.unlabelled
    return report


def _copy_rest(folder: Path, work: Path) -> None:
    """Card and lists of the dataset, and whatever else its owner keeps in its folder: that goes with the old one."""
    for path in folder.iterdir():
        if path.name in (SUMMARY, UNLABELLED, "dataset_dict.json", "data", *SPLITS):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, work / path.name, symlinks=True)
        else:
            shutil.copy2(path, work / path.name, follow_symlinks=False)


def _write_summary(work: Path, summary: dict[str, Any], report: LabelReport, settings: dict[str, Any]) -> None:
    """Counts and settings of the dataset, with what it was labelled with."""
    write_json(work / SUMMARY, {**summary, "labels": {**settings, "studies": report.studies, "states": report.states}})
    if report.unlabelled:
        write_text(work / UNLABELLED, "\n".join(report.unlabelled) + "\n")
    shutil.rmtree(work / _SHARDS)
    (work / _SETTINGS).unlink()


__all__ = ["UNLABELLED", "LabelReport", "StateReader", "label_dataset"]
