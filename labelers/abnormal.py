"""What is abnormal: states with a positive or unclear finding, and the sentences of reports that state one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from ..findings_otdrg import FINDINGS, NO_FINDING, POSITIVE, UNCLEAR
from .as_typed import label_quietly
from .sentences import split_sentences

logger = logging.getLogger(__name__)

#: Begin and end of each abnormal sentence in a report, in characters.
Spans = list[tuple[int, int]]


def is_abnormal(states: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """For each row of 14 states, whether a finding is positive or unclear; "no finding" does not count. (N,)"""
    return np.isin(np.asarray(states).reshape(-1, len(FINDINGS))[:, :NO_FINDING], (POSITIVE, UNCLEAR)).any(axis=1)


def abnormal_sentences(reports: Sequence[str], labeler) -> dict[str, Spans]:
    """Where the sentences are in which the labeler reads a positive or unclear finding.

    Args:
        reports: texts, split into sentences as the labeler `rules` does it.
        labeler: reads each sentence by itself.

    Returns:
        By report, the spans of its abnormal sentences with the punctuation after them; reports without any are omitted.
    """
    split = {report: [sentence for sentence in split_sentences(report) if sentence.strip()] for report in set(reports)}
    sentences = sorted({sentence for found in split.values() for sentence in found})
    abnormal = {
        sentence
        for sentence, is_one in zip(sentences, is_abnormal(label_quietly(labeler, sentences)), strict=True)
        if is_one
    }
    found: dict[str, Spans] = {}
    lost = 0
    for report, parts in split.items():
        if abnormal.isdisjoint(parts):
            continue
        position, spans = 0, []
        for sentence in parts:
            span = _find(sentence, report, position)
            if span is not None:
                position = span[1]
            if sentence in abnormal:
                spans += [span] if span is not None else []
                lost += span is None
        if spans:
            found[report] = spans
    if lost:
        logger.warning("%d abnormal sentences are not found in their reports as they are written: weight 1", lost)
    logger.info("abnormal sentences: in %d of %d distinct reports", len(found), len(split))
    return found


def _find(sentence: str, report: str, position: int) -> tuple[int, int] | None:
    """The span of a sentence from `position` on, whatever the spaces and punctuation between its words.

    The head of a list stands before each of its items in `sentence`, and once in `report`: first words that are not
    there are left out.
    """
    words = re.findall(r"\w+", sentence)
    for first in range(len(words)):
        pattern = r"\W+".join(map(re.escape, words[first:]))
        match = re.compile(rf"\b{pattern}\b\W*", re.IGNORECASE).search(report, position)
        if match is not None:
            return match.span()
    return None


__all__ = ["Spans", "abnormal_sentences", "is_abnormal"]
