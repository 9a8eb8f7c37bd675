"""Weights as folders hold them: whole, or as an adapter of backbones that are elsewhere; and whether they are what they
should be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_otdrg import OTDRGConfig, resolve_backbone

#: Of the model's parts that are backbones, which one each is.
BACKBONE_PARTS = {"vision_tower": "vision", "finding_vision_tower": "vision", "language_model": "text"}
#: Behind the name of a matrix that the backbone has too: its further rows, such as those of added tokens.
ADDED_ROWS = ".added_rows"
#: Keywords of `from_pretrained` that say where files are.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_AUTO_CLASSES = {"vision": AutoModel, "text": AutoModelForCausalLM}


def load_backbone(part: str, auto_class, reference: str, dtype=None, quantization_config=None, **hub):
    """A backbone, or its tokenizer, by its reference: a Hub id, a folder or, for text, a GGUF file.

    Args:
        part (`str`): "vision", "text" or another name for errors.
        auto_class: `AutoModel` or the like.
        reference (`str`): where it is.
        dtype (`str` or `torch.dtype`, *optional*): of the weights; the checkpoint's by default.
        quantization_config (*optional*): transformers', by which the weights are packed on loading.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        OSError: it cannot be loaded, with the reference at fault.
    """
    name, kwargs = resolve_backbone(reference)
    kwargs |= hub
    if dtype is not None:
        kwargs["dtype"] = dtype
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if auto_class in _AUTO_CLASSES.values() and "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True  # the other format can run code when it is loaded
    if auto_class is AutoModelForCausalLM and "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        # transformers that can compute on packed weights do so unless told; they can be neither trained nor saved.
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{part} backbone {reference!r} could not be loaded: expected a Hub id, a folder written by save_pretrained"
            f"{', a timm/ name' if part == 'vision' else ''}{' or a .gguf file' if part == 'text' else ''} "
            f"({' '.join(str(error).split())})"
        ) from error


# --- files and what is in them ---------------------------------------------------------------------------------------


def weight_files(source: str | os.PathLike, **hub) -> dict[str, Path]:
    """The weight files of a folder, a Hub id or a GGUF file, by name; those of a Hub id are downloaded.

    Args:
        source (`str`): where they are.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        OSError: there are none in safetensors format, or the Hub does not give them.
    """
    name, kwargs = resolve_backbone(str(source))
    if "gguf_file" in kwargs:
        return {kwargs["gguf_file"]: Path(cached_file(name, kwargs["gguf_file"], **hub))}
    # As transformers looks for them: what was saved in shards once may have left its index behind.
    whole = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if whole is not None:
        return {SAFE_WEIGHTS_NAME: Path(whole)}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        raise OSError(f"{source} has no {SAFE_WEIGHTS_NAME}, and no {SAFE_WEIGHTS_INDEX_NAME} either")
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return {shard: Path(cached_file(name, shard, **hub)) for shard in shards}


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as hexadecimal digits: what the Hub shows beside a large file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_sha256(folder: str | os.PathLike) -> None:
    """Write the SHA-256 of a folder's weight files into its `config.json`, as `weights_sha256`.

    There may be none: weights of a variant, or of a distributed checkpoint, have names of their own.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    try:
        files = weight_files(folder)
    except OSError:
        return
    config["weights_sha256"] = {name: sha256(file) for name, file in files.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_stated(source: str | os.PathLike, **hub) -> tuple[dict[str, Any], str | None]:
    """What the `config.json` beside a model's weights says, which a configuration from elsewhere may not, and the
    commit it is of; empty and None where there is none.

    Args:
        source (`str`): folder or Hub id.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        OSError: the Hub does not give it, it cannot be read, or it is not of a model like this.
    """
    path = cached_file(source, CONFIG_NAME, **hub)
    if path is None:
        return {}, None
    try:
        stated = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is not valid JSON: {error}") from None
    if stated.get("model_type") != OTDRGConfig.model_type:
        raise OSError(f"{path}: model_type is {stated.get('model_type')!r}, expected {OTDRGConfig.model_type!r}")
    return stated, extract_commit_hash(path, None)


def check_sha256(source: str | os.PathLike, expected: Mapping[str, str], **hub) -> None:
    """The weight files of a model are what was recorded of them.

    transformers and the Hub's client look at a file's size only.

    Args:
        source (`str`): folder or Hub id.
        expected: SHA-256 by name, as [`record_sha256`] wrote them.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        OSError: one is another, or is not there.
    """
    for name, digest in expected.items():
        path = cached_file(source, name, **hub)
        found = sha256(path)
        if found != digest:
            remedy = f"delete {os.path.realpath(path)} and load it anew"
            if os.path.isdir(source):
                remedy = "copy it anew or, if it was changed on purpose, take weights_sha256 out of config.json"
            raise OSError(
                f"{path} is damaged, or is not what config.json beside it is of: its SHA-256 is {found}, expected "
                f"{digest}; {remedy}"
            )


# --- adapters --------------------------------------------------------------------------------------------------------


def backbone_weights(
    config: OTDRGConfig, token: str | bool | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    """The weights of both backbones by their references, in the checkpoints' types, and what they were found to be.

    Args:
        config: of the model, with the references.
        token: to read them with, where not everyone may.

    Returns:
        The state dicts of "vision" and "text"; and the configuration's `backbone_sha256` and `backbone_revisions`.

    Raises:
        ValueError: a reference is missing.
        OSError: a backbone cannot be loaded.
    """
    weights, facts = {}, {"backbone_sha256": {}, "backbone_revisions": {}}
    for part, auto_class in _AUTO_CLASSES.items():
        reference = getattr(config, f"{part}_backbone")
        if reference is None:
            raise ValueError(
                f"OTDRGConfig.{part}_backbone=None: expected the Hub id or folder the {part} backbone was taken from, "
                "which an adapter refers to"
            )
        where = {"revision": _revision(config, part), "token": token}
        weights[part] = load_backbone(part, auto_class, reference, **where).state_dict()
        files = weight_files(reference, **where)
        facts["backbone_sha256"][part] = {name: sha256(path) for name, path in files.items()}
        facts["backbone_revisions"][part] = extract_commit_hash(str(next(iter(files.values()))), None)
    return weights, facts


def adapter_weights(
    weights: Mapping[str, torch.Tensor], backbones: Mapping[str, Mapping[str, torch.Tensor]], quantized: bool
) -> dict[str, torch.Tensor]:
    """Of a model's weights those that its backbones do not have: what was trained, compared and not remembered.

    Args:
        weights: the model's state dict.
        backbones: of "vision" and "text", as [`backbone_weights`] gives them.
        quantized: whether the LLM's weights are packed, which cannot be compared and are never trained.

    Returns:
        Weights by the names they have in a model without LoRA, the adapters' own apart. Where a matrix is the
        backbone's and further rows, those are under its name and `ADDED_ROWS`.
    """
    trained = {}
    for key, weight in weights.items():
        module, _, inner = key.partition(".")
        if module not in BACKBONE_PARTS or _is_lora(key):
            trained[key] = weight
            continue
        inner = inner.replace(".base_layer.", ".")
        name, theirs = f"{module}.{inner}", backbones[BACKBONE_PARTS[module]].get(inner)
        if module == "language_model" and quantized and (theirs is None or not weight.is_floating_point()):
            continue
        same_rows = slice(len(theirs)) if theirs is not None and theirs.ndim else ...
        if theirs is None or not torch.equal(weight[same_rows], theirs.to(weight.device, weight.dtype)):
            trained[name] = weight
        elif weight.shape != theirs.shape:
            trained[name + ADDED_ROWS] = weight[len(theirs) :].clone()
    return trained


def read_adapter(
    source: str | os.PathLike, config: OTDRGConfig, **hub
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a model that is an adapter: the backbones' and its own, without and with LoRA.

    Args:
        source (`str`): folder or Hub id of the adapter.
        config: its configuration.
        hub: some of `HUB_KEYWORDS`.

    Returns:
        The weights of the model without LoRA, and those of LoRA.

    Raises:
        OSError: a backbone cannot be loaded, or is not the one the adapter was trained on.
    """
    weights: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    # A revision and a folder inside of the repository are the adapter's own.
    shared = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    for part, auto_class in _AUTO_CLASSES.items():
        reference = getattr(config, f"{part}_backbone")
        where = {**shared, "revision": _revision(config, part)}
        try:
            files = weight_files(reference, **where)
        except OSError as error:
            raise OSError(
                f"{source} is an adapter of the {part} backbone {reference!r}, which could not be loaded: "
                f"{' '.join(str(error).split())}"
            ) from error
        found = {name: sha256(path) for name, path in files.items()}
        expected = (config.backbone_sha256 or {}).get(part, {})
        others = [os.path.realpath(path) for name, path in files.items() if found[name] != expected.get(name)]
        if others or len(found) != len(expected):
            remedy = ""
            if others and not os.path.exists(reference):
                remedy = f"; if it was damaged on its way, delete {' '.join(others)} and load it anew"
            raise OSError(
                f"{source} is an adapter of another {part} backbone than {reference!r} is: the SHA-256 of its weights "
                f"is {found}, expected {expected}{remedy}"
            )
        backbone = load_backbone(part, auto_class, reference, **where).state_dict()
        for module, of in BACKBONE_PARTS.items():
            if of == part and (module != "finding_vision_tower" or config.predictor_encoder == "own"):
                weights |= {f"{module}.{name}": weight for name, weight in backbone.items()}
                tied |= {f"{module}.{name}": f"{module}.{other}" for name, other in _tied(backbone)}
    own: dict[str, torch.Tensor] = {}
    for path in weight_files(source, **hub).values():
        own |= load_file(path)
    lora: dict[str, torch.Tensor] = {}
    for key, weight in own.items():
        if key.endswith(ADDED_ROWS):
            name = key.removesuffix(ADDED_ROWS)
            weights[name] = torch.cat((weights[name], weight.to(weights[name].dtype)))
        elif _is_lora(key):
            lora[key] = weight
        else:
            weights[key] = weight
            if tied.get(key) not in own:
                # Saved under one of its names: what the backbone has under the other would be taken for another matrix.
                weights.pop(tied.get(key), None)
    return weights, lora


def _tied(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Names under which the same weight stands, each with the other."""
    names: dict[int, str] = {}
    for name, weight in weights.items():
        other = names.setdefault(weight.data_ptr(), name)
        if other != name and weight.numel():
            yield from ((name, other), (other, name))


def _revision(config: OTDRGConfig, part: str) -> str:
    return (config.backbone_revisions or {}).get(part) or "main"


def _is_lora(key: str) -> bool:
    return ".lora_" in key


__all__ = [
    "HUB_KEYWORDS",
    "adapter_weights",
    "backbone_weights",
    "check_sha256",
    "load_backbone",
    "read_adapter",
    "read_stated",
    "record_sha256",
    "sha256",
    "weight_files",
]
