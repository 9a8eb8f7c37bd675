"""The device of a command, and the processes it runs in; accelerate chooses both."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .shared_work import launched_processes


def has_accelerator() -> bool:
    """Whether there is an accelerator, unless `accelerate launch --cpu` excludes it."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def join_processes(device: str | None = None) -> None:
    """Join the processes that were launched together; does nothing in a process that was launched alone.

    They exchange no tensors, so that gloo joins them on every device, and no process waits on a GPU.

    Args:
        device: that of the command; None for accelerate's choice.

    Raises:
        ValueError: fewer processes would run than were launched.
    """
    if launched_processes() == 1:
        return
    state = PartialState(cpu=device == "cpu" or not has_accelerator(), backend="gloo", timeout=timedelta(days=1))
    if state.num_processes != launched_processes():
        raise ValueError(
            f"{launched_processes()} processes were launched (WORLD_SIZE), but {state.num_processes} joined: start "
            "them with accelerate launch or torchrun"
        )


def inference_device(name: str | None = None) -> torch.device:
    """The device of a model that is not trained.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps"...; None for accelerate's choice, an accelerator if there is one. In
            several processes each has its own.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return PartialState(cpu=not has_accelerator()).device
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        if launched_processes() > 1 and device.index is not None:
            raise ValueError(f"device={name!r}: each process takes a device of its own, expected {device.type}")
        if launched_processes() > 1 and device.type == PartialState().device.type:
            device = PartialState().device
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"device={name!r}: not available here ({reason}), expected {there}") from None


__all__ = ["has_accelerator", "inference_device", "join_processes"]
