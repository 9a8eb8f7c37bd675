"""Share items of work among processes that were launched together, each with a journal, so that a killed command can
continue with any number of processes and write the same."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from .interruptions import error_line
from .journal import Journal, WorkSettings, append_rows
from .output_lock import OutputLock

Value = TypeVar("Value")
Row = dict[str, Any]

#: Variables of launchers that start several processes.
_SEVERAL = ("RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

#: Whether the other processes have ended, see [`continue_alone`].
_alone = False


class SharedWorkError(ChildProcessError):
    """Another process failed or was ended; raised in all that are left."""


class SharedBugError(RuntimeError):
    """An error of the program itself in one of the processes, with its traceback; raised in all."""


class _Finished(Exception):
    """This process has done its share."""


# --- processes -------------------------------------------------------------------------------------------------------


def launched_processes() -> int:
    """The number of processes that `accelerate launch` or torchrun started together.

    Raises:
        ValueError: `accelerate launch` was asked for several and started one.
    """
    # `accelerate launch` sets these two for several processes, ACCELERATE_USE_CPU where it starts just one itself.
    asked = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    if asked and not any(name in os.environ for name in _SEVERAL):
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu and, where there "
            "is no GPU, without --multi_gpu: use --config_file recipes/accelerate/cpu.yaml, or --num_processes 1"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_place() -> tuple[int, int]:
    """The index of this process, and the number of processes. They are joined by `devices.join_processes`."""
    distributed = sys.modules.get("torch.distributed")  # not imported here: torch takes seconds
    if _alone or distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def exchange(value: Value, fault: tuple[str | None, str] | None = None) -> list[Value]:
    """The values of all processes, in their order; every process must call it.

    Args:
        value: of this process, which can be pickled.
        fault: the line and the traceback of the error that ends this process.

    Raises:
        SharedWorkError, SharedBugError: a process failed, or was killed.
    """
    count = process_place()[1]
    if count == 1:
        return [value]
    gathered: list[Any] = [None] * count
    try:
        sys.modules["torch.distributed"].all_gather_object(gathered, (value, fault))
    except RuntimeError as error:
        raise SharedWorkError(
            "one of the processes was ended from outside: what was finished is kept, and the command can continue"
        ) from error
    for _, found in gathered:
        if found is not None:
            line, trace = found
            # An error of the program itself keeps its traceback.
            raise SharedBugError(f"in one of the processes:\n{trace}") if line is None else SharedWorkError(line)
    return [value for value, _ in gathered]


def by_main_process(act: Callable[[], Value]) -> Value:
    """What the main process finds; every process must call it, and all get the value or the error."""
    return exchange(act() if process_place()[0] == 0 else None)[0]  # type: ignore[return-value]


def continue_alone() -> None:
    """End all processes but the main one, successfully: the rest of the command is for one process."""
    global _alone
    index, count = process_place()
    if count > 1:
        exchange(None)
        _alone = True
    if index > 0:
        raise _Finished


def run_together(run: Callable[[], None]) -> None:
    """Run a command in each of the processes. An error in one ends all of them, and all raise it."""
    global _alone
    _alone = False
    try:
        try:
            run()
            exchange(None)
        except (_Finished, SharedWorkError, SharedBugError):
            raise
        except Exception as error:
            exchange(None, (error_line(error), traceback.format_exc()))
            raise
    except _Finished:
        pass
    except (SharedWorkError, SharedBugError):
        _wait_for_main_process()
        raise
    finally:
        _alone = False


def leave_processes() -> None:
    """Close the connections to the other processes: if they stay open, their threads may crash the process at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _wait_for_main_process() -> None:
    """Wait until the main process has left: a launcher kills it as soon as another one fails, before it prints why."""
    if process_place()[0] > 0:
        with suppress(RuntimeError):
            sys.modules["torch.distributed"].barrier()


@contextmanager
def shared_lock(output: str | os.PathLike) -> Iterator[None]:
    """Hold an [`OutputLock`], which the main process takes for all; every process must enter it."""
    with ExitStack() as held:
        by_main_process(lambda: held.enter_context(OutputLock(output)) and None)
        yield


# --- work ------------------------------------------------------------------------------------------------------------


def fixed_blocks(count: int, size: int) -> list[list[int]]:
    """The positions below `count` in blocks of at most `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def share_work(
    ids: Sequence[str],
    blocks: Sequence[Sequence[int]],
    work: Callable[[Sequence[Sequence[int]]], Iterable[Sequence[Row]]],
    journal: Path | None = None,
    check: Callable[[Row], Any] | None = None,
    even: bool = False,
    progress: str | None = None,
    hidden: bool | None = None,
) -> dict[str, Row]:
    """Do the work of all items, divided among the processes; every process must call it, and all get all rows.

    A block is worked on by one process, as a whole and always with the same items, also where some of them are in the
    journal: what is found for an item may depend on the others of its batch, in the last digits. So the rows do not
    depend on the number of processes or on interruptions.

    Args:
        ids: of the items, each once.
        blocks: positions of the items that are worked on together.
        work: gives, for each of the blocks of this process in their order, the rows of its items, with their `id`. An
            item without a row is tried again by the next command.
        journal: `.jsonl` file of the rows, in the order of the items in the end. Each process adds rows as they are
            found, all but the main one to a file of their own beside it. Rows in these files are not found again, and
            those of other items are kept.
        check: raises a `ValueError`, `KeyError` or `TypeError` for a row of the journal that is not of this work.
        even: give all processes equally many blocks, some twice: with sharded weights they wait for each other.
        progress, hidden: of the progress bar of the main process; without `progress` there is none.

    Returns:
        The rows by id, in the order of the items.

    Raises:
        ValueError: a damaged journal.
        SharedWorkError: another process failed.
    """
    known = {} if journal is None else by_main_process(lambda: merge_journals(journal, check=check))
    index, count = process_place()
    pending = [block for block in blocks if any(ids[place] not in known for place in block)]
    mine = pending[index::count]
    if even and pending:
        mine = [pending[(index + turn * count) % len(pending)] for turn in range(-(-len(pending) // count))]
    found: dict[str, Row] = {}
    hidden = True if progress is None or index > 0 else hidden
    with (
        tqdm(total=sum(map(len, mine)), desc=progress, unit="study", disable=hidden) as bar,
        _stopping(journal) as stop,
    ):
        for block, rows in zip(mine, work(mine), strict=True):
            new = [row for row in rows if row["id"] not in known and row["id"] not in found]
            found |= {row["id"]: row for row in new}
            if journal is not None:
                append_rows(_part(journal, index) if index else journal, new)
            bar.update(len(block))
            if stop():
                break
    try:
        gathered = exchange(found)
    finally:
        if journal is not None and index == 0:
            _stop_file(journal).unlink(missing_ok=True)
    for rows_by_id in gathered:
        known |= rows_by_id
    if journal is not None and process_place()[0] == 0:
        merge_journals(journal, ids)
    return {item: known[item] for item in ids if item in known}


def read_journals(journal: Path) -> dict[str, Row]:
    """The rows, by id, of a journal, which need not exist, and of other processes' files beside it; none is changed.

    Raises:
        ValueError: a damaged line; the message names file and line.
    """
    return _rows_by_id([Journal(path) for path in (journal, *_parts(journal))])


def _rows_by_id(journals: Iterable[Journal], check: Callable[[Row], Any] | None = None) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for journal in journals:
        for number, row in enumerate(journal.rows, 1):
            try:
                item = row["id"]
                if check is not None:
                    check(row)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{journal.path}, line {number}: not a row of this work; delete the file to start again"
                ) from None
            rows.setdefault(item, row)
    return rows


def merge_journals(
    journal: Path, order: Sequence[str] = (), check: Callable[[Row], Any] | None = None
) -> dict[str, Row]:
    """The rows of [`read_journals`], which are merged into the journal; a line cut off is removed.

    Only for the main process, while no other writes.

    Args:
        journal: the file; it need not exist.
        order: ids in the order that their rows get; rows of other ids come first.
        check: as in [`share_work`].

    Raises:
        ValueError: as `read_journals`.
    """
    _stop_file(journal).unlink(missing_ok=True)
    parts = _parts(journal)
    journals = [Journal(path) for path in (journal, *parts)]
    rows = _rows_by_id(journals, check)
    before = [row["id"] for each in journals for row in each.rows]
    places = {item: place for place, item in enumerate(order)}
    rows = dict(sorted(rows.items(), key=lambda item: places.get(item[0], -1)))
    if parts or list(rows) != before or journals[0].cut_off:
        unfinished = journal.with_name(f"{journal.name}.tmp")
        unfinished.unlink(missing_ok=True)
        append_rows(unfinished, rows.values())
        unfinished.replace(journal)
        for path in parts:
            path.unlink()
    return rows


@contextmanager
def temporary_journal(
    journal: Path, settings: Callable[[], Row], overwrite: bool, how: str = "the same command"
) -> Iterator[Path]:
    """A journal that is deleted when the body is done, and found again by the next command if that was interrupted.

    Args:
        journal: the file; `NAME.settings.json` beside it holds the settings.
        settings: what the rows depend on; called by the main process.
        overwrite: start anew if the journal was made with other settings.
        how: what continues interrupted work, for the message.

    Raises:
        ValueError: the journal was made with other settings, or they are missing, without `overwrite`.
    """
    beside = journal.with_suffix(".settings.json")

    def begin() -> None:
        if not is_begun(journal):
            beside.unlink(missing_ok=True)
        work = WorkSettings(journal, settings(), ("model", "studies"))
        try:
            check_settings_file(journal, beside)
            work.keep(beside)
        except ValueError:
            if not overwrite:
                raise
            discard_journals(journal)
            beside.unlink(missing_ok=True)
            work.keep(beside)

    by_main_process(begin)
    try:
        yield journal
    except KeyboardInterrupt as stop:
        raise type(stop)(f"what was finished is kept in {journal}; {how} continues") from stop
    if process_place()[0] == 0:
        discard_journals(journal)
        beside.unlink(missing_ok=True)


def is_begun(journal: Path) -> bool:
    """Whether there is a journal, or one of another process beside it."""
    return journal.exists() or bool(_parts(journal))


def check_settings_file(journal: Path, settings: Path) -> None:
    """Raise a `ValueError` for a journal without the file of its settings: it may be a file of the user's own."""
    if is_begun(journal) and not settings.is_file():
        raise ValueError(
            f"{journal} has no {settings.name} beside it, with the settings of its rows: expected it, another "
            "--output, or --overwrite"
        )


def discard_journals(journal: Path) -> None:
    """Delete a journal and those of other processes beside it."""
    for path in (journal, *_parts(journal)):
        path.unlink(missing_ok=True)


def _part(journal: Path, index: int) -> Path:
    return journal.with_name(f".{journal.name}.part{index}")


def _parts(journal: Path) -> list[Path]:
    # Not by a pattern: the name may contain its characters.
    prefix = f".{journal.name}.part"
    folder = journal.parent.iterdir() if journal.parent.is_dir() else ()
    return sorted(path for path in folder if path.name.startswith(prefix) and path.name[len(prefix) :].isdecimal())


def _stop_file(journal: Path) -> Path:
    return journal.with_name(f".{journal.name}.stop")


@contextmanager
def _stopping(journal: Path | None) -> Iterator[Callable[[], bool]]:
    """A function that says whether another process has failed. An error in the body tells the others."""
    if journal is None or process_place()[1] == 1:
        yield lambda: False
        return
    stop = _stop_file(journal)
    try:
        yield stop.exists
    except Exception:
        journal.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
        raise


__all__ = [
    "SharedBugError",
    "SharedWorkError",
    "by_main_process",
    "check_settings_file",
    "continue_alone",
    "discard_journals",
    "exchange",
    "fixed_blocks",
    "is_begun",
    "launched_processes",
    "leave_processes",
    "merge_journals",
    "process_place",
    "read_journals",
    "run_together",
    "share_work",
    "shared_lock",
    "temporary_journal",
]
