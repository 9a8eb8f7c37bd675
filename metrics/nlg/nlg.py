"""Fluency of generated reports: BLEU-1..4, METEOR, ROUGE-L and CIDEr (paper, section 4.2), as pycocoevalcap has them.

A module for `evaluate`: `evaluate.load("metrics/nlg")` from the repository's root (or with an absolute path).
"""

import contextlib
import shutil
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

try:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
except ImportError as error:
    raise ImportError('the NLG metrics need pycocoevalcap: pip install "otdrg[metrics]"') from error
from otdrg.metrics.nlg.corpus import bleu_counts, meteor_counts

NLG_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")

METEOR_NEEDS_JAVA = (
    "METEOR 1.5 runs on Java, and no java is on the PATH: install a Java runtime, 8 or newer "
    "(Debian and Ubuntu: apt-get install default-jre-headless), and score again"
)

_DESCRIPTION = """\
BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr of generated radiology reports, one reference each, computed by pycocoevalcap
on the strings as they are given: words are what stands between spaces, there is no tokenizer. Clean both sides first.
"""

_INPUTS = """\
Args:
    predictions: list of str, the generated reports; empty ones are scored like any other.
    references: list of str, the true reports, in the same order.
    metrics: names among bleu (for all four), bleu_1, bleu_2, bleu_3, bleu_4, meteor, rouge_l, cider; all by default.
Returns:
    a value for each name; `per_study`, a list of N values for each name; `notes`, why a value is None (METEOR without
    Java).
"""

_CITATION = """\
@misc{chen2015microsoft, title={Microsoft COCO Captions: Data Collection and Evaluation Server},
author={Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and Doll{\\'a}r, Piotr
and Zitnick, C. Lawrence}, year={2015}, eprint={1504.00325}, archivePrefix={arXiv}}
"""


#: Short for four names.
_GROUPS = {"bleu": NLG_METRICS[:4]}


def _check(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> None:
    unknown = [metrics] if isinstance(metrics, str) else [name for name in metrics if name not in NLG_METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}: expected a list of some of bleu, {', '.join(NLG_METRICS)}")
    if len(predictions) != len(references):
        raise ValueError(f"predictions: {len(predictions)}, references: {len(references)}; expected as many of each")
    for name, texts in (("predictions", predictions), ("references", references)):
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{position}] is {type(text).__name__}: expected a string ('' when empty)")
    if not any(text.split() for text in references):
        raise ValueError(f"references: none of {len(references)} holds a word, there is nothing to compare with")


class _CountingMeteor(Meteor):
    """METEOR that keeps the counts its Java gives of each report."""

    def __init__(self):
        super().__init__()
        self.counts: list[str] = []

    def _stat(self, hypothesis_str, reference_list):
        self.counts.append(super()._stat(hypothesis_str, reference_list))
        return self.counts[-1]


def _meteor(
    references: dict[int, list[str]], predictions: dict[int, list[str]]
) -> tuple[float, list[float], np.ndarray]:
    """METEOR 1.5, of each report too, and its counts (N, 23); the Java process is started once and gone at the end."""

    # its protocol is one line of UTF-8 a study with "|||" between the fields
    def plain(studies: dict[int, list[str]]) -> dict[int, list[str]]:
        return {
            study: [" ".join(text.encode(errors="replace").decode().replace("|||", " ").split()) for text in texts]
            for study, texts in studies.items()
        }

    scorer = _CountingMeteor()
    process = scorer.meteor_p
    try:
        value, by_study = scorer.compute_score(plain(references), plain(predictions))
        return value, by_study, meteor_counts(scorer.counts)
    except (ValueError, OSError) as error:  # Java's answer was no number, or the pipe is broken: Java has ended
        process.kill()
        said = process.stderr.read().decode(errors="replace").strip().splitlines()
        raise ChildProcessError(f"METEOR's Java process failed: {said[-1] if said else error}") from None
    finally:
        if scorer.lock.locked():  # compute_score keeps it when it raises, and the scorer's __del__ waits for it
            scorer.lock.release()
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # what Java has not read is of no use, and __del__ would flush it
            process.stdin.close()
        for stream in (process.stdout, process.stderr):
            stream.close()


def nlg_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = NLG_METRICS,
    return_statistics: bool = False,
) -> dict[str, object]:
    """BLEU-1..4, METEOR, ROUGE-L and CIDEr (paper, section 4.2) of N reports, as pycocoevalcap computes them.

    The strings are taken as they are: clean them first (`otdrg.studies.cleaning.clean_report`). CIDEr weighs n-grams by
    the references given, so its value belongs to this set of studies; it is 0 for a single study.

    Args:
        predictions: N generated reports; empty strings are scored like any other.
        references: N true reports, in the same order.
        metrics: which of `NLG_METRICS` to compute; "bleu" is short for all four.
        return_statistics: give what `otdrg.metrics.study_statistics` needs of BLEU and METEOR, too.

    Returns:
        One float for each metric; `"per_study"`: a list of N floats for each; `"notes"`: `{metric: why it is None}`.
        METEOR is None when no `java` is on the PATH. On request `"statistics"`: `{"bleu": (N, 10), "meteor": (N, 23)}`
        of those computed, counts whose sums give the corpus scores (`metrics/nlg/corpus.py`).

    Raises:
        ValueError: lengths differ, an unknown metric, or no reference holds a word.
        TypeError: a report is not a string; the message gives its position.
        ChildProcessError: Java failed; the message carries what it said.
    """
    if not isinstance(metrics, str):
        metrics = [name for given in metrics for name in _GROUPS.get(given, (given,))]
    _check(predictions, references, metrics)
    truth = {study: [text] for study, text in enumerate(references)}
    written = {study: [text] for study, text in enumerate(predictions)}
    values: dict[str, float | None] = {}
    studies: dict[str, list[float] | None] = {}
    notes: dict[str, str] = {}
    statistics: dict[str, np.ndarray] = {}

    def keep(name: str, value: float, by_study: Sequence[float]) -> None:
        values[name], studies[name] = float(value), [float(score) for score in by_study]

    if any(name.startswith("bleu") for name in metrics):
        scorer = BleuScorer(n=4)
        for study, text in written.items():
            scorer += (text[0], truth[study])
        bleu = scorer.compute_score(option="closest")
        for order, (value, by_study) in enumerate(zip(*bleu, strict=True), 1):
            keep(f"bleu_{order}", value, by_study)
        statistics["bleu"] = bleu_counts(scorer)
    if "meteor" in metrics:
        if shutil.which("java") is None:
            values["meteor"] = studies["meteor"] = None
            notes["meteor"] = METEOR_NEEDS_JAVA
        else:
            value, by_study, statistics["meteor"] = _meteor(truth, written)
            keep("meteor", value, by_study)
    if "rouge_l" in metrics:
        keep("rouge_l", *Rouge().compute_score(truth, written))
    if "cider" in metrics:
        keep("cider", *Cider().compute_score(truth, written))
    chosen = [name for name in NLG_METRICS if name in metrics]
    return {
        **{name: values[name] for name in chosen},
        "per_study": {name: studies[name] for name in chosen},
        "notes": notes,
        **({"statistics": statistics} if return_statistics else {}),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class NLG(evaluate.Metric):
    """`evaluate`'s form of [`nlg_scores`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, metrics=NLG_METRICS):
        return nlg_scores(predictions, references, metrics)
