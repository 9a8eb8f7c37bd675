"""Work shared by processes, and models whose weights are."""

from __future__ import annotations

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def process_share(count: int) -> list[int]:
    """Positions, of `count`, that are this process's to work on.

    As many for each, so that the last ones may be the first once more: processes that share a model's weights out wait
    for each other at every layer.
    """
    state = PartialState()
    rounds = -(-count // state.num_processes)
    return [(state.process_index + number * state.num_processes) % count for number in range(rounds)]


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds its share of the weights only (FSDP2, ZeRO-3)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def open_methods(model: nn.Module, *names: str) -> None:
    """Let methods other than `forward` gather the weights that FSDP2 shares out; without FSDP2 nothing is changed."""
    if isinstance(model, FSDPModule):
        for name in names:
            register_fsdp_forward_method(model, name)


__all__ = ["is_sharded", "open_methods", "process_share"]
