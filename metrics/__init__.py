"""Metrics of generated reports: fluency, clinical efficacy, baselines, significance, localisation; names on demand."""

from ..runtime.lazy import lazy_names

_HOMES = {
    "Metric": "metric",
    "MetricResult": "metric",
    "Score": "metric",
    "METRICS": "registry",
    "default_metrics": "registry",
    "display_name": "registry",
    "full_score_name": "registry",
    "higher_is_better": "registry",
    "main_scores": "registry",
    "metric_of": "registry",
    "metric_choices": "registry",
    "register": "registry",
    "score_names": "registry",
    "score_tables": "registry",
    "nlg_scores": "scoring",
    "NLG_METRICS": "fluency",
    "NLG_NAMES": "fluency",
    "ComparisonReader": "comparisons",
    "RADEVAL_METRICS": "rad_eval",
    "AVERAGES": "efficacy",
    "LABEL_SETS": "efficacy",
    "UNCERTAIN_POLICIES": "efficacy",
    "clinical_efficacy_scores": "efficacy",
    "all_positive_report": "baselines",
    "BestConstants": "baselines",
    "best_constants": "baselines",
    "ReportScores": "scoring",
    "score_reports": "scoring",
    "Interval": "significance",
    "PairedDifference": "significance",
    "StudyStatistics": "significance",
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
