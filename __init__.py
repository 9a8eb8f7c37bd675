"""OTDRG: optimal transport-driven radiology report generation. Names are imported when they are first used."""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "configuration_otdrg": (
        "DEFAULT_PROMPT",
        "FINDINGS",
        "FINDING_DISPLAY_NAMES",
        "FINDING_STATES",
        "OTDRGConfig",
        "finding_key",
        "finding_state_id",
        "parse_findings",
    ),
    "modeling_otdrg": ("OTDRGForReportGeneration", "SinkhornOutput", "cost_matrix", "focal_loss", "sinkhorn"),
    "pipeline_otdrg": ("ReportGenerationPipeline",),
    "processing_otdrg": ("OTDRGProcessor",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
