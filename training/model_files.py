"""The files of a trained model: they are loaded here, and an error names the one that is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from ..configuration_otdrg import OTDRGConfig
from ..files_otdrg import describe, read_json, read_text
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_MODEL_FILES = (_CONFIG, _GENERATION, "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", _TOKENIZER)
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: Fields that a configuration and its processor share.
_SHARED_FIELDS = ("image_tokens", "view_fusion", "dle", "fiot", "finding_text")
#: Fields of a generation configuration, and the type of their values where they are not null.
_GENERATION_TYPES: dict[type | tuple[type, ...], tuple[str, ...]] = {
    int: ("num_beams", "max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_return_sequences", "top_k"),
    (int, float): ("temperature", "top_p", "repetition_penalty", "length_penalty", "guidance_scale"),
    bool: ("do_sample", "use_cache"),
    (int, list): ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    list: ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
}


def read_config(name: str | os.PathLike, **hub) -> OTDRGConfig:
    """The configuration of a model.

    Args:
        name: its folder or Hub id.
        hub: some of `HUB_KEYWORDS`.

    Raises:
        ValueError: it is damaged; the message names the file.
        OSError: it is not there.
    """
    with _naming_files(name, hub, (_CONFIG,)):
        return OTDRGConfig.from_pretrained(name, **hub)


def read_processor(name: str | os.PathLike, **hub) -> OTDRGProcessor:
    """The processor of a model, tried on one view; arguments and errors as of [`read_config`]."""
    with _naming_files(name, hub, (*_TOKENIZER_FILES, *_IMAGE_FILES, *_TEMPLATE_FILES)):
        processor = OTDRGProcessor.from_pretrained(name, **hub)
    view = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    tried: tuple[tuple[Callable[[], Any], tuple[str, ...]], ...] = (
        (lambda: processor.encode_images([view]), _IMAGE_FILES),
        (processor.default_prompt, _TEMPLATE_FILES),
        (lambda: _expect_image(processor), _TEMPLATE_FILES),
        (lambda: processor.encode_text([1], report=["The lungs are clear."]), (_TOKENIZER,)),
    )
    for use, files in tried:
        try:
            use()
        except Exception as error:
            raise ValueError(f"{_first(name, hub, files)}: {describe(error)}") from error
    return processor


def read_model(name: str | os.PathLike, may_lack: bool = False, **arguments) -> OTDRGForReportGeneration:
    """A model; errors are as of [`read_config`].

    Args:
        name: its folder or Hub id.
        may_lack: whether weights may be missing, which are then drawn at random.
        arguments: those of `from_pretrained`.
    """
    hub = {key: arguments[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in arguments}
    with _naming_files(name, hub, _MODEL_FILES):
        model, info = OTDRGForReportGeneration.from_pretrained(name, output_loading_info=True, **arguments)
    missing = sorted(info["missing_keys"])
    if missing and not may_lack:
        raise ValueError(
            f"{_first(name, hub, (_CONFIG,))}: {len(missing):,} weights of the model it describes are missing, such as "
            f"{missing[0]}: expected the configuration that was saved with the weights"
        )
    path = _first(name, hub, (_GENERATION,))
    for types, fields in _GENERATION_TYPES.items():
        for field in fields:
            value = getattr(model.generation_config, field, None)
            is_right = isinstance(value, types) and (types is bool or not isinstance(value, bool))
            if value is not None and not is_right:
                raise ValueError(f"{path}: {field} is {value!r}, expected {_type_names(types)} or null")
    return model


def check_fit(name: str | os.PathLike, model: OTDRGForReportGeneration, processor: OTDRGProcessor, **hub) -> None:
    """Whether a model and its processor agree on how a study is written.

    Raises:
        ValueError: they differ; the message names the file and the field.
    """
    path = _first(name, hub, ("processor_config.json",))
    for field in _SHARED_FIELDS:
        ours, theirs = getattr(processor, field), getattr(model.config, field)
        if ours != theirs:
            raise ValueError(f"{path}: {field} is {ours!r}, expected {theirs!r} as in {_CONFIG}")
    if processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"{_first(name, hub, (_TOKENIZER,))}: {processor.image_token!r} is token {processor.image_token_id}, "
            f"expected {model.config.image_token_id} as in {_CONFIG}"
        )


def _expect_image(processor: OTDRGProcessor) -> None:
    if processor.default_prompt().count(processor.image_token) != 1:
        raise ValueError(f"the chat template does not write {processor.image_token} once for an image")


def _type_names(types: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (types if isinstance(types, tuple) else (types,)))


# --- which file is damaged -------------------------------------------------------------------------------------------


@contextmanager
def _naming_files(name: str | os.PathLike, hub: dict[str, Any], files: tuple[str, ...]) -> Iterator[None]:
    """Errors name the file at fault. Files that transformers passes over when it cannot read them are errors, too."""
    if os.path.isdir(name):
        _check_files(name, hub, files)
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        _raise_named(name, hub, files, error)
    if not os.path.isdir(name):
        _check_files(name, hub, files)


def _check_files(name: str | os.PathLike, hub: dict[str, Any], files: tuple[str, ...]) -> None:
    for file in files:
        path = _path(name, hub, file)
        if path is not None and file.endswith(".json"):
            read_json(path)
        elif path is not None:
            read_text(path)


def _raise_named(name: str | os.PathLike, hub: dict[str, Any], files: tuple[str, ...], error: Exception) -> NoReturn:
    _check_files(name, hub, files)
    if isinstance(error, (OSError, ValueError)) and any(
        file in str(error) for file in (*files, ".safetensors", ".bin")
    ):
        raise error
    loaders: dict[str, Callable[..., Any]] = {
        _CONFIG: OTDRGConfig.from_pretrained,
        _GENERATION: GenerationConfig.from_pretrained,
        _TOKENIZER: AutoTokenizer.from_pretrained,
    }
    for file, load in loaders.items():
        if file not in files or _path(name, hub, file) is None:
            continue
        try:
            load(name, **hub)
        except Exception as cause:
            raise ValueError(f"{_path(name, hub, file)}: {describe(cause)}") from error
    if isinstance(error, OSError):
        raise error  # the folder or the Hub lacks something, and says so
    rest = tuple(file for file in files if file in (*_IMAGE_FILES, _CONFIG))
    raise ValueError(f"{_first(name, hub, rest)}: {describe(error)}") from error


def _path(name: str | os.PathLike, hub: dict[str, Any], file: str) -> str | None:
    """Where a file of a folder or of a downloaded repository is; None where it is not there."""
    if os.path.isdir(name):
        path = os.path.join(name, hub.get("subfolder") or "", file)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(
            name,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
    except (OSError, ValueError):
        return None


def _first(name: str | os.PathLike, hub: dict[str, Any], files: tuple[str, ...]) -> str:
    """The first of the files that is there, else where it would be."""
    found = (_path(name, hub, file) for file in files)
    return next((path for path in found if path is not None), str(Path(name, hub.get("subfolder") or "", files[-1])))


__all__ = ["check_fit", "read_config", "read_model", "read_processor"]
