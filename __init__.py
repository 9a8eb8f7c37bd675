"""OTDRG: optimal transport-driven radiology report generation. Names are imported when they are first used."""

# Absolute, because pytest imports this file by its path, from a clone in a folder of any name.
from otdrg.runtime.lazy import lazy_names

__version__ = "0.1.0"

_MODULES = {
    "configuration_otdrg": ("DEFAULT_PROMPT", "OTDRGConfig"),
    "findings_otdrg": (
        "FINDINGS",
        "FINDING_DISPLAY_NAMES",
        "FINDING_STATES",
        "finding_key",
        "finding_state_id",
        "parse_findings",
    ),
    "modeling_otdrg": ("OTDRGForReportGeneration",),
    "pipeline_otdrg": ("ReportGenerationPipeline",),
    "predictor_otdrg": ("focal_loss",),
    "processing_otdrg": ("OTDRGProcessor",),
    "sinkhorn_otdrg": ("SinkhornOutput", "cost_matrix", "sinkhorn"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_HOMES]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
