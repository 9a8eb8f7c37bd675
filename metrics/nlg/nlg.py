"""Fluency for `evaluate`: `evaluate.load("metrics/nlg")` from the repository's root."""

import datasets
import evaluate
from otdrg.metrics import NLG_METRICS, nlg_scores

_DESCRIPTION = """\
BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr of generated radiology reports, one reference each, computed by pycocoevalcap
on the strings as they are given: words are separated by spaces, there is no tokenizer. Clean both sides first.
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


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class NLG(evaluate.Metric):
    """[`nlg_scores`] as a metric of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, metrics=NLG_METRICS):
        return nlg_scores(predictions, references, metrics)
