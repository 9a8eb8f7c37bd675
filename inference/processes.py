"""Sharing work among processes, and models with sharded weights."""

from __future__ import annotations

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def process_share(count: int) -> list[int]:
    """The positions below `count` that this process works on.

    All processes get equally many, so that the last positions may repeat the first ones: with sharded weights,
    processes wait for each other at every layer.
    """
    state = PartialState()
    rounds = -(-count // state.num_processes)
    return [(state.process_index + number * state.num_processes) % count for number in range(rounds)]


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its share of the weights (FSDP2, ZeRO-3)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def open_methods(model: nn.Module, *names: str) -> None:
    """Let methods other than `forward` gather weights that FSDP2 has sharded; does nothing without FSDP2."""
    if isinstance(model, FSDPModule):
        for name in names:
            register_fsdp_forward_method(model, name)


__all__ = ["is_sharded", "open_methods", "process_share"]
