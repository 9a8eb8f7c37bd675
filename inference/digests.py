"""Digests of what features and reports depend on, to know whether stored ones are still those of a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor

#: The parts of a model that compute its view features.
ENCODERS: tuple[str, ...] = ("vision_tower", "finding_vision_tower")
#: Fields of a configuration which change nothing that is computed: about its origin, and how its reports are split.
_PROVENANCE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "backbone_revisions",
    "backbone_sha256",
    "dtype",
    "processor_class",
    "report_sections",
    "transformers_version",
    "weights",
    "weights_sha256",
)


def encoder_digest(model: OTDRGForReportGeneration, processor: OTDRGProcessor) -> str:
    """A digest of all that a view's features depend on besides the view: encoders, configuration, transform, type."""
    fields = {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in model.config.vision_fields().items()
    }
    settings = {"config": fields, "image_processor": _settings(processor.image_processor.to_dict())}
    return _digest_weights(model, settings, tuple(f"{part}." for part in ENCODERS))


def model_digest(model: OTDRGForReportGeneration, processor: OTDRGProcessor) -> str:
    """A digest of all that a report depends on besides the study and the arguments of `generate`."""
    settings = {
        "model": _settings(model.config.to_dict()),
        "image_processor": _settings(processor.image_processor.to_dict()),
        "vocabulary": processor.tokenizer.get_vocab(),
        "generation": _settings(model.generation_config.to_dict()),
    }
    return _digest_weights(model, settings, "")


def language_model_digest(model: OTDRGForReportGeneration) -> str:
    """A digest of the weights of the LLM and their type."""
    return _digest_weights(model, {}, "language_model.")


def _digest_weights(model: OTDRGForReportGeneration, settings: dict[str, Any], prefixes: str | tuple[str, ...]) -> str:
    """A digest of settings and of the weights whose names start with one of the prefixes."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _PROVENANCE}


__all__ = ["ENCODERS", "encoder_digest", "language_model_digest", "model_digest"]
