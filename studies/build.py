"""Builds a dataset of studies on disk: in shards, by several processes, and so that it can be gone on with.

A build works in `OUTPUT.partial` and becomes `OUTPUT` in one step when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..files_otdrg import read_json, write_json, write_text
from ..runtime.interruptions import end_with_parent
from ..runtime.journal import WorkSettings
from ..runtime.output_lock import OutputLock
from .assembly import SECTIONS, Sections, StudyListing, assemble_study
from .card import dataset_card
from .images import stored_image
from .shards import SUMMARY, ShardWriter, check_output, publish_shards, put_in_place
from .source import SPLITS, Skipped, StudyEntry, StudySource, option
from .summary import OfficialCheck, SplitCounts, format_counts

logger = logging.getLogger(__name__)

#: Each study that was left out, and why.
SKIPPED = "skipped.jsonl"

_SETTINGS, _SHARDS = "build.json", "shards"


@dataclass
class BuildOptions:
    """How a dataset is built, whatever its source."""

    sections: Sections = option("What the report is made of.", "findings")
    limit: int | None = option("Most studies taken of each split, from its start.", None, metavar="N")
    shorter_side: int | None = option(
        "Scale images down whose shorter side is longer than this.", None, metavar="PIXELS"
    )
    keep_incomplete: bool = option("Keep a study when some, not all, of its images are missing or unreadable.", False)
    strict: bool = option("End with an error at the first study that would be skipped.", False)
    parquet_only: bool = option("Leave out the Arrow files of load_from_disk, and with them half of the size.", False)
    studies_per_shard: int = option("Studies in a file.", 500, metavar="N")
    num_proc: int = option("Processes.", 1, metavar="N")

    def __post_init__(self):
        if self.sections not in SECTIONS:
            raise ValueError(f"sections={self.sections!r}: expected one of {', '.join(SECTIONS)}")
        for name in ("limit", "shorter_side", "studies_per_shard", "num_proc"):
            value = getattr(self, name)
            least = 16 if name == "shorter_side" else 1
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more")


@dataclass
class BuildReport:
    """What a build kept and left out.

    Args:
        folder: the dataset.
        counts: by split; those of studies whose split is not known are under None.
        warnings: where the counts are not those the collection was published with.
        licences: of the studies kept.
        skipped: lines of `skipped.jsonl`.
    """

    folder: Path
    counts: dict[str | None, SplitCounts] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)
    skipped: int = 0

    def __str__(self) -> str:
        lines = [format_counts(self.counts), ""]
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.skipped:
            lines.append(f"skipped: {self.skipped:,} faults, each with its reason in {self.folder / SKIPPED}")
        return "\n".join([*lines, f"dataset: {self.folder}"])


class _Job(NamedTuple):
    """A shard to be built: what was listed for it, and a digest of that."""

    split: str | None
    index: int
    items: list[StudyEntry | Skipped]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.items).encode("utf-8", "surrogatepass")).hexdigest()


class _Shard(NamedTuple):
    """A shard that is built; its file `NAME.json` holds this, and is written last."""

    split: str | None
    name: str
    digest: str
    rows: int
    counts: dict[str, int]
    licences: list[str]
    skipped: list[dict[str, Any]]


def build_studies_dataset(
    source: StudySource,
    output: str | os.PathLike,
    options: BuildOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> BuildReport:
    """Build the studies of a source into a folder that `load_from_disk` and `load_dataset` read.

    The folder holds Parquet shards under `data`, the same as Arrow files under the name of each split, a card,
    `summary.json` with the counts, and `skipped.jsonl` with each study that was left out and why.

    Args:
        source: where the studies come from.
        output: the folder. Until the build is whole there is only `OUTPUT.partial`.
        options: how to build.
        resume: go on with an interrupted build; shards whose studies are listed as they were are not built again, and
            a build that is whole is left as it is.
        overwrite: replace a dataset that is there, and start an interrupted build anew.

    Raises:
        OutputLockedError: another process builds this dataset.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
        ValueError: a fault of the source, no study is left, the folder is there, an interrupted build is there and
            neither `resume` nor `overwrite` says what is to become of it, or, if `strict`, any study is skipped.
    """
    options = options or BuildOptions()
    # Of a link, what it points to is replaced.
    output = Path(os.path.realpath(output))
    work = output.with_name(f"{output.name}.partial")
    with OutputLock(output):
        try:
            return _build_locked(source, output, work, options, resume, overwrite)
        except KeyboardInterrupt as stop:
            raise type(stop)(_kept(work)) from stop


def _kept(work: Path) -> str:
    """What an interrupted build has left, for people."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (work / _SHARDS).glob("*.json")]
    if not work.exists():
        return "nothing was built yet"
    count = sum(record["counts"]["studies"] + record["counts"]["skipped"] for record in records)
    return f"{count:,} studies in {len(records):,} whole shards are kept in {work}; --resume goes on with the others"


def _build_locked(
    source: StudySource, output: Path, work: Path, options: BuildOptions, resume: bool, overwrite: bool
) -> BuildReport:
    settings = _settings(source, options)
    if resume and (output / SUMMARY).is_file():
        return _finished(output, settings)
    check_output(output, overwrite)
    # Listed first: a fault of the source as a whole leaves nothing behind.
    listing = StudyListing(source, options.limit)
    # What was published of these collections are the studies with findings.
    comparable = options.limit is None and options.sections == "findings"
    official = OfficialCheck(source) if comparable else None
    _enter(work, settings, resume, overwrite)
    shards = []
    jobs = _jobs(listing, official, options.studies_per_shard)
    # Closed after an interruption, so that no process builds on when the lock is given back.
    with (
        tqdm(total=listing.total, unit="study", desc=source.name, disable=None) as bar,
        closing(_build(jobs, source, options, work)) as built,
    ):
        for shard in built:
            shards.append(shard)
            bar.update(shard.counts["studies"] + shard.counts["skipped"])
    # Processes end in any order.
    shards.sort(key=lambda shard: ((*SPLITS, None).index(shard.split), shard.name))
    if not any(shard.rows for shard in shards):
        shutil.rmtree(work)
        raise ValueError(_nothing_left(source, shards))
    report = _report(output, shards, official)
    _write_lines(work / SKIPPED, (fault for shard in shards for fault in shard.skipped))
    card = dataset_card(source, report.counts, options.sections, report.licences)
    write_text(work / "README.md", card)
    kept = [(shard.split, shard.name) for shard in shards if shard.rows]
    publish_shards(work / _SHARDS, work, kept, digest=_digest(shards, options))
    _write_summary(work / SUMMARY, settings, report)
    shutil.rmtree(work / _SHARDS)
    (work / _SETTINGS).unlink()
    put_in_place(output, work)
    return report


def _report(output: Path, shards: list[_Shard], official: OfficialCheck | None) -> BuildReport:
    report = BuildReport(output, licences=sorted({licence for shard in shards for licence in shard.licences}))
    left_out: dict[str, list[str]] = {}
    for shard in shards:
        report.counts.setdefault(shard.split, SplitCounts()).merge(SplitCounts(**shard.counts))
        report.skipped += len(shard.skipped)
        if shard.split:
            left_out.setdefault(shard.split, []).extend(fault["id"] for fault in shard.skipped if not fault["kept"])
    if official is not None:
        report.warnings = official.warnings(report.counts, left_out)
    return report


def _write_summary(path: Path, settings: dict[str, Any], report: BuildReport) -> None:
    counts = {split or "none": asdict(counts) for split, counts in report.counts.items()}
    content = {"licences": report.licences, "counts": counts, "warnings": report.warnings, "skipped": report.skipped}
    write_json(path, {"settings": settings, **content})


def _finished(output: Path, settings: dict[str, Any]) -> BuildReport:
    """The report of a build that is whole, provided that it is this one."""
    summary = _read_json(output / SUMMARY)
    WorkSettings(output, settings).check(summary["settings"])
    counts = {None if split == "none" else split: SplitCounts(**counts) for split, counts in summary["counts"].items()}
    return BuildReport(output, counts, summary["warnings"], summary["licences"], summary["skipped"])


def _settings(source: StudySource, options: BuildOptions) -> dict[str, Any]:
    build = {name: value for name, value in asdict(options).items() if name not in ("num_proc", "strict")}
    settings = {"source": source.name, **{f"source.{name}": value for name, value in asdict(source).items()}, **build}
    # Through JSON, so that they compare with what is read of a file.
    return json.loads(json.dumps(settings, default=str))


def _enter(work: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make the working folder, or check that the one that is there is of this build."""
    if work.exists():
        if overwrite:
            shutil.rmtree(work)
        elif not resume:
            raise ValueError(
                f"{work} is an interrupted build: --resume goes on with it, --overwrite starts anew and deletes it"
            )
        else:
            WorkSettings(work, settings).check(_read_json(work / _SETTINGS))
            # Of a build that was cut off while its shards were being put in their places.
            for path in work.iterdir():
                if path.is_dir() and path.name != _SHARDS:
                    shutil.rmtree(path)
    (work / _SHARDS).mkdir(parents=True, exist_ok=True)
    write_json(work / _SETTINGS, settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        raise ValueError(f"{path} is missing or damaged: --overwrite starts the build anew") from None


def _jobs(listing: StudyListing, official: OfficialCheck | None, size: int) -> Iterator[_Job]:
    """Cut the listing into shards, each of one split."""
    buffers: dict[str | None, list] = {}
    built: dict[str | None, int] = {}
    for item in listing:
        if official is not None:
            official.see(item)
        buffer = buffers.setdefault(item.split, [])
        buffer.append(item)
        if len(buffer) == size:
            yield _Job(item.split, built.get(item.split, 0), buffer)
            built[item.split] = built.get(item.split, 0) + 1
            buffers[item.split] = []
    for split, buffer in buffers.items():
        if buffer:
            yield _Job(split, built.get(split, 0), buffer)


def _build(jobs: Iterable[_Job], source: StudySource, options: BuildOptions, work: Path) -> Iterator[_Shard]:
    """Build the shards, at most two for each process waiting, so that memory does not grow with their number."""
    folder = work / _SHARDS
    if options.num_proc == 1:
        for job in jobs:
            yield _build_shard(job, source, options, folder)
        return
    # Forking a process that has Arrow's threads can hang.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        options.num_proc,
        mp_context=context,
        initializer=_start_process,
        initargs=(os.getpid(), stop, source, options, folder),
    )
    running: set[Future] = set()
    try:
        for job in jobs:
            running.add(pool.submit(_build_in_process, job))
            if len(running) == 2 * options.num_proc:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise ValueError(
            f"a process of the build was killed (out of memory?): fewer --num-proc and --resume go on with {work}"
        ) from None
    finally:
        # Shards that are being built are given up after an error or an interruption.
        stop.set()
        pool.shutdown(cancel_futures=True)


_process: tuple[StudySource, BuildOptions, Path]
_stop: Event


def _start_process(parent: int, stop: Event, *state) -> None:
    global _process, _stop
    # Ctrl-C reaches all processes of a terminal: the parent, which says what is kept, ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)
    _process, _stop = state, stop


def _build_in_process(job: _Job) -> _Shard:
    return _build_shard(job, *_process, stopped=_stop.is_set)


def _build_shard(
    job: _Job,
    source: StudySource,
    options: BuildOptions,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> _Shard:
    """Build one shard, or take it as it is if it was built of the same list before."""
    digest, record = job.digest, folder / f"{job.name}.json"
    before = _built(record, digest)
    if before is not None:
        return before
    image_form = partial(stored_image, shorter_side=options.shorter_side)
    counts, licences, skipped = SplitCounts(), set(), []

    def skip(fault: Skipped, kept: bool) -> None:
        if options.strict:
            raise ValueError(f"study {fault.id}, {fault.split or 'no split'}: {fault.kind}: {fault.reason}")
        skipped.append({**fault._asdict(), "kept": kept})

    with ShardWriter(folder / job.name, arrow=not options.parquet_only) as writer:
        for item in job.items:
            if stopped():
                raise CancelledError
            if isinstance(item, Skipped):
                counts.add_skipped(item)
                skip(item, kept=False)
                continue
            assembled = assemble_study(source, item, image_form, options.sections, options.keep_incomplete)
            counts.add(assembled)
            for fault in assembled.faults:
                skip(fault, kept=assembled.row is not None)
            if assembled.row is not None:
                writer.write(assembled.row)
                licences.add(assembled.row["licence"])
    shard = _Shard(job.split, job.name, digest, counts.studies, asdict(counts), sorted(licences), skipped)
    write_json(record, shard._asdict())
    return shard


def _built(record: Path, digest: str) -> _Shard | None:
    if not record.is_file():
        return None
    try:
        shard = read_json(record, parse=lambda content: _Shard(**content))
    except ValueError:
        return None
    whole = shard.rows == 0 or record.with_suffix(".parquet").is_file()
    return shard if shard.digest == digest and whole else None


def _digest(shards: list[_Shard], options: BuildOptions) -> str:
    """A digest of what was built: `datasets` tells its caches apart by it."""
    content = [(shard.name, shard.digest, shard.counts) for shard in shards]
    return hashlib.sha256(repr((content, options.sections, options.shorter_side)).encode()).hexdigest()


def _nothing_left(source: StudySource, shards: list[_Shard]) -> str:
    faults = [fault for shard in shards for fault in shard.skipped]
    if not faults:
        return f"source {source.name!r} holds no studies"
    first = faults[0]
    return (
        f"no study is left: all {len(faults):,} were skipped, the first ({first['id']}) for {first['kind']}: "
        f"{first['reason']}"
    )


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    # As in `write_json`.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


__all__ = ["SKIPPED", "BuildOptions", "BuildReport", "build_studies_dataset"]
