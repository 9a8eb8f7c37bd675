"""Save, load and verify weights: the full model, or an adapter whose backbones are stored elsewhere.

Long, because everything that decides which weight files may be loaded stands here.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)
from transformers.utils.hub import extract_commit_hash

from .configuration_otdrg import HUB_KEYWORDS, OTDRGConfig, place_of, resolve_backbone
from .files_otdrg import follow_umask, read_json, write_json

#: Of the model's parts that are backbones, which one each is.
BACKBONE_PARTS = {"vision_tower": "vision", "finding_vision_tower": "vision", "language_model": "text"}
#: Behind the name of a matrix that the backbone has too: its further rows, such as those of added tokens.
ADDED_ROWS = ".added_rows"
_AUTO_CLASSES = {"vision": AutoModel, "text": AutoModelForCausalLM}
#: A weight file that transformers loads as a model's, with its variant; others lie beside a model for other readers.
_OWN_WEIGHTS = re.compile(r"model(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors")
#: Files that transformers loads as a model's in formats that cannot be recorded, or that lead to another model.
_OTHER_WEIGHTS = re.compile(
    r"pytorch_model(\.[^.]+?)?(-\d+-of-\d+)?\.bin|adapter_model\..*|adapter_config\.json|tf_model\.h5|flax_model\.msgpack"
)
#: Most bytes of a config.json or an index of shards.
_MAXIMUM_CONFIG_BYTES = 2**24
#: A model is loaded with new weights up to this many times those that are there, for instance a second vision encoder,
#: and this many more.
_MOST_NEW_SHARE, _MOST_NEW = 2, 2**26


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
    is_safetensors = auto_class in _AUTO_CLASSES.values() and "gguf_file" not in kwargs
    if is_safetensors:
        kwargs["use_safetensors"] = True  # the other format can run code when it is loaded
    if auto_class is AutoModelForCausalLM and "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        # transformers that can compute on packed weights do so unless told; they can be neither trained nor saved.
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        if is_safetensors:
            weight_files(name, **hub)  # an index can name files of the other format
        return auto_class.from_pretrained(name, **kwargs)
    except Exception as error:  # damaged files make transformers raise errors of any type
        raise OSError(
            f"{part} backbone {reference!r} could not be loaded: expected a Hub id, a folder written by save_pretrained"
            f"{', a timm/ name' if part == 'vision' else ''}{' or a .gguf file' if part == 'text' else ''} "
            f"({' '.join(str(error).split())})"
        ) from error


# --- files and what is in them ---------------------------------------------------------------------------------------


def weight_files(source: str | os.PathLike, variant: str | None = None, **hub) -> dict[str, Path]:
    """The weight files of a folder, a Hub id or a GGUF file, by name; those of a Hub id are downloaded.

    Args:
        source (`str`): where they are.
        variant (`str`, *optional*): of the weights, as in `from_pretrained`.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        ValueError: an index of shards names something else than safetensors files beside it.
        OSError: there are none in safetensors format, or the Hub does not give them.
    """
    name, kwargs = resolve_backbone(str(source))
    if "gguf_file" in kwargs:
        return {kwargs["gguf_file"]: Path(cached_file(name, kwargs["gguf_file"], **hub))}
    wanted, wanted_index = (_with_variant(file, variant) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    # In the order in which transformers looks for them.
    whole = cached_file(name, wanted, _raise_exceptions_for_missing_entries=False, **hub)
    if whole is not None:
        return {wanted: Path(whole)}
    index = cached_file(name, wanted_index, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        pickle = _pickle(name, variant, hub)
        raise OSError(
            f"{place_of(source, hub)} has no {wanted}, and no {wanted_index} either"
            + (f": {pickle} can run code when it is loaded, save the model anew in safetensors format" * bool(pickle))
        )
    shards = read_json(index, parse=_shards, limit=_MAXIMUM_CONFIG_BYTES)
    files = {shard: Path(cached_file(name, shard, **hub)) for shard in shards}
    if os.path.isdir(name):
        for shard, path in files.items():
            _check_link(index, shard, path)
    return files


def _shards(index: dict[str, Any]) -> list[str]:
    """The shards an index names.

    Raises:
        ValueError: one is not a safetensors file in the folder of the index.
    """
    shards = sorted(set(index["weight_map"].values()))
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard):
            raise ValueError(f"weight_map names {shard!r}, expected safetensors files in the folder of the index")
    return shards


def _check_link(index: str, shard: str, path: Path) -> None:
    """A shard may be a link within its folder, and into the blobs of the Hub's cache, if the folder is a snapshot."""
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent
    if target != folder and not (target.name == "blobs" and target.parent in folder.parents):
        raise ValueError(f"{index}: weight_map names {shard!r}, a link to another folder, expected a file beside it")


def _pickle(name: str, variant: str | None, hub: Mapping[str, Any]) -> str | None:
    """The name of weights in torch's own format, where a folder or repository has them."""
    file = _with_variant(WEIGHTS_NAME, variant)
    if os.path.isdir(name):
        folder = Path(name, hub.get("subfolder") or "")
        return next((path.name for path in sorted(folder.glob("pytorch_model*.bin"))), None)
    keywords = {key: hub[key] for key in ("revision", "token", "cache_dir", "local_files_only") if hub.get(key)}
    try:
        return file if not hub.get("subfolder") and has_file(name, file, **keywords) else None
    except (OSError, ValueError):
        return None


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def weight_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in safetensors files by name, read from their headers.

    Raises:
        OSError: one is not a safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files.values():
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise OSError(f"{path} is not a whole safetensors file: {' '.join(str(error).split())}") from None
    return shapes


def check_shapes(place: str, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration that describes another model than the weights are of.

    transformers would make the weights that do not fit or are missing, however much memory they take.

    Args:
        place: folder or Hub id, for the message.
        model: made by the configuration, on the device "meta".
        shapes: of the weights that are there; those of other names are not compared.

    Raises:
        ValueError: a weight has another shape, or the model is far larger.
    """
    described = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in shapes.items():
        if described.get(name, shape) != shape:
            raise ValueError(
                f"{os.path.join(place, CONFIG_NAME)}: it describes {name} of shape {described[name]}, and the weights "
                f"have {shape}: expected the configuration that was saved with the weights"
            )
    expected, count = (sum(map(math.prod, it.values())) for it in (described, shapes))
    if expected > _MOST_NEW_SHARE * count + _MOST_NEW:
        raise ValueError(
            f"{os.path.join(place, CONFIG_NAME)}: it describes a model of {expected:,} weights, and {count:,} are "
            "there: expected the configuration that was saved with the weights"
        )


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as hexadecimal digits: what the Hub shows beside a large file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_sha256(folder: str | os.PathLike) -> None:
    """Write the SHA-256 of each weight file in a folder into its `config.json`, as `weights_sha256`.

    There may be none: weights of a distributed checkpoint are elsewhere. The files follow the umask from here on.
    """
    path = Path(folder) / CONFIG_NAME
    files = sorted(Path(folder).glob("*.safetensors"))
    if files:
        config = read_json(path)
        config["weights_sha256"] = {file.name: sha256(file) for file in files}
        write_json(path, config, sort_keys=True)
        for file in files:
            follow_umask(file)


def remove_former_weights(folder: str | os.PathLike) -> None:
    """Delete the whole weights or the index of shards that an earlier save left: transformers would load them."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        Path(folder, name).unlink(missing_ok=True)


def read_stated(source: str | os.PathLike, **hub) -> tuple[dict[str, Any], str | None]:
    """The `config.json` beside a model's weights, and the commit it is of.

    A configuration from elsewhere does not know what the files hold.

    Args:
        source (`str`): folder or Hub id.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        ValueError: it is damaged.
        OSError: there is none, the Hub does not give it, or it is not of a model like this.
    """
    path = cached_file(source, CONFIG_NAME, **hub)
    if path is None or not os.path.isfile(path):
        raise OSError(f"{place_of(source, hub)} has no {CONFIG_NAME}: expected a model")
    stated = read_json(path, limit=_MAXIMUM_CONFIG_BYTES)
    if stated.get("model_type") != OTDRGConfig.model_type:
        raise OSError(f"{path}: model_type is {stated.get('model_type')!r}, expected {OTDRGConfig.model_type!r}")
    listed = stated.get("weights_sha256")
    if listed is not None and not (
        isinstance(listed, dict) and all(isinstance(text, str) for item in listed.items() for text in item)
    ):
        raise ValueError(f"{path}: weights_sha256 is {listed!r}, expected the SHA-256 of each weight file by its name")
    if stated.get("transformers_weights") is not None:
        raise ValueError(
            f"{path}: transformers_weights is {stated['transformers_weights']!r}, expected weights in "
            f"{SAFE_WEIGHTS_NAME} or in the shards of {SAFE_WEIGHTS_INDEX_NAME}"
        )
    return stated, extract_commit_hash(path, None)


def check_weights(
    source: str | os.PathLike, listed: Mapping[str, str] | None, variant: str | None = None, **hub
) -> dict[str, Path]:
    """The weight files of a model, of safetensors format and as `weights_sha256` lists them.

    transformers and the Hub's client compare the size of a file only.

    Args:
        source (`str`): folder or Hub id.
        listed: SHA-256 by name, as [`record_sha256`] wrote them; without them only the format is checked.
        variant (`str`, *optional*): of the weights, as in `from_pretrained`.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        ValueError: one of them is not listed, or an index names others than safetensors files.
        OSError: a file differs from what is listed, or is missing.
    """
    place, files = place_of(source, hub), weight_files(source, variant, **hub)
    if not listed:
        return files
    for name in files:
        if name not in listed:
            raise ValueError(_unlisted(place, name))
    for name in listed:
        found = _OWN_WEIGHTS.fullmatch(name)
        if found and found["variant"] == variant and name not in files:
            raise OSError(f"{place}: {name} of weights_sha256 in {CONFIG_NAME} is not among the model's weights")
    for name, path in files.items():
        digest = sha256(path)
        if digest != listed[name]:
            remedy = f"delete {os.path.realpath(path)} and load it anew"
            if os.path.isdir(source):
                remedy = "copy it anew or, if it was changed on purpose, take weights_sha256 out of config.json"
            raise OSError(
                f"{path} is damaged, or is not what config.json beside it is of: its SHA-256 is {digest}, expected "
                f"{listed[name]}; {remedy}"
            )
    return files


def check_other_weights(source: str | os.PathLike, listed: Mapping[str, str] | None, **hub) -> None:
    """A model has no other weights beside those that are listed: none in other formats, none of another model.

    Args:
        source (`str`): folder or Hub id.
        listed: as in [`check_weights`].
        hub: some of `HUB_KEYWORDS`.

    Raises:
        ValueError: it has; the message names the file.
    """
    place = Path(place_of(source, hub))
    if os.path.isdir(source) and listed:
        for path in sorted(place.iterdir()):
            if path.suffix == ".safetensors" and path.name not in listed:
                raise ValueError(_unlisted(place, path.name))
            if _OTHER_WEIGHTS.fullmatch(path.name):
                raise ValueError(f"{_unlisted(place, path.name)}; this model's are safetensors files")
    # Of a repository only files that would be loaded are looked up: this one, by which another model is.
    if cached_file(source, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is not None:
        raise ValueError(
            f"{place / ADAPTER_CONFIG_NAME}: transformers loads another model by it, expected none: the adapter of a "
            f"model like this is described in its {CONFIG_NAME}"
        )


def _unlisted(folder: str | os.PathLike, name: str) -> str:
    return (
        f"{os.path.join(folder, name)} is not among the weight files that weights_sha256 in {CONFIG_NAME} lists: "
        "expected no others"
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
    source: str | os.PathLike, config: OTDRGConfig, own_files: Mapping[str, Path], **hub
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a model that is an adapter: the backbones' and its own, without and with LoRA.

    Args:
        source (`str`): folder or Hub id of the adapter.
        config: its configuration.
        own_files: its weight files, as [`check_weights`] gives them.
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
        except (OSError, ValueError) as error:
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
    for path in own_files.values():
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
    "check_other_weights",
    "check_shapes",
    "check_weights",
    "load_backbone",
    "read_adapter",
    "read_stated",
    "record_sha256",
    "remove_former_weights",
    "sha256",
    "weight_files",
    "weight_shapes",
]
