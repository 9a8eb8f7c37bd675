"""Fluency of generated reports: BLEU-1..4, METEOR, ROUGE-L and CIDEr (paper, section 4.2), by pycocoevalcap.

The strings are scored as they are: clean them first (`otdrg.studies.cleaning.clean_report`). Empty ones count like all
others. CIDEr weighs n-grams by the references given, so its value belongs to this set of studies; it is 0 for a
single study.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from .metric import Metric, MetricResult, Score

#: The scores and their names in tables.
NLG_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
NLG_METRICS = tuple(NLG_NAMES)
_BLEU = NLG_METRICS[:4]

METEOR_NEEDS_JAVA = (
    "METEOR 1.5 runs on Java, and no java is on the PATH: install a Java runtime, 8 or newer "
    "(Debian and Ubuntu: apt-get install default-jre-headless)"
)


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"predictions: {len(predictions)}, references: {len(references)}; expected as many of each")
    for name, texts in (("predictions", predictions), ("references", references)):
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{position}] is {type(text).__name__}: expected a string ('' when empty)")
    if not any(text.split() for text in references):
        raise ValueError(f"references: none of {len(references)} holds a word, there is nothing to compare with")


def _paired(predictions: Sequence[str], references: Sequence[str]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions as pycocoevalcap takes them."""
    _check(predictions, references)
    from . import corpus  # noqa: F401  names the extra to install where pycocoevalcap is missing

    return {i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(predictions)}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> MetricResult:
    """BLEU-1..4, recomputed for each resample from the sums of its counts."""
    truth, written = _paired(predictions, references)
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    from .corpus import bleu_counts, bleu_of_counts

    scorer = BleuScorer(n=4)
    for study, text in written.items():
        scorer += (text[0], truth[study])
    values, by_study = scorer.compute_score(option="closest")
    return MetricResult(
        dict(zip(_BLEU, map(float, values), strict=True)),
        {name: [float(value) for value in column] for name, column in zip(_BLEU, by_study, strict=True)},
        bleu_counts(scorer),
        lambda sums, studies: dict(zip(_BLEU, bleu_of_counts(sums).T, strict=True)),
    )


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> MetricResult:
    """ROUGE-L, the mean over studies."""
    truth, written = _paired(predictions, references)
    from pycocoevalcap.rouge.rouge import Rouge

    return _mean("rouge_l", *Rouge().compute_score(truth, written))


def cider(predictions: Sequence[str], references: Sequence[str]) -> MetricResult:
    """CIDEr, the mean over studies; resamples keep the document frequencies of all references."""
    truth, written = _paired(predictions, references)
    from pycocoevalcap.cider.cider import Cider

    return _mean("cider", *Cider().compute_score(truth, written))


def _mean(name: str, value: float, by_study: Sequence[float]) -> MetricResult:
    result = MetricResult.from_means({name: by_study})
    # The library's own rounding of the mean.
    result.scores[name] = float(value)
    return result


def meteor(predictions: Sequence[str], references: Sequence[str]) -> MetricResult:
    """METEOR 1.5 by Java, recomputed for each resample from the sums of its counts; None without Java."""
    truth, written = _paired(predictions, references)
    if shutil.which("java") is None:
        return MetricResult({"meteor": None}, notes={"meteor": METEOR_NEEDS_JAVA})
    from .corpus import meteor_of_counts

    value, by_study, counts = _run_meteor(truth, written)
    return MetricResult(
        {"meteor": float(value)},
        {"meteor": [float(score) for score in by_study]},
        counts,
        lambda sums, studies: {"meteor": meteor_of_counts(sums)},
    )


_meteor_lock = threading.Lock()


def _run_meteor(
    references: dict[int, list[str]], predictions: dict[int, list[str]]
) -> tuple[float, list[float], np.ndarray]:
    """METEOR, of each report too, and its counts (N, 23)."""
    from .corpus import meteor_counts

    # Its protocol is one line of UTF-8 per study with "|||" between the fields.
    def plain(studies: Mapping[int, list[str]]) -> dict[int, list[str]]:
        return {
            study: [" ".join(text.encode(errors="replace").decode().replace("|||", " ").split()) for text in texts]
            for study, texts in studies.items()
        }

    with _meteor_lock:
        scorer = _meteor_scorer(shutil.which("java"), os.getpid())
        scorer.counts = []
        try:
            value, by_study = scorer.compute_score(plain(references), plain(predictions))
            return value, by_study, meteor_counts(scorer.counts)
        except BaseException as error:
            # After an interruption, too, its answers would belong to other reports.
            _meteor_scorer.cache_clear()
            said = scorer.end()
            if not isinstance(error, (ValueError, OSError)):
                raise
            # Java's answer was no number, or the pipe is broken: Java has ended.
            where = f" at predictions[{scorer.counts.index('')}]" if "" in scorer.counts else ""
            raise ChildProcessError(f"METEOR's Java process failed{where}: {said or error}") from None


@cache
def _meteor_scorer(java: str, process: int):
    """pycocoevalcap's METEOR. Its Java takes seconds to start, so it runs until this process ends.

    Args:
        java: the program.
        process: id of this process; another one, such as a worker, must not use the same Java.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    class CountingMeteor(Meteor):
        counts: list[str]

        # `_stat` is the only place where pycocoevalcap has the counts; it does not return them.
        def _stat(self, hypothesis_str, reference_list):
            self.counts.append(super()._stat(hypothesis_str, reference_list))
            return self.counts[-1]

        def end(self) -> str:
            """End Java; returns the first line of its error messages."""
            atexit.unregister(self.end)
            if self.lock.locked():  # compute_score keeps it when it raises, and __del__ waits for it
                self.lock.release()
            self.meteor_p.kill()
            self.meteor_p.wait()
            said = "" if self.meteor_p.stderr.closed else self.meteor_p.stderr.read().decode(errors="replace").strip()
            with contextlib.suppress(BrokenPipeError):  # __del__ would flush what Java has not read
                self.meteor_p.stdin.close()
            for stream in (self.meteor_p.stdout, self.meteor_p.stderr):
                stream.close()
            return said.partition("\n")[0]

    scorer = CountingMeteor()
    atexit.register(scorer.end)
    return scorer


def _metric(name: str, scores: Sequence[str], compute, main: Sequence[str]) -> Metric:
    shown = {score: Score(NLG_NAMES[score], "fluency", score in main) for score in scores}
    return Metric(name, shown, compute, section="nlg")


BLEU = _metric("bleu", _BLEU, bleu, main=["bleu_4"])
METEOR = _metric("meteor", ["meteor"], meteor, main=[])
ROUGE_L = _metric("rouge_l", ["rouge_l"], rouge_l, main=["rouge_l"])
CIDER = _metric("cider", ["cider"], cider, main=["cider"])

__all__ = ["BLEU", "CIDER", "METEOR", "METEOR_NEEDS_JAVA", "NLG_METRICS", "NLG_NAMES", "ROUGE_L"]
