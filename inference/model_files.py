"""Load the files of a trained model, with errors that name the damaged file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ..configuration_otdrg import OTDRGConfig, find_file
from ..consensus_otdrg import consensus_settings
from ..files_otdrg import describe, read_json, read_text
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.interruptions import is_out_of_memory

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_MODEL_FILES = (_CONFIG, _GENERATION, "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", _TOKENIZER)
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: A view to test a model with.
_VIEW = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
#: Fields that configuration and processor share.
_SHARED_FIELDS = ("image_tokens", "view_fusion", "finding_text", "indication_reader", "priors")
#: Fields of a generation configuration that hold token ids, alone or in lists.
_TOKEN_FIELDS = (
    *(f"{name}_token_id" for name in ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)
#: Other fields, with their smallest and largest allowed value.
_WHOLE_FIELDS = {
    **dict.fromkeys(("max_new_tokens", "max_length"), (1, 131_072)),
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size"), (0, 131_072)),
    **dict.fromkeys(("num_beams", "num_return_sequences"), (1, 1024)),
    "top_k": (0, 2**31),
}
_NUMBER_FIELDS = {
    **dict.fromkeys(("temperature", "top_p", "guidance_scale"), (0, 1e6)),
    "repetition_penalty": (1e-6, 1e6),
    "length_penalty": (-1e6, 1e6),
}


def read_config(name: str | os.PathLike, **hub) -> OTDRGConfig:
    """The configuration of a model.

    Args:
        name: folder or Hub id.
        hub: keyword arguments out of `HUB_KEYWORDS`.

    Raises:
        ValueError: it is damaged; the message names the file.
        OSError: it is missing.
    """
    with _naming_files(name, hub, (_CONFIG,)):
        return OTDRGConfig.from_pretrained(name, **hub)


def read_processor(name: str | os.PathLike, **hub) -> OTDRGProcessor:
    """The processor of a model, tested with one view; arguments and errors as in [`read_config`]."""
    # The tokenizer reads the configuration, too.
    read_config(name, **hub)
    with _naming_files(name, hub, (*_TOKENIZER_FILES, *_IMAGE_FILES, *_TEMPLATE_FILES)):
        processor = OTDRGProcessor.from_pretrained(name, **hub)
    tried: tuple[tuple[Callable[[], Any], tuple[str, ...]], ...] = (
        (lambda: _expect_finite(processor), _IMAGE_FILES),
        (processor.default_prompt, _TEMPLATE_FILES),
        (lambda: _expect_image(processor), _TEMPLATE_FILES),
        (lambda: processor.encode_text([1], report=["The lungs are clear."]), ("tokenizer_config.json", _TOKENIZER)),
    )
    for use, files in tried:
        try:
            use()
        except Exception as error:
            raise ValueError(f"{_first(name, hub, files)}: {describe(error)}") from error
    return processor


def read_model(name: str | os.PathLike, may_lack: bool = False, **arguments) -> OTDRGForReportGeneration:
    """A model; errors as in [`read_config`].

    Args:
        name: folder or Hub id.
        may_lack: whether weights may be missing; they are then initialised at random.
        arguments: those of `from_pretrained`.
    """
    hub = {key: arguments[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in arguments}
    with _naming_files(name, hub, _MODEL_FILES):
        model, info = OTDRGForReportGeneration.from_pretrained(name, output_loading_info=True, **arguments)
    if not may_lack:
        for kind, state in (("missing_keys", "missing"), ("unexpected_keys", "not of the model it describes")):
            if info[kind]:
                raise ValueError(
                    f"{_first(name, hub, (_CONFIG,))}: {len(info[kind]):,} weights are {state}, such as "
                    f"{min(info[kind])}: expected the configuration that was saved with the weights"
                )
    _check_generation(_first(name, hub, (_GENERATION,)), model)
    return model


def _check_generation(path: str, model: OTDRGForReportGeneration) -> None:
    """Check the values of a generation configuration, which transformers does not."""
    vocabulary = model.config.text_config.vocab_size

    def is_token(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(is_token, value))
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary

    for field in (*_TOKEN_FIELDS, *_WHOLE_FIELDS, *_NUMBER_FIELDS):
        value = getattr(model.generation_config, field, None)
        if value is None:
            continue
        if field in _TOKEN_FIELDS:
            is_right, expected = is_token(value), f"token ids from 0 to {vocabulary - 1}"
        else:
            least, most = (_WHOLE_FIELDS | _NUMBER_FIELDS)[field]
            is_number = isinstance(value, int if field in _WHOLE_FIELDS else (int, float))
            is_right = is_number and not isinstance(value, bool) and least <= value <= most
            expected = f"a number from {least:,} to {most:,}"
        if not is_right:
            raise ValueError(f"{path}: {field} is {value!r}, expected {expected} or null")
    try:
        consensus_settings(model.generation_config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_fit(name: str | os.PathLike, model: OTDRGForReportGeneration, processor: OTDRGProcessor, **hub) -> None:
    """Check that a model and its processor fit, and that the vision encoder accepts the processor's views.

    Raises:
        ValueError: they do not fit; the message names the file.
    """
    path = _first(name, hub, ("processor_config.json",))
    for field in _SHARED_FIELDS:
        ours, theirs = getattr(processor, field), getattr(model.config, field)
        if ours != theirs:
            raise ValueError(f"{path}: {field} is {ours!r}, expected {theirs!r} as in {_CONFIG}")
    size, side = dict(processor.image_processor.size), model.config.image_size
    if size != {"height": side, "width": side}:
        path = _first(name, hub, _IMAGE_FILES)
        raise ValueError(f"{path}: size is {size}, expected height and width of {side} as image_size in {_CONFIG}")
    if processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"{_first(name, hub, (_TOKENIZER,))}: {processor.image_token!r} is token {processor.image_token_id}, "
            f"expected {model.config.image_token_id} as in {_CONFIG}"
        )
    inputs = processor.encode_images([_VIEW])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.device, model.dtype)
    try:
        with torch.inference_mode():
            model.encode_views(inputs["pixel_values"], inputs["view_mask"].to(model.device))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{_first(name, hub, (_CONFIG,))}: the vision encoder fails: {describe(error)}") from error


def _expect_finite(processor: OTDRGProcessor) -> None:
    if not processor.encode_images([_VIEW])["pixel_values"].isfinite().all():
        raise ValueError("views become values that are not finite: expected image_mean and image_std of pixels")


def _expect_image(processor: OTDRGProcessor) -> None:
    if processor.default_prompt().count(processor.image_token) != 1:
        raise ValueError(f"the chat template does not write {processor.image_token} once for an image")


# --- which file is damaged -------------------------------------------------------------------------------------------


@contextmanager
def _naming_files(name: str | os.PathLike, hub: dict[str, Any], files: tuple[str, ...]) -> Iterator[None]:
    """Make errors name the file at fault, and unreadable files that transformers ignores an error."""
    if os.path.isdir(name):
        _check_files(name, hub, files)
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{_first(name, hub, files)}: {describe(error)}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
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
            if file == _TOKENIZER and _is_tokenizer(_path(name, hub, file)):
                file = "tokenizer_config.json"
            raise ValueError(f"{_first(name, hub, (file,))}: {describe(cause)}") from error
    if isinstance(error, OSError) and not (os.path.isdir(name) and any(_path(name, hub, file) for file in files)):
        raise error  # a file is missing, which the error says
    rest = tuple(file for file in files if file in (*_IMAGE_FILES, _CONFIG))
    raise ValueError(f"{_first(name, hub, rest)}: {describe(error)}") from error


def _is_tokenizer(path: str) -> bool:
    """Whether a tokenizer.json can be loaded by itself."""
    try:
        PreTrainedTokenizerFast(tokenizer_file=path)
    except Exception:
        return False
    return True


def _path(name: str | os.PathLike, hub: dict[str, Any], file: str) -> str | None:
    """The path of a file in a folder or downloaded repository; None if it is missing."""
    try:
        return find_file(name, file, local_files_only=True, **hub)
    except (OSError, ValueError):
        return None


def _first(name: str | os.PathLike, hub: dict[str, Any], files: tuple[str, ...]) -> str:
    """The path of the first existing file, or where the last one would be."""
    found = (_path(name, hub, file) for file in files)
    return next((path for path in found if path is not None), str(Path(name, hub.get("subfolder") or "", files[-1])))


__all__ = ["check_fit", "read_config", "read_model", "read_processor"]
