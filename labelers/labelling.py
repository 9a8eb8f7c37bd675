"""Fill the finding states of a prepared dataset, shard by shard, so that an interrupted labelling can continue."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..files_otdrg import interpret, read_json, write_json, write_text
from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, UNMENTIONED
from ..runtime.output_lock import OutputLock
from ..runtime.printable import markdown_table
from ..runtime.shared_work import by_main_process, continue_alone, shared_lock
from ..studies.schema import ADDED_LATER, STUDY_FEATURES
from ..studies.shards import SUMMARY, Share, WorkFolder, write_shard
from ..studies.source import SPLITS

#: Gives the state ids of studies by their ids and reports, None for a study it does not know.
StateReader = Callable[[Sequence[str], Sequence[str]], Sequence[Sequence[int] | None]]

#: Ids of studies whose states are unknown or all unmentioned.
UNLABELLED = "unlabelled.txt"

_COPIED_ROWS = 100


@dataclass
class LabelReport:
    """Counts of a labelling.

    Args:
        folder: the dataset.
        studies: `{split: {"studies", "labelled", "kept", "unknown"}}`; kept studies had states before.
        states: `{finding: {state: studies}}` over all studies with known states.
        unlabelled: ids of studies without states, and of those with all findings unmentioned.
    """

    folder: Path
    studies: dict[str, dict[str, int]] = field(default_factory=dict)
    states: dict[str, dict[str, int]] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        splits = [[split, *(f"{n:,}" for n in row.values())] for split, row in self.studies.items()]
        states = [[FINDING_DISPLAY_NAMES[name], *(f"{n:,}" for n in row.values())] for name, row in self.states.items()]
        lines = [markdown_table(["split", "studies", "labelled", "kept", "unknown"], splits)]
        lines += ["", markdown_table(["finding", *FINDING_STATES], states)]
        if self.unlabelled:
            listed = self.folder / UNLABELLED
            lines += ["", f"{len(self.unlabelled):,} studies without a state, or with nothing mentioned: {listed}"]
        return "\n".join([*lines, "", f"dataset: {self.folder}"])


class _Shard(NamedTuple):
    """States of a shard: the content of its file `NAME.json`."""

    digest: str
    ids: list[str]
    states: list[list[int] | None]
    labelled: int


def label_dataset(
    folder: str | os.PathLike,
    read: StateReader,
    settings: dict[str, Any],
    *,
    output: str | os.PathLike | None = None,
    relabel: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    prepare: Callable[[list[str], Path], None] | None = None,
) -> LabelReport:
    """Fill `finding_states` of a dataset written by `otdrg prepare`; images are copied unchanged.

    The new dataset is made in `OUTPUT.partial` and replaces the old one in one step. Every process of a distributed run
    must call this function; all but the main one end when `prepare` is done, or at once without it.

    Args:
        folder: the dataset.
        read: gives the states of studies by their ids and the text of their column `report`.
        settings: what identifies the labeler; an interrupted labelling is continued only with the same settings.
        output: folder of the labelled dataset; by default the dataset is replaced.
        relabel: also label the studies that have states.
        resume: continue an interrupted labelling; a complete one is not changed.
        overwrite: replace a dataset at `output` and, without `resume`, delete an interrupted labelling.
        prepare: called before `read` by every process, with all reports that are to be read and the path of a journal.

    Raises:
        OutputLockedError: another process labels or builds the dataset at `output`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
        ValueError: the folder is not a prepared dataset, `output` exists or is inside it, or an interrupted labelling
            exists and neither `resume` nor `overwrite` is set.
    """
    work = _work(folder, output, relabel, settings)
    folder = _dataset(folder)
    how = f"--resume{' --overwrite' if overwrite else ''} continues"
    with shared_lock(work.output), _says_what_is_kept(work, how):
        finished = by_main_process(lambda: _begin(folder, work, resume, overwrite))
        if prepare is not None and finished is None:
            prepare(_wanted_reports(folder, relabel), work.shards / "reports.jsonl")
        continue_alone()
        if finished:
            return finished
        files = _files(folder)
        shards = _run(list(files.items()), work, read, relabel)
        return _publish(folder, files, shards, work)


def label_share(
    folder: str | os.PathLike,
    read: StateReader,
    settings: dict[str, Any],
    share: Share,
    *,
    output: str | os.PathLike | None = None,
    relabel: bool = False,
) -> str:
    """Label a share of the files of a dataset in `OUTPUT.partial`; [`merge_labels`] makes the dataset of all shares.

    As [`otdrg.studies.build.build_share`]; `read` is called with the reports of the share only.

    Returns:
        What was labelled, for the user.

    Raises:
        OutputLockedError: another process labels this share or puts the shares together.
        ValueError: as [`label_dataset`], or the labelling was begun with other settings.
    """
    work = _work(folder, output, relabel, settings, shared=True)
    folder = _dataset(folder)

    def finished() -> LabelReport | None:
        report = _finished(work, work.output == folder)
        if report is None:
            _files(folder)
            _check_output(folder, work, overwrite=False)
        return report

    with _says_what_is_kept(work, "the same command continues"), work.join(share, finished) as labelled:
        if labelled is not None:
            return str(labelled)
        files = list(_files(folder).items())
        shards = _run([file for place, file in enumerate(files) if share.has(place)], work, read, relabel)
    studies, count = sum(len(shard.ids) for shard in shards.values()), sum(shard.labelled for shard in shards.values())
    return (
        f"shard {share}: {count:,} of {studies:,} studies labelled, in {len(shards):,} of {len(files):,} files of "
        f"{folder}; --merge makes the dataset"
    )


def merge_labels(
    folder: str | os.PathLike,
    settings: dict[str, Any],
    *,
    output: str | os.PathLike | None = None,
    relabel: bool = False,
) -> LabelReport:
    """Put together the shares that [`label_share`] has labelled; the dataset is the one of [`label_dataset`].

    Raises:
        OutputLockedError: another process labels one of the shares.
        ValueError: a share is missing or not finished, or was labelled with other settings.
    """
    work = _work(folder, output, relabel, settings, shared=True)
    folder = _dataset(folder)
    with OutputLock(work.output), _says_what_is_kept(work, "--merge continues"):
        if finished := _finished(work, work.output == folder):
            return finished
        files = _files(folder)
        _check_output(folder, work, overwrite=False)
        count = work.end_shares()
        shards = {name: _labelled(file, work.shards / f"{name}.json") for name, file in files.items()}
        work.check_shares([place for place, shard in enumerate(shards.values()) if shard is None], count)
        return _publish(folder, files, shards, work)


def _begin(folder: Path, work: WorkFolder, resume: bool, overwrite: bool) -> LabelReport | None:
    """Check the folders, and create the work folder; gives the report if the labelling is complete."""
    if resume and (finished := _finished(work, overwrite or work.output == folder)):
        return finished
    _files(folder)
    read_json(folder / SUMMARY)
    _check_output(folder, work, overwrite)
    work.enter(resume, overwrite)
    return None


def _wanted_reports(folder: Path, relabel: bool) -> list[str]:
    tables = (pq.read_table(file, columns=["report", "finding_states"]).to_pydict() for file in _files(folder).values())
    pairs = (zip(table["report"], table["finding_states"], strict=True) for table in tables)
    return [report for rows in pairs for report, states in rows if relabel or states is None]


def _dataset(folder: str | os.PathLike) -> Path:
    # Not abspath: if the folder is a link, its target is replaced and the link is kept.
    return Path(os.path.realpath(folder))


def _work(
    folder: str | os.PathLike,
    output: str | os.PathLike | None,
    relabel: bool,
    settings: dict[str, Any],
    shared: bool = False,
) -> WorkFolder:
    dataset = _dataset(folder)
    settings = {"dataset": str(dataset), "relabel": relabel, **settings}
    return WorkFolder(dataset if output is None else _dataset(output), settings, "label", shared)


@contextmanager
def _says_what_is_kept(work: WorkFolder, how: str) -> Iterator[None]:
    """Say in the message of an interruption what is kept, and how to continue."""
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = len(list(work.shards.glob("*.json")))
        message = f"{kept:,} complete shards are kept in {work.path}; {how}"
        raise type(stop)(message if work.path.exists() else "nothing was labelled yet") from stop


def _run(files: list[tuple[str, Path]], work: WorkFolder, read: StateReader, relabel: bool) -> dict[str, _Shard]:
    """Label files, given with their names, and show progress."""
    shards: dict[str, _Shard] = {}
    with tqdm(total=sum(pq.read_metadata(file).num_rows for _, file in files), unit="study", disable=None) as bar:
        for name, file in files:
            shards[name] = _label_shard(file, work.shards / f"{name}.json", read, relabel)
            bar.update(len(shards[name].ids))
    return shards


def _publish(folder: Path, files: dict[str, Path], shards: dict[str, _Shard], work: WorkFolder) -> LabelReport:
    """Make the dataset of all labelled files."""
    summary = read_json(folder / SUMMARY)
    report = _report(work.output, shards)
    for name, file in files.items():
        write_shard(work.shards / f"{name}.parquet", _with_states(file, shards[name].states))
    _copy_rest(folder, work.path)
    if report.unlabelled:
        write_text(work.path / UNLABELLED, "\n".join(report.unlabelled) + "\n")
    summary["labels"] = {**work.settings, "studies": report.studies, "states": report.states}
    named = [(_split_of(name), work.shards / f"{name}.parquet") for name in files]
    work.publish(named, summary, arrow=(folder / "dataset_dict.json").is_file())
    return report


def _split_of(shard: str) -> str:
    return shard.rpartition("-")[0]


def _files(folder: Path) -> dict[str, Path]:
    """The Parquet file of each shard, by split."""
    files = {
        f"{split}-{position:05d}": file
        for split in SPLITS
        for position, file in enumerate(sorted((folder / "data").glob(f"{split}-*.parquet")))
    }
    if not files or not (folder / SUMMARY).is_file():
        raise ValueError(
            f"{folder} is not a prepared dataset: expected a folder written by otdrg prepare "
            "(otdrg prepare hub --dataset FOLDER converts any other)"
        )
    for file in files.values():
        try:
            names = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read ({error}): otdrg prepare makes it again") from error
        if missing := set(STUDY_FEATURES).difference(ADDED_LATER, names):
            raise ValueError(f"{file}: no column {min(missing)!r}, expected those that otdrg prepare writes")
    return files


def _finished(work: WorkFolder, overwrite: bool) -> LabelReport | None:
    """The report of a complete labelling with the same settings."""
    summary = work.output / SUMMARY
    labels = read_json(summary).get("labels") if work.finished(overwrite) else None
    if labels is None:
        return None
    report = interpret(summary, lambda: LabelReport(work.output, labels.pop("studies"), labels.pop("states")))
    if labels != work.settings:
        return None
    if (work.output / UNLABELLED).is_file():
        report.unlabelled = (work.output / UNLABELLED).read_text(encoding="utf-8").splitlines()
    return report


def _check_output(folder: Path, work: WorkFolder, overwrite: bool) -> None:
    if folder in work.output.parents:
        raise ValueError(f"{work.output} is inside the dataset {folder}: expected an --output beside it")
    for path in (work.settings_file, work.shards):
        if (folder / path.name).exists():
            raise ValueError(f"{folder / path.name} has the name of a file of the labelling: rename it")
    if work.path.exists() and not work.settings_file.is_file():
        raise ValueError(f"{work.path} exists and is not an unfinished labelling: rename or delete it")
    if work.output != folder:
        work.check_output(overwrite)


def _label_shard(file: Path, record: Path, read: StateReader, relabel: bool) -> _Shard:
    """Label one shard, unless that was done before."""
    if (before := _labelled(file, record)) is not None:
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
    shard = _Shard(_digest(file), columns["id"], states, labelled)
    write_json(record, shard._asdict())
    return shard


def _labelled(file: Path, record: Path) -> _Shard | None:
    """The states of a shard, if it was labelled before and its file has not changed."""
    with suppress(OSError, ValueError):
        before = read_json(record, parse=lambda content: _Shard(**content))
        if before.digest == _digest(file):
            return before
    return None


def _digest(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _with_states(file: Path, states: list[list[int] | None]) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file with other finding states."""
    schema = STUDY_FEATURES.arrow_schema
    start = 0
    # One row group at a time, because a batch across row groups would hold the images of several.
    with pq.ParquetFile(file) as source:
        for group in range(source.num_row_groups):
            for batch in source.iter_batches(_COPIED_ROWS, row_groups=[group]):
                column = pa.array(states[start : start + len(batch)], schema.field("finding_states").type)
                start += len(batch)
                for name in ADDED_LATER:
                    if name not in batch.schema.names:
                        batch = batch.append_column(name, _absent(name, len(batch)))
                arrays = [column if name == "finding_states" else batch.column(name) for name in schema.names]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _absent(column: str, rows: int) -> pa.Array:
    """The values of a column that a dataset of an earlier version lacks."""
    empty = {"prior_images": [], "prior_report": ""}.get(column)
    return pa.array([empty] * rows, STUDY_FEATURES.arrow_schema.field(column).type)


def _report(output: Path, shards: dict[str, _Shard]) -> LabelReport:
    report = LabelReport(output)
    counts: Counter[tuple[int, int]] = Counter()
    for name, shard in shards.items():
        known = [row for row in shard.states if row is not None]
        split = report.studies.setdefault(_split_of(name), dict.fromkeys(("studies", "labelled", "kept", "unknown"), 0))
        split["studies"] += len(shard.ids)
        split["labelled"] += shard.labelled
        split["kept"] += len(known) - shard.labelled
        split["unknown"] += len(shard.ids) - len(known)
        counts.update((column, state) for row in known for column, state in enumerate(row))
        report.unlabelled += [
            study
            for study, row in zip(shard.ids, shard.states, strict=True)
            if row is None or set(row) == {UNMENTIONED}
        ]
    for column, finding in enumerate(FINDINGS):
        report.states[finding] = {name: counts[column, state] for state, name in enumerate(FINDING_STATES)}
    return report


def _copy_rest(folder: Path, work: Path) -> None:
    """Copy the card, the lists and anything else in the dataset's folder, which is deleted with the old dataset."""
    for path in folder.iterdir():
        if path.name in (SUMMARY, UNLABELLED, "dataset_dict.json", "data", *SPLITS):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, work / path.name, symlinks=True)
        else:
            shutil.copy2(path, work / path.name, follow_symlinks=False)
