"""The weight files of a model: which files they are, and whether they are the ones that were saved."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)
from transformers.utils.hub import extract_commit_hash

from .configuration_otdrg import OTDRGConfig, find_file, place_of, resolve_backbone
from .files_otdrg import describe, follow_umask, read_json, write_json

#: Names of weight files that transformers loads, with their variant. Other files beside a model are ignored.
_OWN_WEIGHTS = re.compile(r"model(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors")
#: Weight files of other formats, and files that lead transformers to another model.
_OTHER_WEIGHTS = re.compile(
    r"pytorch_model(\.[^.]+?)?(-\d+-of-\d+)?\.bin|adapter_model\..*|adapter_config\.json|tf_model\.h5|flax_model\.msgpack"
)
#: Prefix of the files of an earlier save while a new one is written.
_FORMER = ".former."
_SAVED_BESIDE = (SAFE_WEIGHTS_INDEX_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME)
#: Maximum size of a config.json or of an index of shards.
_MAXIMUM_CONFIG_BYTES = 2**24
#: A model may have up to this many times the saved weights (for instance a second vision encoder), and this many more.
_MOST_NEW_SHARE, _MOST_NEW = 2, 2**26
#: The SHA-256 of smaller files is not remembered: computing it takes less than a tenth of a second.
_SMALLEST_REMEMBERED = 2**26
#: A file changed more recently is not remembered: another change within the clock's resolution would go unseen.
_SETTLED_SECONDS = 2


# --- SHA-256 ---------------------------------------------------------------------------------------------------------


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file as hexadecimal digits, which the Hub shows for large files.

    That of a large file is remembered in `otdrg_sha256.json` in the Hugging Face home folder and computed again only
    after the file has changed.
    """
    path = os.path.realpath(path)
    state = _file_state(path)
    if state["size"] < _SMALLEST_REMEMBERED:
        return _digest(path)
    known = _remembered().get(path)
    if isinstance(known, dict) and isinstance(known.get("sha256"), str) and known.items() >= state.items():
        return known["sha256"]
    is_settled = time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) > _SETTLED_SECONDS * 10**9
    digest = _digest(path)
    if is_settled and _file_state(path) == state:
        entries = {name: entry for name, entry in _remembered().items() if os.path.isfile(name)}
        with suppress(OSError):  # a read-only cache only costs time
            _memory().parent.mkdir(parents=True, exist_ok=True)
            write_json(_memory(), {**entries, path: {**state, "sha256": digest}})
    return digest


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _file_state(path: str) -> dict[str, int]:
    stat = os.stat(path)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _memory() -> Path:
    return Path(constants.HF_HOME, "otdrg_sha256.json")


def _remembered() -> dict[str, Any]:
    try:
        return read_json(_memory())
    except (OSError, ValueError):
        return {}


def record_sha256(folder: str | os.PathLike) -> None:
    """Write the SHA-256 of each weight file in a folder into its `config.json`, as `weights_sha256`.

    A folder without weight files (a distributed checkpoint has them elsewhere) is left as it is. The files get the
    permissions of the umask: safetensors writes files that only their owner can read.
    """
    path = Path(folder) / CONFIG_NAME
    files = [file for file in sorted(Path(folder).glob("*.safetensors")) if not file.name.startswith(".")]
    if files:
        for file in files:
            follow_umask(file)
        config = read_json(path)
        config["weights_sha256"] = {file.name: sha256(file) for file in files}
        write_json(path, config, sort_keys=True)


@contextmanager
def replaced_weights(folder: str | os.PathLike) -> Iterator[None]:
    """Replace the weights and configuration of an earlier save; transformers would load its weights beside new ones.

    They are put aside under names with [`_FORMER`] and deleted once the new ones are saved; after an error they are as
    before. If the process is killed they stay, and the next save replaces them or, after an error, restores them.
    """
    folder = Path(folder)
    if Path(folder, _FORMER + CONFIG_NAME).exists():
        for path in _saved(folder):  # what the killed process had written
            path.unlink()
    for path in _saved(folder):
        path.replace(path.with_name(_FORMER + path.name))
    try:
        yield
    except BaseException:
        for path in _saved(folder):
            path.unlink()
        for path in _saved(folder, _FORMER):
            path.replace(path.with_name(path.name.removeprefix(_FORMER)))
        raise
    for path in reversed(_saved(folder, _FORMER)):
        path.unlink()


def _saved(folder: Path, prefix: str = "") -> list[Path]:
    """The weights, index of shards and configuration of a save whose names have a prefix, `config.json` last."""
    found = []
    for path in sorted(folder.glob(f"{prefix}*")):
        name = path.name.removeprefix(prefix)
        weights = _OWN_WEIGHTS.fullmatch(name)
        if (weights and not weights["variant"]) or name in _SAVED_BESIDE:
            found.append(path)
    return sorted(found, key=lambda path: path.name == prefix + CONFIG_NAME)


def _interrupted(folder: str | os.PathLike) -> str:
    """What an error adds where a save was interrupted: the names of the files that it was to replace."""
    former = [path.name for path in _saved(Path(folder), _FORMER)]
    if not former:
        return ""
    return f"; a save was interrupted, the files before it are {', '.join(former)}: rename them without {_FORMER!r}"


# --- which files a model has -----------------------------------------------------------------------------------------


def weight_files(source: str | os.PathLike, variant: str | None = None, **hub) -> dict[str, Path]:
    """The weight files of a folder, a Hub id or a GGUF file, by name; those of a Hub id are downloaded.

    Args:
        source (`str`): folder, Hub id or GGUF file.
        variant (`str`, *optional*): of the weights, as in `from_pretrained`.
        hub: keyword arguments out of `HUB_KEYWORDS`.

    Raises:
        ValueError: an index of shards names something else than safetensors files beside it.
        OSError: there are no weights in safetensors format, or the Hub cannot be reached.
    """
    name, kwargs = resolve_backbone(str(source))
    if "gguf_file" in kwargs:
        return {kwargs["gguf_file"]: Path(cached_file(name, kwargs["gguf_file"], **hub))}
    wanted, wanted_index = (_with_variant(file, variant) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    # The order in which transformers tries them.
    whole = find_file(name, wanted, **hub)
    if whole is not None:
        return {wanted: Path(whole)}
    index = find_file(name, wanted_index, **hub)
    if index is None:
        pickle = _pickle(name, variant, hub)
        raise OSError(
            f"{place_of(source, hub)} has no {wanted}, and no {wanted_index} either"
            + (f": {pickle} can run code when it is loaded, save the model anew in safetensors format" * bool(pickle))
            + _interrupted(place_of(name, hub))
        )
    shards = read_json(index, parse=_shards, limit=_MAXIMUM_CONFIG_BYTES)
    files = {shard: Path(cached_file(name, shard, **hub)) for shard in shards}
    if os.path.isdir(name):
        for shard, path in files.items():
            _check_link(index, shard, path)
    return files


def _shards(index: dict[str, Any]) -> list[str]:
    """The shards that an index names, all of them safetensors files in the folder of the index."""
    shards = sorted(set(index["weight_map"].values()))
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard):
            raise ValueError(f"weight_map names {shard!r}, expected safetensors files in the folder of the index")
    return shards


def _check_link(index: str, shard: str, path: Path) -> None:
    """A shard may be a link within its folder or, in a snapshot of the Hub's cache, a link into its blobs."""
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


# --- checks before loading -------------------------------------------------------------------------------------------


def read_stated(source: str | os.PathLike, **hub) -> tuple[dict[str, Any], str | None]:
    """The `config.json` beside a model's weights, which describes them, and its commit on the Hub.

    Raises:
        ValueError: it is damaged.
        OSError: it is missing, the Hub cannot be reached, or it belongs to another type of model.
    """
    path = cached_file(source, CONFIG_NAME, **hub)
    if path is None or not os.path.isfile(path):
        place = place_of(source, hub)
        raise OSError(f"{place} has no {CONFIG_NAME}: expected a model{_interrupted(place)}")
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
    """The weight files of a model, after comparing them with `weights_sha256`.

    transformers and huggingface_hub compare only the size of a file.

    Args:
        source (`str`): folder or Hub id.
        listed: SHA-256 by file name, as [`record_sha256`] writes them; without them only the format is checked.
        variant (`str`, *optional*): of the weights, as in `from_pretrained`.
        hub: keyword arguments out of `HUB_KEYWORDS`.

    Raises:
        ValueError: a file is not listed, or an index names other files than safetensors files.
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
                f"{path} is damaged, or does not belong to config.json beside it: its SHA-256 is {digest}, expected "
                f"{listed[name]}; {remedy}"
            )
    return files


def check_other_weights(source: str | os.PathLike, listed: Mapping[str, str] | None, **hub) -> None:
    """Refuse weights beside a model that are not listed in its configuration, of other formats or of another model.

    Raises:
        ValueError: there are such weights; the message names the file.
    """
    place = Path(place_of(source, hub))
    if os.path.isdir(source) and listed:
        for path in sorted(place.iterdir()):
            if path.suffix == ".safetensors" and path.name not in listed and not path.name.startswith("."):
                raise ValueError(_unlisted(place, path.name))
            if _OTHER_WEIGHTS.fullmatch(path.name):
                raise ValueError(f"{_unlisted(place, path.name)}; this model has safetensors files")
    # In a repository only files that would be loaded matter, and this one makes transformers load another model.
    if find_file(source, ADAPTER_CONFIG_NAME, **hub) is not None:
        raise ValueError(
            f"{place / ADAPTER_CONFIG_NAME}: transformers would load another model because of it, expected no such "
            f"file: the adapters of this model are described in its {CONFIG_NAME}"
        )


def _unlisted(folder: str | os.PathLike, name: str) -> str:
    return (
        f"{os.path.join(folder, name)} is not among the weight files that weights_sha256 in {CONFIG_NAME} lists: "
        "expected no others"
    )


def weight_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in safetensors files by name, read from the files' headers.

    Raises:
        OSError: a file is not a complete safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files.values():
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            problem = f"{path} is not a whole safetensors file: {describe(error)}"
            raise OSError(problem + _interrupted(path.parent)) from None
    return shapes


def check_shapes(place: str, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration that describes another model than the saved weights.

    transformers would create weights that are missing or do not fit, however much memory they take.

    Args:
        place: folder or Hub id, for the message.
        model: created from the configuration, on the device "meta".
        shapes: of the saved weights; names that the model does not have are ignored.

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
            f"{os.path.join(place, CONFIG_NAME)}: it describes a model of {expected:,} weights, and {count:,} were "
            "saved: expected the configuration that was saved with the weights"
        )


__all__ = [
    "check_other_weights",
    "check_shapes",
    "check_weights",
    "read_stated",
    "record_sha256",
    "replaced_weights",
    "sha256",
    "weight_files",
    "weight_shapes",
]
