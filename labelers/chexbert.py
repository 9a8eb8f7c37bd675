"""The labeler `chexbert`: BERT with a head for each finding (Smit et al., "CheXbert", EMNLP 2020), public weights."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..findings_otdrg import FINDINGS, UNMENTIONED
from ..runtime.printable import listed
from . import ReportsWarning, check_reports, warn_of_reports

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: The file of the public checkpoint.
CHECKPOINT_FILE = "chexbert.pth"

#: Number of classes of each head: blank, positive, negative and uncertain; for No Finding blank and positive. The heads
#: are in the order of `FINDINGS`, and the class is the id of the state.
HEAD_SIZES: tuple[int, ...] = tuple(2 if name == "no_finding" else 4 for name in FINDINGS)

_HEAD_SIZE = 64  # of BERT's attention heads; their number cannot be derived from the shapes of the weights
_PREFIX = "module."
#: Buffers saved by older versions of transformers, and weights of the pooler, which the labeler does not use.
_UNUSED = ("bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
_MAXIMUM_TOKENS = 512
_LISTED = 5


class CheXbertLabeler:
    """Reads finding states with CheXbert: one linear head for each finding on BERT's [CLS] state.

    Args:
        checkpoint: the file `chexbert.pth`, a folder that contains it, or a Hub id of a repository that does.
        tokenizer: Hub id or folder of the uncased BERT tokenizer or vocabulary.
        batch_size: reports in a batch.
        attention_heads: attention heads of each layer; by default the hidden size divided by 64, as in all published
            BERTs. All other sizes are read from the checkpoint.
        device: by default accelerate's choice, see [`inference_device`].
        progress: show a progress bar.

    Raises:
        ValueError: a wrong option, or the checkpoint or tokenizer is missing, is not CheXbert's, or contains more
            than weights.
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
        for option, value in {"checkpoint": checkpoint, "tokenizer": tokenizer}.items():
            if not isinstance(value, str | os.PathLike) or not str(value):
                raise ValueError(f"{option}={value!r}: expected a Hub id or a path")
        _check_count("batch_size", batch_size)
        if attention_heads is not None:
            _check_count("attention_heads", attention_heads)
        # Imported here, because it imports torch.
        from ..runtime.devices import inference_device

        self.device = inference_device(device)
        path = _checkpoint_file(checkpoint)
        self.network = _network(_load_weights(path), attention_heads, path).to(self.device)
        config = self.network["bert"].config
        self.tokenizer = _load_tokenizer(tokenizer, config.vocab_size, path)
        self.maximum_tokens = min(_MAXIMUM_TOKENS, config.max_position_embeddings)
        self.batch_size = batch_size
        self.progress = progress

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        Reports without any known token (empty, control characters, an unknown script) have all findings unmentioned.
        Reports longer than BERT's limit are truncated at their end, as CheXbert does. Warnings count and list both.

        Raises:
            TypeError, ValueError: as [`check_reports`].
        """
        import torch
        from tqdm.auto import tqdm

        check_reports(reports)
        tokens = [
            self.tokenizer(" ".join(report.split()), truncation=False, verbose=False)["input_ids"] for report in reports
        ]
        # The special tokens include the unknown token.
        special = {*self.tokenizer.all_special_ids}
        unread = [position for position, ids in enumerate(tokens) if special.issuperset(ids)]
        warn_of_reports(unread, len(tokens), "hold no word BERT knows: all findings unmentioned")
        long = [position for position, ids in enumerate(tokens) if len(ids) > self.maximum_tokens]
        cut = f"are longer than {self.maximum_tokens} tokens and were cut at their end"
        warn_of_reports(long, len(tokens), cut, ReportsWarning)
        for position in long:
            tokens[position] = [*tokens[position][: self.maximum_tokens - 1], self.tokenizer.sep_token_id]
        states = np.full((len(tokens), len(FINDINGS)), UNMENTIONED, dtype=np.int64)
        # Sorted by length, so that batches need little padding.
        order = sorted(set(range(len(tokens))) - set(unread), key=lambda position: len(tokens[position]))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=self.name, disable=not self.progress):
            places = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [tokens[place] for place in places]}, return_tensors="pt")
            with torch.inference_mode():
                states[places] = self._classes(batch.to(self.device)).cpu().numpy()
        return states

    def _classes(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, 14) classes of a batch of tokens, in the order of `FINDINGS`."""
        import torch

        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        first = self.network["bert"](**inputs).last_hidden_state[:, 0]
        return torch.stack([head(first).argmax(-1) for head in self.network["linear_heads"]], dim=1)


def _check_count(option: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{option}={value!r}: expected a whole number, at least 1")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _load_tokenizer(name: str | os.PathLike, vocabulary: int, checkpoint: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, BertTokenizerFast

    # BERT was first published with a vocabulary only, which AutoTokenizer does not accept.
    files = {path.name for path in Path(name).iterdir()} if Path(name).is_dir() else set()
    bare = "vocab.txt" in files and not files & {"tokenizer.json", "tokenizer_config.json"}
    try:
        tokenizer = (BertTokenizerFast if bare else AutoTokenizer).from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the parser of tokenizer.json raises plain Exception
        get = "get it with hf download bert-base-uncased vocab.txt --local-dir bert, and option tokenizer=bert"
        raise ValueError(f"tokenizer {name}: cannot be loaded ({_reason(error)}); {get}") from None
    # The ids of another BERT's tokenizer have other meanings.
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"tokenizer {name} has {len(tokenizer)} tokens, {checkpoint} has {vocabulary}: expected its own"
        )
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    if None in [*ends, tokenizer.pad_token_id] or tokenizer("")["input_ids"] != ends:
        raise ValueError(f"tokenizer {name} does not put a text between [CLS] and [SEP]: expected BERT's, uncased")
    return tokenizer


def _checkpoint_file(checkpoint: str | os.PathLike) -> Path:
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / CHECKPOINT_FILE
    if path.is_file():
        return path
    get = f"get it with hf download StanfordAIMI/RRG_scorers {CHECKPOINT_FILE}, and set option checkpoint to its path"
    name = str(checkpoint)
    if path.suffix == ".pth" or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ValueError(f"checkpoint {path} does not exist: {get}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(name, CHECKPOINT_FILE))
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(
            f"checkpoint {name}: no such folder, and {CHECKPOINT_FILE} cannot be downloaded from the Hub "
            f"({_reason(error)}); {get}"
        ) from None


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The used weights of the checkpoint, without the prefix of the parallel module it was trained in."""
    import torch

    try:
        with warnings.catch_warnings():
            # A damaged file is reported below, in one line.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"checkpoint {path} holds more than weights, or is damaged: it was not loaded") from None
    except Exception as error:  # damaged files raise any exception
        raise ValueError(f"checkpoint {path} is damaged or unreadable ({_reason(error)})") from None
    saved = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(saved, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in saved.items()
    ):
        raise ValueError(f"checkpoint {path} is not CheXbert's: expected weights under 'model_state_dict'")
    weights = {name.removeprefix(_PREFIX): value for name, value in saved.items()}
    weights = {name: value for name, value in weights.items() if name not in _UNUSED}
    # Such weights would silently predict the first class, which is blank.
    wrong = [name for name, value in weights.items() if not (value.is_floating_point() and value.isfinite().all())]
    if wrong:
        raise ValueError(
            f"checkpoint {path} is damaged: {listed(wrong, _LISTED)} have values that are not finite numbers"
        )
    return {name: value.float() for name, value in weights.items()}


def _network(weights: dict[str, torch.Tensor], attention_heads: int | None, path: Path) -> torch.nn.ModuleDict:
    """BERT and the heads, with the sizes and names of the weights."""
    import torch
    from transformers import BertConfig, BertModel

    def size(name: str, axis: int = 0) -> int:
        name = f"bert.{name}.weight"
        if name not in weights:
            raise ValueError(f"checkpoint {path} is not CheXbert's: {name} is missing")
        if weights[name].ndim != 2:
            raise ValueError(f"checkpoint {path} is not CheXbert's: {name} has {weights[name].ndim} axes, expected 2")
        return weights[name].shape[axis]

    layers = {name.split(".")[3] for name in weights if name.startswith("bert.encoder.layer.")}
    layers = {layer for layer in layers if layer.isdigit()}
    hidden = size("embeddings.word_embeddings", axis=1)
    count = attention_heads or max(1, hidden // _HEAD_SIZE)
    if hidden % count:
        raise ValueError(f"attention_heads={count}: expected a divisor of the hidden size of {path}, {hidden}")
    config = BertConfig(
        vocab_size=size("embeddings.word_embeddings"),
        hidden_size=hidden,
        num_hidden_layers=len(layers),
        num_attention_heads=count,
        intermediate_size=size("encoder.layer.0.intermediate.dense"),
        max_position_embeddings=size("embeddings.position_embeddings"),
        type_vocab_size=size("embeddings.token_type_embeddings"),
    )
    # Initial weights are random; the state of the generator is restored.
    with torch.random.fork_rng(devices=[]):
        heads = torch.nn.ModuleList(torch.nn.Linear(hidden, classes) for classes in HEAD_SIZES)
        network = torch.nn.ModuleDict({"bert": BertModel(config, add_pooling_layer=False), "linear_heads": heads})
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} is not CheXbert's: {_reason(error)}") from None
    return network.eval()
