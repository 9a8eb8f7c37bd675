"""Prepare studies with the executors of datatrove: on processes of this machine, on Slurm or on Ray.

Each task of an executor builds one share of the dataset, as `otdrg prepare --shard` does, and is marked as completed in
its `logging_dir`: when the script is run again, only the other tasks run. See `examples/prepare_with_datatrove.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .build import BuildOptions, BuildReport, ShareReport, build_share, merge_shares
from .shards import Share
from .source import StudySource

try:
    from datatrove.data import DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger
except ImportError as error:
    raise ImportError(
        f"otdrg.studies.distributed needs datatrove ({error}): pip install 'otdrg[distributed]'"
    ) from error


class _Step(PipelineStep):
    """A step on the studies of a source; it passes on the documents of a pipeline unchanged.

    Args:
        source: source of the studies; tasks get pickled copies.
        output: the folder of the dataset, which all tasks can write to.
        options: options of the build, the same in all steps.
    """

    type = "STUDIES"

    def __init__(self, source: StudySource, output: str | os.PathLike, options: BuildOptions | None = None):
        super().__init__()
        self.source = source
        # Tasks may run in another folder.
        self.output = os.path.abspath(output)
        self.options = options or BuildOptions()

    def report(self, result: BuildReport | ShareReport) -> None:
        """Add counts to the statistics of the executor, and the report to the log of the task."""
        for counts in result.counts.values():
            self.stat_update("studies", value=counts.studies, unit="task")
            self.stat_update("skipped", value=counts.skipped, unit="task")
        logger.info(f"\n{result}")


class BuildShare(_Step):
    """Build the share of a task: task 0 of 8 builds share 1/8."""

    name = "build a share"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator:
        yield from data or ()
        self.report(build_share(self.source, self.output, Share(rank + 1, world_size), self.options))


class MergeShares(_Step):
    """Put together the shares of all tasks of [`BuildShare`]; for an executor with one task, which runs after them."""

    name = "merge the shares"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator:
        yield from data or ()
        if world_size != 1:
            raise ValueError(f"MergeShares is run by {world_size} tasks: expected an executor with tasks=1")
        self.report(merge_shares(self.source, self.output, self.options))


__all__ = ["BuildShare", "MergeShares"]
