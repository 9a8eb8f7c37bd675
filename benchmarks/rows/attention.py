"""The kinds of attention among which `otdrg.inference.attention` chooses, by type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from measure import Line, Row, in_turns, ratios
from otdrg.inference.attention import RECOMPUTED
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from .models import TYPES

TITLE = "Attention"
ABOUT = (
    "Two layers of DINOv2-small and of SmolLM2-135M with random weights on the CPU: a training step of the LLM on "
    "8 sequences of 200 tokens, the encoder on 8 views, and 8 tokens of greedy decoding for 24 sequences after "
    "200 tokens. `otdrg.inference.attention` takes the kind that is fastest for the type, and needs no more "
    "memory than `sdpa`."
)
NOTES: tuple[str, ...] = ()
_ENCODER = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
_LLM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
KINDS = ("sdpa", "eager", RECOMPUTED)


def measure(rounds: int, folder: Path) -> Row:
    lines = []
    for name, dtype in TYPES.items():
        for work, make in (("training", training), ("encoding", encoding), ("decoding", decoding)):
            seconds = in_turns({kind: make(kind, dtype) for kind in KINDS}, rounds)
            for kind in KINDS[1:]:
                lines.append(Line(f"{work}, {name}", f"time, {kind} / sdpa", ratios(seconds[kind], seconds["sdpa"])))
    return Row(lines, list(NOTES))


def llm(kind: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=2, **_LLM)).to(dtype).eval()
    model.set_attn_implementation(kind)
    return model


def training(kind: str, dtype: torch.dtype) -> Callable[[], None]:
    model = llm(kind, dtype)
    ids = torch.randint(0, 1000, (8, 200), generator=torch.Generator().manual_seed(0))
    return lambda: model(ids, labels=ids, use_cache=False).loss.backward()


def encoding(kind: str, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(num_hidden_layers=2, **_ENCODER)).to(dtype).eval()
    model.set_attn_implementation(kind)
    views = torch.randn(8, 3, 224, 224).to(dtype)

    @torch.no_grad()
    def encode() -> None:
        model(views)

    return encode


def decoding(kind: str, dtype: torch.dtype) -> Callable[[], None]:
    """Eight steps of decoding; the prompt is read before."""
    model = llm(kind, dtype)
    ids = torch.randint(0, 1000, (24, 200), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decode() -> None:
        for _ in range(8):
            model(ids[:, :1], use_cache=True, cache=cache)
        cache.crop(-8)

    with torch.no_grad():
        cache = model(ids, use_cache=True)["cache"]
    return decode
