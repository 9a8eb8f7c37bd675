"""Load a trained model from the folder of a run, the folder of a model, or a Hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ..bank_otdrg import ReportBank
from ..configuration_otdrg import find_file
from ..consensus_otdrg import ConsensusDecoder, consensus_settings
from ..files_otdrg import read_json
from ..labelers.as_typed import label_quietly, labeler_of
from ..modeling_otdrg import OTDRGForReportGeneration
from ..pipeline_otdrg import ReportGenerationPipeline
from ..processing_otdrg import OTDRGProcessor
from ..runtime.devices import inference_device
from ..runtime.yaml_files import read_yaml
from ..studies.cleaning import CLEANING_STYLES
from ..weight_files_otdrg import read_stated
from ..weights_otdrg import quantization_of
from .attention import use_fastest_attention
from .digests import model_digest
from .model_files import check_fit, read_model, read_processor

#: Number of beams and maximum length of a report if neither the command nor the model sets them.
_BEAMS, _NEW_TOKENS = 3, 120


def load_published(
    model: str, device: str | None = None, dtype: str | None = None, quantization: str | None = None
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """A trained model on its device, in evaluation mode, and its processor.

    Args:
        model: folder of a run or a model, a Hub id, or a Hub id and a revision, "org/name@revision".
        device: "cpu", "cuda", ...; by default accelerate's choice, see [`inference_device`].
        dtype: type of the weights, "float32", "bfloat16" or "float16"; by default bfloat16 on an accelerator, and on a
            CPU that of the file.
        quantization: "4bit" or "8bit", of the LLM's linear layers, as in [`quantization_of`].

    Raises:
        ValueError: there is no such device or type; a folder without a model, or a damaged file, which the message
            names; or the LLM cannot be quantised.
        OSError: it cannot be loaded; the message contains the Hub's answer.
        ImportError: `quantization` without bitsandbytes.
    """
    disable_progress_bar()
    place = inference_device(device)
    if dtype is None:
        dtype = None if place.type == "cpu" else "bfloat16"
    elif not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        # Packed weights cannot be moved afterwards.
        arguments |= {"quantization_config": quantization_of(quantization), "device_map": {"": place}}
    name, hub = _source_of(model)
    try:
        commit = read_stated(name, **hub)[1]
        if commit is not None:
            hub = {"revision": commit}
        # Before the weights, which may be large.
        processor = read_processor(name, **hub)
        network = read_model(name, **arguments, **hub)
    except OSError as error:
        status = _http_status(error)
        # transformers says "couldn't connect" even if the Hub answered.
        whose = "" if Path(model).is_dir() else f"{model}: "
        raise OSError(f"{whose}{error}{f' (the Hub answered {status})' if status else ''}") from error
    except (ValueError, ImportError) as error:
        if quantization is None:
            raise
        raise ValueError(f"{error}; quantization={quantization!r} on {place.type} may be at fault") from error
    if quantization is None:
        network.to(place)
    use_fastest_attention(network)
    check_fit(name, network, processor, **hub)
    return network.eval(), processor


def _source_of(model: str) -> tuple[str | Path, dict[str, str]]:
    """The folder or the Hub id of a model, and its revision as a keyword argument of `from_pretrained`."""
    if Path(model).is_dir():
        return published_folder(model), {}
    repo, _, revision = model.partition("@")
    return repo, {"revision": revision} if revision else {}


def published_cleaning(model: str) -> str | None:
    """The cleaning of the reports that a model learned, from the `metrics.json` beside it; None if it is not there.

    Args:
        model: as in [`load_published`].

    Raises:
        ValueError: the file is damaged, or names an unknown cleaning.
        OSError: the Hub cannot be reached.
    """
    name, hub = _source_of(model)
    path = find_file(name, "metrics.json", **hub)
    return None if path is None else read_json(path, parse=_stated_cleaning)


def _stated_cleaning(metrics: dict[str, Any]) -> str | None:
    cleaning = ((metrics.get("recipe") or {}).get("studies") or {}).get("cleaning")
    if cleaning is not None and cleaning not in CLEANING_STYLES:
        raise ValueError(f"recipe.studies.cleaning={cleaning!r}: expected one of {', '.join(CLEANING_STYLES)}")
    return cleaning


def published_folder(model: str | Path) -> Path:
    """The folder of the model, given the folder of its run or its own.

    In a run whose recipe has the stage `reward`, that is the stage's model once it is finished.

    Raises:
        ValueError: there is no model.
    """
    run = Path(model)
    rewarded = [run / "reward"] if (run / "reward" / "finished.json").is_file() and _has_stage(run, "reward") else []
    for folder in (*rewarded, run / "model", run):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{model}: no config.json here or in its folder 'model', expected a trained run or a model")


def _has_stage(run: Path, stage: str) -> bool:
    """Whether the recipe by which a run was last trained has a stage."""
    path = run / "recipe.yaml"
    recipe = read_yaml(path) if path.is_file() else None
    return isinstance(recipe, dict) and stage in (recipe.get("stages") or ())


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status of the answer that caused an error or one of its causes."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def load_pipeline(
    model: str, device: str | None = None, dtype: str | None = None, quantization: str | None = None
) -> ReportGenerationPipeline:
    """The `image-to-text` pipeline of a trained model; arguments and errors as in [`load_published`]."""
    network, processor = load_published(model, device, dtype, quantization)
    # A quantised model has a map of its devices, and refuses another device beside it.
    place = None if getattr(network, "hf_device_map", None) else network.device
    return ReportGenerationPipeline(model=network, processor=processor, task="image-to-text", device=place)


def model_settings(model: OTDRGForReportGeneration, processor: OTDRGProcessor) -> dict[str, Any]:
    """What all results of a model depend on, for [`WorkSettings`]: its digest, and the type of its weights."""
    quantizer = getattr(model.language_model, "hf_quantizer", None) if model.is_llm_quantized else None
    bits = None if quantizer is None else 4 if quantizer.quantization_config.load_in_4bit else 8
    return {
        "model": model_digest(model, processor),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": None if bits is None else f"{bits}bit",
    }


def decoding(
    model: OTDRGForReportGeneration,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    guidance_scale: float | None = None,
    decoder: ConsensusDecoder | None = None,
) -> dict[str, Any]:
    """Arguments of `generate`: the given ones, or those of the model's generation configuration.

    Args:
        model: on its device.
        num_beams, max_new_tokens, guidance_scale: given by the user, or None.
        batch_size: studies per batch.
        decoder: of consensus decoding, whose samples of a study are in the device's memory at the same time.

    Returns:
        `num_beams`, `max_new_tokens` and, if there are some, `bad_words_ids` and `guidance_scale`, which is 1 if it
        replaces another one of the model's.

    Raises:
        ValueError: guidance of a model that does not use finding states, more tokens than the LLM has positions, more
            beams than its vocabulary has tokens, or a batch whose views, keys and values do not fit into the memory of
            the device.
    """
    asked, text = model.generation_config, model.config.text_config
    beams = num_beams or asked.num_beams or _BEAMS
    tokens = max_new_tokens or asked.max_new_tokens or _NEW_TOKENS
    positions = model.config.text_positions
    if positions is not None and tokens >= positions:
        raise ValueError(f"--max-new-tokens is {tokens}: expected less than {positions}, the positions of the LLM")
    if beams > text.vocab_size:
        raise ValueError(f"--num-beams is {beams}: expected at most {text.vocab_size}, the tokens of the LLM")
    views = 3 * model.config.image_size**2 * torch.float32.itemsize
    sequences = beams if decoder is None else decoder.settings.sequences
    needed = batch_size * (sequences * (tokens + model.config.image_tokens) * bytes_a_token(model) + views)
    there = device_memory(model.device)
    if there is not None and needed > there:
        raise ValueError(
            f"--batch-size {batch_size} with {sequences} {'beams' if decoder is None else 'samples at a time'} and "
            f"{tokens} new tokens needs {needed / 2**30:,.1f} GB for "
            f"views, keys and values, and the device has {there / 2**30:,.1f} GB: expected less of one of them"
        )
    own_scale = getattr(asked, "guidance_scale", None) or 1.0
    guidance_scale = guidance_scale or own_scale
    found: dict[str, Any] = {"num_beams": beams, "max_new_tokens": tokens}
    if asked.bad_words_ids:
        found["bad_words_ids"] = asked.bad_words_ids
    if guidance_scale == own_scale == 1:
        return found
    if guidance_scale != 1 and not model.config.dle:
        raise ValueError(
            f"--guidance-scale is {guidance_scale:g}: expected 1, this model does not use finding states (dle=False)"
        )
    return {**found, "guidance_scale": guidance_scale}


def consensus_decoder(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    candidates: int | None = None,
    bank: str | os.PathLike | ReportBank | None = None,
    **settings: Any,
) -> ConsensusDecoder | None:
    """Consensus decoding with the labeler `rules`, or None if neither the user nor the model asks for it.

    Args:
        model, processor: as published.
        candidates: samples per study; None for those of the model's generation config, 1 for none.
        bank: a report bank or its folder.
        settings: other [`ConsensusSettings`]; None is left out.

    Raises:
        ValueError: an impossible setting, a bank that is damaged or of another encoder, or one for a model whose
            generation config has `candidates` 1.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    found = consensus_settings(model.generation_config, candidates, bank, given)
    if found is None:
        if bank is not None and candidates is None:
            raise ValueError("a report bank was given, and this model writes candidates=1: expected --candidates too")
        return None
    if bank is not None and not isinstance(bank, ReportBank):
        bank = ReportBank.load(bank)
        bank.check(model, processor)
    labeler = labeler_of("rules", {})
    return ConsensusDecoder(found, bank, lambda reports: label_quietly(labeler, reports))


def asked_decoder(
    model: OTDRGForReportGeneration, processor: OTDRGProcessor, options: Mapping[str, Any]
) -> ConsensusDecoder | None:
    """[`consensus_decoder`] by the options of a command; `num_beams` or `guidance_scale` ask for one report."""
    is_search = options["num_beams"] is not None or options["guidance_scale"] is not None
    candidates = 1 if is_search else options["candidates"]
    settings = {name: options[name] for name in ("retrieved", "agreement_weight")}
    return consensus_decoder(model, processor, candidates, options["bank"], **settings)


def described_consensus(decoder: ConsensusDecoder | None) -> dict[str, Any]:
    """What reports of consensus decoding depend on, ready for JSON; empty without it."""
    if decoder is None:
        return {}
    bank = None if decoder.bank is None else {"reports": len(decoder.bank), "digest": decoder.bank.digest()}
    return {"consensus": decoder.settings.to_dict(), "bank": bank}


def bytes_a_token(model: OTDRGForReportGeneration) -> int:
    """Bytes of the keys and values of one token in all layers of the LLM."""
    text = model.config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * model.language_model.dtype.itemsize


def device_memory(device: torch.device) -> int | None:
    """The memory of a device in bytes; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


__all__ = [
    "asked_decoder",
    "bytes_a_token",
    "consensus_decoder",
    "decoding",
    "described_consensus",
    "device_memory",
    "load_pipeline",
    "load_published",
    "model_settings",
    "published_cleaning",
    "published_folder",
]
