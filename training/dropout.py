"""Dropout of LoRA layers, which takes a large part of a training step on a CPU."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

#: Random numbers of 16 bits are drawn four at a time.
_BITS, _AT_ONCE = 16, 4


class FastDropout(nn.Dropout):
    """`nn.Dropout` with fewer random numbers on a CPU: p is rounded to a multiple of 2^-16.

    Elsewhere it is `nn.Dropout` itself. Under autocast it returns the type that the next layer computes in.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 2**_BITS)
        if not self.training or input.device.type != "cpu" or self.inplace or not 0 < dropped < 2**_BITS:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        draws = torch.randint(-(2**63), 2**63 - 1, (-(-input.numel() // _AT_ONCE),)).view(torch.int16)
        is_dropped = draws[: input.numel()].view(input.shape) < dropped - 2 ** (_BITS - 1)
        return input.masked_fill(is_dropped, 0.0) * (2**_BITS / (2**_BITS - dropped))


def use_fast_dropout(model: nn.Module) -> None:
    """Replace the dropout of all LoRA layers by [`FastDropout`]."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dropout in layer.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    layer.lora_dropout[name] = FastDropout(dropout.p).train(dropout.training)


__all__ = ["FastDropout", "use_fast_dropout"]
