"""The labeler `chexbert`: BERT with a head a finding (Smit et al., "CheXbert", EMNLP 2020), with its public weights."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..findings_otdrg import FINDINGS, UNMENTIONED
from . import UnreadReportsWarning

if TYPE_CHECKING:
    import torch
    from transformers import BertModel

#: The file of the public checkpoint.
CHECKPOINT_FILE = "chexbert.pth"

#: Classes of CheXbert's heads, in the order of its findings, which is that of `FINDINGS`: blank, positive, negative and
#: uncertain, and for No Finding blank and positive. A class is thereby a state's id.
HEAD_SIZES: tuple[int, ...] = (4,) * (len(FINDINGS) - 1) + (2,)

_HEAD_SIZE = 64  # of BERT's attention heads, whose number cannot be told from the shapes of weights
_PREFIX = "module."
#: Buffers that older versions of transformers saved, and weights that the labeler does not use.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_MAXIMUM_TOKENS = 512


class CheXbertLabeler:
    """States of the 14 findings by CheXbert.

    Args:
        checkpoint: a Hub id whose repository holds `chexbert.pth`, that file, or a folder that holds it.
        tokenizer: Hub id or folder of BERT's tokenizer.
        batch_size: reports at once.
        attention_heads: heads of each layer; by default the hidden size by 64, as in all published BERTs.
        device: where to run; by default the first accelerator, or else the CPU.
        progress: whether to draw a progress bar.

    Raises:
        ValueError: the checkpoint or tokenizer is not there, is not CheXbert's, or holds more than weights.
    """

    name = "chexbert"

    def __init__(
        self,
        checkpoint: str | os.PathLike = "StanfordAIMI/RRG_scorers",
        tokenizer: str | os.PathLike = "bert-base-uncased",
        batch_size: int = 32,
        attention_heads: int | None = None,
        device: str | None = None,
        progress: bool = False,
    ):
        import torch
        from transformers import AutoTokenizer

        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        path = _checkpoint_file(checkpoint)
        encoder_weights, heads = _split_weights(_load_weights(path), path)
        self.device = torch.device(device or _accelerator())
        self.encoder = _encoder(encoder_weights, attention_heads, path).to(self.device)
        self.heads = [(weight.to(self.device), bias.to(self.device)) for weight, bias in heads]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"tokenizer {tokenizer}: cannot be loaded ({reason}); expected BERT's, uncased") from None
        vocabulary = self.encoder.config.vocab_size
        if len(self.tokenizer) > vocabulary:
            raise ValueError(
                f"tokenizer {tokenizer} has {len(self.tokenizer)} tokens, {path} knows {vocabulary}: expected its own"
            )
        self.maximum_tokens = min(_MAXIMUM_TOKENS, self.encoder.config.max_position_embeddings)
        self.batch_size = batch_size
        self.progress = progress

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        Reports without text have every finding unmentioned, and reports that are too long for BERT are cut at their
        end, as CheXbert does it; a warning counts and lists both.

        Raises:
            TypeError: `reports` is a single string.
            ValueError: a report is not a string; the message gives its position.
        """
        import torch
        from tqdm.auto import tqdm

        if isinstance(reports, str):
            raise TypeError("reports is a single string: expected a list of reports")
        for position, report in enumerate(reports):
            if not isinstance(report, str):
                raise ValueError(f"report {position} is {type(report).__name__}: expected a string ('' when absent)")
        texts = [" ".join(report.split()) for report in reports]
        empty = [position for position, text in enumerate(texts) if not text]
        _warn(empty, len(texts), "hold no text: all findings unmentioned", UnreadReportsWarning)
        tokens = [self.tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in texts]
        long = [position for position, ids in enumerate(tokens) if len(ids) > self.maximum_tokens]
        _warn(long, len(texts), f"are longer than {self.maximum_tokens} tokens and were cut at their end", UserWarning)
        tokens = [
            [*ids[: self.maximum_tokens - 1], ids[-1]] if len(ids) > self.maximum_tokens else ids for ids in tokens
        ]
        states = np.full((len(texts), len(FINDINGS)), UNMENTIONED, dtype=np.int64)
        # By length, so that a batch is hardly padded.
        order = sorted(set(range(len(texts))) - set(empty), key=lambda position: len(tokens[position]))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=self.name, disable=not self.progress):
            places = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [tokens[place] for place in places]}, return_tensors="pt")
            with torch.inference_mode():
                states[places] = self._states(batch.to(self.device)).cpu().numpy()
        return states

    def _states(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, 14) state ids of a batch of tokens."""
        import torch

        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        pooled = self.encoder(**inputs).last_hidden_state[:, 0]
        logits = [torch.nn.functional.linear(pooled, weight, bias) for weight, bias in self.heads]
        return torch.stack([head.argmax(-1) for head in logits], dim=1)


def _warn(positions: list[int], reports: int, what: str, category: type[Warning]) -> None:
    if positions:
        listed = ", ".join(map(str, positions[:5])) + (", …" if len(positions) > 5 else "")
        warnings.warn(f"{len(positions)} of {reports} reports (positions {listed}) {what}", category, stacklevel=3)


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _checkpoint_file(checkpoint: str | os.PathLike) -> Path:
    path = Path(checkpoint)
    if path.is_dir():
        path = path / CHECKPOINT_FILE
    if path.is_file():
        return path
    get = f"hf download StanfordAIMI/RRG_scorers {CHECKPOINT_FILE} gets the file, option 'checkpoint' names it"
    if path.suffix == ".pth" or os.path.isabs(path) or str(checkpoint).startswith(".") or path.parent.is_dir():
        raise ValueError(f"checkpoint {path} does not exist: {get}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(str(checkpoint), CHECKPOINT_FILE))
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"checkpoint {checkpoint}: {CHECKPOINT_FILE} cannot be had from the Hub ({reason}); {get}"
        ) from None


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights, without the prefix of the parallel module it was trained in."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"checkpoint {path} holds more than weights, or is none: it was not loaded") from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or is none ({reason})") from None
    weights = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"checkpoint {path} is not CheXbert's: expected weights under 'model_state_dict'")
    return {name.removeprefix(_PREFIX): value.float() for name, value in weights.items()}


def _split_weights(
    weights: dict[str, torch.Tensor], path: Path
) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Weights of the encoder, and weight and bias of the 14 heads."""
    encoder = {name.removeprefix("bert."): value for name, value in weights.items() if name.startswith("bert.")}
    heads = []
    for position, size in enumerate(HEAD_SIZES):
        names = [f"linear_heads.{position}.{part}" for part in ("weight", "bias")]
        absent = [name for name in names if name not in weights]
        if absent:
            raise ValueError(f"checkpoint {path} is not CheXbert's: {absent[0]} ({FINDINGS[position]}) is missing")
        weight, bias = (weights[name] for name in names)
        if weight.ndim != 2 or weight.shape[0] != size or bias.shape != (size,):
            raise ValueError(
                f"checkpoint {path} is not CheXbert's: {names[0]} ({FINDINGS[position]}) has shape "
                f"{tuple(weight.shape)}, expected {size} classes"
            )
        heads.append((weight, bias))
    known = {f"linear_heads.{position}.{part}" for position in range(len(HEAD_SIZES)) for part in ("weight", "bias")}
    foreign = [name for name in weights if not name.startswith("bert.") and name not in known]
    if foreign or not encoder:
        raise ValueError(
            f"checkpoint {path} is not CheXbert's: {foreign[0] if foreign else 'bert.*'} is not as expected"
        )
    return {name: value for name, value in encoder.items() if name not in _UNUSED}, heads


def _encoder(weights: dict[str, torch.Tensor], attention_heads: int | None, path: Path) -> BertModel:
    """A BERT of the sizes that the weights have."""
    from transformers import BertConfig, BertModel

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"checkpoint {path} is not CheXbert's: bert.{name} is missing")
        return tuple(weights[name].shape)

    vocabulary, hidden = shape("embeddings.word_embeddings.weight")
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")}
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention_heads or max(1, hidden // _HEAD_SIZE),
        "intermediate_size": shape("encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape("embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
    }
    encoder = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    try:
        fit = encoder.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} is not CheXbert's: {' '.join(str(error).split())}") from None
    wrong = [*fit.missing_keys, *fit.unexpected_keys]
    if wrong:
        raise ValueError(
            f"checkpoint {path} is not CheXbert's: bert.{wrong[0]} is missing or unknown ({len(wrong)} such)"
        )
    return encoder


__all__ = ["CHECKPOINT_FILE", "HEAD_SIZES", "CheXbertLabeler"]
