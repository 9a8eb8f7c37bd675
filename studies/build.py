"""Build a dataset of studies on disk: in shards, by several processes, so that an interrupted build can continue.

The dataset is built in `OUTPUT.partial`, which becomes `OUTPUT` in one step when it is complete. Long, because the
steps of a build, from the options to the last shard, depend on each other's files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..files_otdrg import read_json, write_json, write_text
from ..runtime.interruptions import end_with_parent
from ..runtime.output_lock import OutputLock
from ..sections_otdrg import HEADINGS
from .assembly import SECTIONS, Sections, StudyListing, assemble_study, check_sections
from .card import dataset_card
from .images import stored_image
from .shards import SUMMARY, Share, WorkFolder, row_batches, write_shard
from .source import SPLITS, Skipped, StudyEntry, StudySource, option
from .summary import OfficialCheck, SplitCounts, format_counts

#: Each skipped study and the reason.
SKIPPED = "skipped.jsonl"

#: Options of a build that do not determine the content of the dataset.
_NOT_CONTENT = ("num_proc", "strict")


@dataclass
class BuildOptions:
    """Options of a build that do not depend on the source."""

    sections: Sections = option(
        "What the report consists of; both sections are below headings, and the model returns them apart.", "findings"
    )
    limit: int | None = option("Take at most this many studies of each split, from its start.", None, metavar="N")
    shorter_side: int | None = option(
        "Scale down images whose shorter side is longer than this.", None, metavar="PIXELS"
    )
    keep_incomplete: bool = option("Keep a study if some, not all, of its images are missing or unreadable.", False)
    priors: bool = option(
        "Add the nearest earlier study of the patient to each study, with its images and report, for sources that say "
        "when studies were made. The dataset is up to twice as large.",
        False,
    )
    strict: bool = option("Stop with an error at the first study that would be skipped.", False)
    parquet_only: bool = option(
        "Do not write the Arrow files of load_from_disk, which double the size; writing them needs disk space for "
        "three times the size.",
        False,
    )
    studies_per_shard: int = option("Studies in a file.", 500, metavar="N")
    num_proc: int = option("Number of processes.", 1, metavar="N")

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
    """What a build kept and what it skipped.

    Args:
        folder: the dataset.
        counts: counts by split; those of studies with an unknown split are under None.
        warnings: differences from the counts the collection was published with.
        licences: licences of the studies kept.
        skipped: number of lines of `skipped.jsonl`.
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

    def summary(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The content of `summary.json`, from which [`from_summary`] restores the report."""
        counts = {split or "none": asdict(counts) for split, counts in self.counts.items()}
        content = {"licences": self.licences, "counts": counts, "warnings": self.warnings, "skipped": self.skipped}
        return {"settings": settings, **content}

    @classmethod
    def from_summary(cls, folder: Path, summary: dict[str, Any]) -> BuildReport:
        counts = {None if name == "none" else name: SplitCounts(**row) for name, row in summary["counts"].items()}
        return cls(folder, counts, summary["warnings"], summary["licences"], summary["skipped"])


@dataclass
class ShareReport:
    """What one share of a build kept and what it skipped.

    Args:
        folder: the unfinished dataset.
        share: the share.
        counts: counts of the share by split, as in [`BuildReport`].
        skipped: number of faults of the share, which are listed when the shares are put together.
        files: number of files of the share.
        all_files: number of files of all shares.
    """

    folder: Path
    share: Share
    counts: dict[str | None, SplitCounts]
    skipped: int
    files: int
    all_files: int

    def __str__(self) -> str:
        if not self.files:
            return (
                f"shard {self.share}: nothing to do, because there are only {self.all_files:,} files "
                "(--studies-per-shard sets the studies in a file)"
            )
        lines = [format_counts(self.counts), ""]
        if self.skipped:
            lines.append(f"skipped: {self.skipped:,} faults, which --merge lists with their reasons")
        lines.append(f"shard {self.share}: {self.files:,} of {self.all_files:,} files, in {self.folder}")
        return "\n".join(lines)


class _Job(NamedTuple):
    """A shard to be built from these listed studies."""

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
    """A finished shard: the content of its file `NAME.json`, which is written last."""

    split: str | None
    name: str
    digest: str
    counts: dict[str, int]
    licences: list[str]
    skipped: list[dict[str, Any]]

    @property
    def rows(self) -> int:
        return self.counts["studies"]


def build_studies_dataset(
    source: StudySource,
    output: str | os.PathLike,
    options: BuildOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> BuildReport:
    """Write the studies of a source to a folder that `load_from_disk` and `load_dataset` read.

    The folder holds Parquet files in `data`, the same studies as Arrow files in a folder for each split, a card,
    `summary.json` with the counts, and `skipped.jsonl` with each skipped study and the reason.

    Args:
        source: source of the studies.
        output: the folder. Until the build is complete only `OUTPUT.partial` exists.
        options: options of the build.
        resume: continue an interrupted build: shards whose listed studies have not changed are kept, and a complete
            build is not changed.
        overwrite: replace an existing dataset and, without `resume`, delete an interrupted build.

    Raises:
        OutputLockedError: another process builds this dataset.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
        ValueError: an error of the source, no study is left, the folder exists, an interrupted build exists and
            neither `resume` nor `overwrite` is set, or, with `strict`, a study would be skipped.
    """
    options = options or BuildOptions()
    work = _work(source, output, options)
    how = f"--resume{' --overwrite' if overwrite else ''} continues"
    with OutputLock(work.output), _says_what_is_kept(work, how):
        if resume and (report := _finished(work, overwrite)) is not None:
            return report
        work.check_output(overwrite)
        # Listed first: an error of the source leaves no files.
        listing, official = StudyListing(source, options.limit, options.priors), _official(source, options)
        work.enter(resume, overwrite)
        jobs = _jobs(listing, official, options.studies_per_shard)
        shards = _run(jobs, listing.total, source, options, work)
        return _publish(shards, official, source, options, work)


def build_share(
    source: StudySource, output: str | os.PathLike, share: Share, options: BuildOptions | None = None
) -> ShareReport | BuildReport:
    """Build a share of the files of a dataset in `OUTPUT.partial`; [`merge_shares`] makes the dataset of all shares.

    Shares can be built at the same time, in any order and on any machine that has this folder. A share that was
    interrupted is continued, and one that is complete is not changed.

    Args:
        source: source of the studies.
        output: the folder of the dataset.
        share: which share.
        options: options of the build, the same for all shares.

    Returns:
        The counts of the share, or the report of the dataset if all shares have been put together before.

    Raises:
        OutputLockedError: another process builds this share or puts the shares together.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
        ValueError: an error of the source, the folder exists or was begun with other options, or, with `strict`, a
            study would be skipped.
    """
    options = options or BuildOptions()
    work = _work(source, output, options, shared=True)
    listing = StudyListing(source, options.limit, options.priors)
    files = 0

    def jobs() -> Iterator[_Job]:
        nonlocal files
        for job in _jobs(listing, None, options.studies_per_shard):
            if share.has(files):
                yield job
            files += 1

    def finished() -> BuildReport | None:
        report = _finished(work, overwrite=False)
        if report is None:
            work.check_output(overwrite=False)
        return report

    with _says_what_is_kept(work, "the same command continues"), work.join(share, finished) as dataset:
        if dataset is not None:
            return dataset
        shards = _run(jobs(), None, source, options, work)
    report = _report(work.path, shards, None)
    return ShareReport(work.path, share, report.counts, report.skipped, len(shards), files)


def merge_shares(source: StudySource, output: str | os.PathLike, options: BuildOptions | None = None) -> BuildReport:
    """Put together the shares that [`build_share`] has built; the dataset is the one of [`build_studies_dataset`].

    Args:
        source, output, options: as for the shares.

    Raises:
        OutputLockedError: another process builds one of the shares.
        ValueError: a share is missing or not finished, or the shares were built from another source or with other
            options.
    """
    options = options or BuildOptions()
    work = _work(source, output, options, shared=True)
    with OutputLock(work.output), _says_what_is_kept(work, "--merge continues"):
        if (report := _finished(work, overwrite=False)) is not None:
            return report
        work.check_output(overwrite=False)
        listing, official = StudyListing(source, options.limit, options.priors), _official(source, options)
        count = work.end_shares()
        jobs = _jobs(listing, official, options.studies_per_shard)
        shards = [_built(work.shards / f"{job.name}.json", job.digest) for job in jobs]
        work.check_shares([position for position, shard in enumerate(shards) if shard is None], count)
        return _publish(_in_order(shards), official, source, options, work)


def _work(source: StudySource, output: str | os.PathLike, options: BuildOptions, shared: bool = False) -> WorkFolder:
    check_sections(source, options.sections)
    defaults = {**_defaults(source, "source."), **_defaults(options)}
    # If the output is a link, its target is replaced.
    return WorkFolder(Path(os.path.realpath(output)), _settings(source, options), "build", shared, defaults)


@contextmanager
def _says_what_is_kept(work: WorkFolder, how: str) -> Iterator[None]:
    """Say in the message of an interruption what is kept, and how to continue."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not work.path.exists():
            raise type(stop)("nothing was built yet") from stop
        counts = [read_json(path)["counts"] for path in work.shards.glob("*.json")]
        studies = sum(count["studies"] + count["skipped"] for count in counts)
        kept = f"{studies:,} studies in {len(counts):,} complete shards are kept in {work.path}"
        raise type(stop)(f"{kept}; {how}") from stop


def _official(source: StudySource, options: BuildOptions) -> OfficialCheck | None:
    """The comparison with the published counts."""
    return OfficialCheck(source, kept=options.sections == "findings") if options.limit is None else None


def _run(
    jobs: Iterator[_Job], total: int | None, source: StudySource, options: BuildOptions, work: WorkFolder
) -> list[_Shard]:
    """Build shards and show progress; `total` is the number of their studies."""
    shards = []
    # Closed after an interruption, so that no process is building when the lock is released.
    with (
        tqdm(total=total, unit="study", desc=source.name, disable=None) as bar,
        closing(_build(jobs, source, options, work.shards)) as built,
    ):
        for shard in built:
            shards.append(shard)
            bar.update(shard.counts["studies"] + shard.counts["skipped"])
    return _in_order(shards)


def _in_order(shards: list[_Shard]) -> list[_Shard]:
    """Shards in the order of the dataset; processes finish in any order."""
    return sorted(shards, key=lambda shard: ((*SPLITS, None).index(shard.split), shard.name))


def _publish(
    shards: list[_Shard], official: OfficialCheck | None, source: StudySource, options: BuildOptions, work: WorkFolder
) -> BuildReport:
    """Make the dataset of all shards."""
    if not any(shard.rows for shard in shards):
        shutil.rmtree(work.path)
        raise ValueError(_nothing_left(source, shards))
    report = _report(work.output, shards, official)
    # Reasons may quote text that is not UTF-8.
    with (work.path / SKIPPED).open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(fault, ensure_ascii=False) + "\n" for shard in shards for fault in shard.skipped)
    write_text(work.path / "README.md", dataset_card(source, report.counts, options.sections, report.licences))
    files = [(shard.split, work.shards / f"{shard.name}.parquet") for shard in shards if shard.rows]
    work.publish(files, report.summary(work.settings), arrow=not options.parquet_only)
    return report


def _finished(work: WorkFolder, overwrite: bool) -> BuildReport | None:
    """The report of the complete dataset; None if it is not complete, or is to be replaced by another one."""
    if not work.finished(overwrite):
        return None
    try:
        summary = read_json(work.output / SUMMARY)
        work.check_settings(work.output, summary["settings"])
    except ValueError:
        if overwrite:
            return None
        raise
    return BuildReport.from_summary(work.output, summary)


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


def _settings(source: StudySource, options: BuildOptions) -> dict[str, Any]:
    build = {name: value for name, value in asdict(options).items() if name not in _NOT_CONTENT}
    if "+" in options.sections:
        # An older version wrote no headings: its shards are not continued with shards that have them.
        build["headings"] = list(HEADINGS.values())
    return {"source": source.name, **{f"source.{name}": value for name, value in asdict(source).items()}, **build}


def _defaults(options: Any, prefix: str = "") -> dict[str, Any]:
    """The options that have a default, for the settings of a dataset that was made before an option existed."""
    values = {
        option.name: option.default if option.default_factory is MISSING else option.default_factory()
        for option in fields(options)
        if option.name not in _NOT_CONTENT
    }
    return {f"{prefix}{name}": value for name, value in values.items() if value is not MISSING}


def _jobs(listing: StudyListing, official: OfficialCheck | None, size: int) -> Iterator[_Job]:
    """Divide the listing into shards, each of one split."""
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


def _build(jobs: Iterable[_Job], source: StudySource, options: BuildOptions, folder: Path) -> Iterator[_Shard]:
    """Build the shards; at most two jobs for each process wait, so that memory does not grow with their number."""
    if options.num_proc == 1:
        for job in jobs:
            yield _build_shard(job, source, options, folder)
        return
    # Forking a process that has Arrow's threads can deadlock.
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
            "a process of the build was killed (out of memory?): continue with a smaller --num-proc and --resume"
        ) from None
    finally:
        # After an error or an interruption, unfinished shards are abandoned.
        stop.set()
        pool.shutdown(cancel_futures=True)


_process: tuple[StudySource, BuildOptions, Path]
_stop: Event


def _start_process(parent: int, stop: Event, *state) -> None:
    global _process, _stop
    # Ctrl-C is sent to all processes of a terminal; the parent handles it and ends this one.
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
    """Build one shard, unless it was built from the same list before."""
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

    def rows() -> Iterator[dict]:
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
                licences.add(assembled.row["licence"])
                yield assembled.row

    write_shard(record.with_suffix(".parquet"), row_batches(rows()))
    shard = _Shard(job.split, job.name, digest, asdict(counts), sorted(licences), skipped)
    write_json(record, shard._asdict())
    return shard


def _built(record: Path, digest: str) -> _Shard | None:
    try:
        shard = read_json(record, parse=lambda content: _Shard(**content))
    except (OSError, ValueError):
        return None
    complete = shard.rows == 0 or record.with_suffix(".parquet").is_file()
    return shard if shard.digest == digest and complete else None


def _nothing_left(source: StudySource, shards: list[_Shard]) -> str:
    faults = [fault for shard in shards for fault in shard.skipped]
    if not faults:
        return f"source {source.name!r} holds no studies"
    first = faults[0]
    return (
        f"no study is left: all {len(faults):,} were skipped, the first ({first['id']}) for {first['kind']}: "
        f"{first['reason']}"
    )
