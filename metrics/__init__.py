"""Metrics of generated reports: fluency, clinical efficacy, baselines. Names are imported when they are first used."""

from importlib import import_module

_HOMES = {
    "nlg_scores": "nlg.nlg",
    "NLG_METRICS": "nlg.nlg",
    "clinical_efficacy_scores": "clinical_efficacy.clinical_efficacy",
    "LABEL_SETS": "clinical_efficacy.clinical_efficacy",
    "UNCERTAIN_POLICIES": "clinical_efficacy.clinical_efficacy",
    "best_constant_report": "baselines",
    "best_constants": "baselines",
    "frequent_reports": "baselines",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
