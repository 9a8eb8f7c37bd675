"""Stream a report: first its growing text, then the pipeline's record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Event, Thread
from typing import Any

from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ...bank_otdrg import ReportBank
from ...pipeline_otdrg import ReportGenerationPipeline

#: Candidates of consensus decoding in a record, the report among them.
SHOWN_CANDIDATES = 5


def stream_report(
    pipe: ReportGenerationPipeline,
    views: Sequence[Image.Image],
    indication: str | None = None,
    findings: dict[str, str] | None = None,
    max_new_tokens: int | None = None,
    candidates: int = 1,
    bank: ReportBank | None = None,
) -> Iterator[str | dict[str, Any]]:
    """Stream the report of a study, decoded greedily: neither beam search nor consensus decoding can be streamed.

    Closing the iterator stops generation at the next token.

    Args:
        pipe: the model's pipeline.
        views: one or more views of the study.
        indication: why the study was made.
        findings: states to condition the report on, by finding; the others are predicted.
        max_new_tokens: maximum number of tokens of the report; by default the model's.
        candidates: samples of consensus decoding; 1 for greedy decoding.
        bank: of consensus decoding.

    Yields:
        The report so far (`str`), longer each time, unless there are candidates; finally the pipeline's record (`dict`)
        with `generated_text`, `findings`, `heatmaps` if the model has a transport plan, `contradictions` if it is
        conditioned on states, and the best `candidates`, if there are any.

    Raises:
        ValueError: refused by the pipeline, such as an unknown finding or state.
    """
    config = pipe.model.config
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    left, outcome = Event(), Future()
    arguments: dict[str, Any] = {"findings": findings, "max_new_tokens": max_new_tokens, "candidates": candidates}
    if candidates > 1:
        arguments |= {"bank": bank, "return_candidates": SHOWN_CANDIDATES}
    else:
        arguments |= {"num_beams": 1, "do_sample": False, "streamer": streamer}

    def write() -> None:
        try:
            records = pipe(
                {"images": list(views), "indication": indication},
                return_heatmaps=pipe.model.has_heatmaps,
                return_contradictions=config.dle,
                stopping_criteria=StoppingCriteriaList([_Left(left)]),
                **{name: value for name, value in arguments.items() if value is not None},
            )
            outcome.set_result(records[0])
        except Exception as error:  # any: raised again in the caller's thread
            outcome.set_exception(error)
        finally:
            streamer.on_finalized_text("", stream_end=True)  # otherwise an error would leave the stream open

    writer = Thread(target=write, daemon=True)
    writer.start()
    try:
        report = ""
        for words in streamer:
            report += words
            if words:
                yield report.strip()
        yield outcome.result()
    finally:
        left.set()
        writer.join()  # so that two reports are never written at once


class _Left(StoppingCriteria):
    """Stop generation when the caller has left."""

    def __init__(self, left: Event):
        self.left = left

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        return self.left.is_set()
