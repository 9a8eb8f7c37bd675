"""Clinical efficacy for `evaluate`: `evaluate.load("metrics/clinical_efficacy")` from the repository's root."""

import datasets
import evaluate
from otdrg.findings_otdrg import FINDINGS
from otdrg.metrics.efficacy import clinical_efficacy_scores

_DESCRIPTION = """\
Precision, recall and F1 of finding states: example, micro and macro averages, unclear counted as negative or as
positive, over 14 findings, CheXpert's 5, and the 13 without No Finding. A ratio with denominator 0 is 0: in example
averages that is every study without positives, however right its report.
"""

_INPUTS = """\
Args:
    predictions: N lists of 14 state ids (0 unmentioned, 1 positive, 2 negative, 3 unclear) of the generated reports.
    references: the same of the true reports.
Returns:
    {average}_{precision|recall|f1}_{14|5|13}_{uncertain_negative|uncertain_positive} and
    findings_with_positives_{14|5|13}_{uncertain_...}; `per_finding`; `per_study`.
"""

_CITATION = """\
@inproceedings{irvin2019chexpert, title={CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert
Comparison}, author={Irvin, Jeremy and others}, booktitle={AAAI}, year={2019}}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ClinicalEfficacy(evaluate.Metric):
    """[`clinical_efficacy_scores`] as a metric of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        states = datasets.Sequence(datasets.Value("int64"), length=len(FINDINGS))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": states, "references": states}),
        )

    def _compute(self, predictions, references):
        return clinical_efficacy_scores(predictions, references)
