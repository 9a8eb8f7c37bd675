"""Metrics of generated reports: fluency, clinical efficacy, baselines, significance, localisation; names on demand."""

from ..runtime.lazy import lazy_names

_HOMES = {
    "nlg_scores": "nlg.nlg",
    "NLG_METRICS": "nlg.nlg",
    "radeval_scores": "rad_eval",
    "RADEVAL_METRICS": "rad_eval",
    "clinical_efficacy_scores": "clinical_efficacy.clinical_efficacy",
    "LABEL_SETS": "clinical_efficacy.clinical_efficacy",
    "UNCERTAIN_POLICIES": "clinical_efficacy.clinical_efficacy",
    "all_positive_report": "baselines",
    "BestConstants": "baselines",
    "best_constants": "baselines",
    "ReportScores": "scoring",
    "score_reports": "scoring",
    "Interval": "significance",
    "PairedDifference": "significance",
    "StudyStatistics": "significance",
    "study_statistics": "significance",
    "bootstrap_intervals": "significance",
    "paired_bootstrap": "significance",
    "paired_permutation": "significance",
    "compare_systems": "significance",
    "pointing_game": "localisation",
    "soft_iou": "localisation",
    "judge_maps": "localisation",
    "localisation_scores": "localisation",
}

__all__ = list(_HOMES)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
