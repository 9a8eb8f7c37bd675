"""The queue of a server: one thread writes the reports of waiting studies, several at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..pipeline_otdrg import ReportGenerationPipeline
from .requests import Asked


@dataclass(eq=False)
class Job:
    """A report to be written.

    Args:
        asked: the study.
        put: called in the writer's thread with the growing report (`str`, if a stream is asked for), and at the end
            with the pipeline's record (`dict`) or an error.
        left: set when nobody waits for the report any more.
    """

    asked: Asked
    put: Callable[[str | dict[str, Any] | Exception], None]
    left: threading.Event = field(default_factory=threading.Event)


class ReportWriter:
    """Writes the reports of jobs in their order; those that can share a batch are written together.

    Args:
        pipe: the model's pipeline.
        arguments: of the pipeline, the server's way of decoding, with `max_new_tokens`.
        batch_size: most studies in a batch.
    """

    def __init__(self, pipe: ReportGenerationPipeline, arguments: dict[str, Any], batch_size: int = 8):
        self.pipe, self.arguments, self.batch_size = pipe, arguments, batch_size
        self._waiting: deque[Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="report-writer", daemon=True)
        self._thread.start()

    @property
    def samples(self) -> bool:
        """Whether reports can be sampled by temperature: not if each is chosen among candidates."""
        return "consensus" not in self.arguments

    @property
    def is_alive(self) -> bool:
        """Whether reports are still written."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Append a job to the queue."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Forget a job for which nobody waits any more, and stop its report unless its batch has others."""
        job.left.set()
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def close(self) -> None:
        """End the thread after the current batch; no other job is written."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next_batch():
            self._write([job for job in jobs if not job.left.is_set()])

    def _next_batch(self) -> list[Job]:
        """Wait for a job; take it and the next ones that can share its batch; empty after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            first = self._waiting[0]
            batch = [job for job in self._waiting if job is first or _same_batch(first.asked, job.asked)]
            batch = batch[: self.batch_size]
            for job in batch:
                self._waiting.remove(job)
            return batch

    def _write(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        try:
            records = self._records(jobs)
        except Exception as error:  # any: the server goes on
            if len(jobs) == 1:
                jobs[0].put(error)
                return
        else:
            for job, record in zip(jobs, records, strict=True):
                job.put(record)
            return
        # One study may be at fault, or the batch too large. Not in `except`: the error holds the batch's tensors.
        for job in jobs:
            self._write([job])

    def _records(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Write the reports of a batch."""
        asked, arguments = jobs[0].asked, dict(self.arguments)
        if asked.max_new_tokens is not None:
            arguments["max_new_tokens"] = min(asked.max_new_tokens, arguments["max_new_tokens"])
        if asked.sampling:
            arguments |= {"num_beams": 1, "do_sample": True, "top_k": 0, **asked.sampling}
        if self.samples and arguments["num_beams"] == 1 and any(job.asked.stream for job in jobs):
            arguments["streamer"] = _Streams(jobs, self.pipe.processor.batch_decode)
        with _seeded(asked.seed if asked.sampling else None):
            outputs = self.pipe(
                [{"images": job.asked.views, "indication": job.asked.indication} for job in jobs],
                batch_size=len(jobs),
                findings=asked.findings or None,
                # A model without conditioning states has nothing to contradict.
                return_contradictions=self.pipe.model.config.dle,
                stopping_criteria=StoppingCriteriaList([_AllLeft(jobs)]),
                **arguments,
            )
        return [record for (record, *_) in outputs]


def _same_batch(one: Asked, other: Asked) -> bool:
    """Whether two reports can be written in one batch, with the same text as alone."""
    if one.sampling or other.sampling:
        return False
    return (one.findings, one.max_new_tokens) == (other.findings, other.max_new_tokens)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers follow from the seed, and afterwards continue as before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Streams(BaseStreamer):
    """Gives each job its growing report, up to the last complete word, decoded as the pipeline decodes it."""

    def __init__(self, jobs: Sequence[Job], decode: Callable[..., list[str]]):
        self.jobs, self.decode = jobs, decode
        self.tokens: list[torch.Tensor] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.tokens is None:  # the prompts come first
            self.tokens = []
            return
        self.tokens.append(value)
        reports = self.decode(torch.stack(self.tokens, dim=1), skip_special_tokens=True)
        for job, report in zip(self.jobs, reports, strict=True):
            if job.asked.stream:
                *complete, _ = report.rsplit(maxsplit=1) or [""]  # the last word may grow
                job.put("".join(complete).lstrip())

    def end(self) -> None:
        pass


class _AllLeft(StoppingCriteria):
    """Stop generation when nobody waits for any report of the batch."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = jobs

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        return all(job.left.is_set() for job in self.jobs)


__all__ = ["Job", "ReportWriter"]
