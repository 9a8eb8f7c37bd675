"""Training in several processes: joining them as they were launched, and models with sharded weights."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, is_deepspeed_available, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .devices import has_accelerator
from .shared_work import launched_processes


def device_arguments(use_cpu: bool = False, deepspeed: bool = False) -> dict[str, Any]:
    """The fields of `TrainingArguments` that choose the device and the backend between processes.

    Args:
        use_cpu: whether the recipe asks for the CPU.
        deepspeed: whether the recipe has a DeepSpeed configuration.
    """
    if has_accelerator() and not use_cpu:
        return {"use_cpu": False}
    # With `use_cpu` accelerate ignores DeepSpeed, and without a backend the other processes.
    return {"use_cpu": False, "ddp_backend": "gloo"} if deepspeed or _wants_deepspeed() else {"use_cpu": True}


def start_processes(fsdp: bool = False, deepspeed: bool = False) -> PartialState:
    """Join the processes that were launched together.

    Args:
        fsdp, deepspeed: whether a stage of the recipe asks for them; `accelerate launch` may ask as well.

    Raises:
        ValueError: more processes, FSDP or DeepSpeed were asked for than would run: accelerate continues with one
            process, or with DDP, without an error.
    """
    if (fsdp or _wants_fsdp()) and not has_accelerator():
        raise ValueError(
            "FSDP was asked for (field fsdp or ACCELERATE_USE_FSDP) and there is no GPU, where accelerate trains by "
            "DDP instead: use recipes/accelerate/cpu.yaml, or zero3.yaml, whose sharding works on CPU too"
        )
    if (deepspeed or _wants_deepspeed()) and not is_deepspeed_available():
        raise ValueError(
            "DeepSpeed was asked for (field deepspeed or ACCELERATE_USE_DEEPSPEED) and is not there: pip install "
            "deepspeed"
        )
    launched = launched_processes()
    arguments = device_arguments(deepspeed=deepspeed)
    state = PartialState(cpu=arguments["use_cpu"], backend=arguments.get("ddp_backend"))
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched (WORLD_SIZE), but each trains alone, in a world of "
            f"{state.num_processes}: start them with accelerate launch or torchrun"
        )
    if _wants_deepspeed() and state.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED), but this process would train without it: start it by "
            "accelerate launch --config_file recipes/accelerate/zero3.yaml"
        )
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"one process was launched and sees {torch.cuda.device_count()} GPUs, over which transformers would spread "
            "each batch by DataParallel: use --config_file recipes/accelerate/ddp.yaml, or CUDA_VISIBLE_DEVICES=0"
        )
    return state


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its share of the weights (FSDP2, ZeRO-3)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def open_methods(model: nn.Module, *names: str) -> None:
    """Let methods other than `forward` gather weights that FSDP2 has sharded; does nothing without FSDP2."""
    if isinstance(model, FSDPModule):
        for name in names:
            register_fsdp_forward_method(model, name)


def wrapper_name(model: nn.Module) -> str | None:
    """What joins the processes: `DistributedDataParallel`, `FSDP2`, `DeepSpeed ZeRO-3`...; None for one process."""
    model = getattr(model, "_orig_mod", model)
    name = type(model).__name__
    if name == "DeepSpeedEngine":
        return f"DeepSpeed ZeRO-{model.zero_optimization_stage()}"
    if name in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        return name
    return "FSDP2" if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else None


def check_wrapper(model: nn.Module, fsdp: bool = False, deepspeed: bool = False) -> str | None:
    """[`wrapper_name`] of the model as it is trained.

    Args:
        model: the wrapped model.
        fsdp, deepspeed: whether the stage's section asks for them.

    Raises:
        ValueError: it is not what was asked for, or its weights are not sharded under ZeRO-3.
    """
    name = wrapper_name(model)
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    wanted = None
    if _wants_fsdp():
        wanted = "FSDP2" if os.environ.get("FSDP_VERSION") == "2" else "FullyShardedDataParallel"
    elif _wants_deepspeed() and stage is not None:
        wanted = f"DeepSpeed ZeRO-{stage}"
    elif fsdp or deepspeed:
        wanted = name if (name or "").startswith(("FSDP2", "Fully") if fsdp else "DeepSpeed") else "FSDP or DeepSpeed"
    elif PartialState().num_processes > 1 and not _wants_deepspeed():
        wanted = "DistributedDataParallel"
    if wanted is not None and name != wanted:
        raise ValueError(f"{wanted} was asked for, but the model would be trained by {name or 'one process alone'}")
    if name == "DeepSpeed ZeRO-3" and not is_sharded(model):
        raise ValueError("DeepSpeed ZeRO-3 was asked for, but the model's weights are not partitioned")
    return name


def weightless_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with its weights on the device `meta` and its configuration shared."""
    shared = {id(model.config): model.config}
    for weight in model.parameters():
        shared[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
    return copy.deepcopy(model, shared)


def fill(model: nn.Module, sharded: nn.Module) -> nn.Module:
    """Fill a [`weightless_copy`] with the weights of the sharded model it was made from; every process must call it.

    Every process gets the whole model in main memory, because a GPU may have no room for it beside its share.
    (`accelerator.get_state_dict` gives it to the first process only, and under ZeRO-3 in 16 bits.)
    """
    whole: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for place, part in sharded.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            if id(weight) not in whole:
                whole[id(weight)] = nn.Parameter(_gathered(weight), requires_grad=weight.requires_grad)
            modules[place].register_parameter(name, whole[id(weight)])
        for name, buffer in part.named_buffers(recurse=False):
            setattr(modules[place], name, buffer.cpu())
    # Otherwise transformers would partition every model that it loads from now on under ZeRO-3.
    unset_hf_deepspeed_config()
    return model.train(sharded.training)


def _gathered(weight: nn.Parameter) -> torch.Tensor:
    if isinstance(weight, DTensor):
        return weight.detach().full_tensor().cpu()
    if not hasattr(weight, "ds_id"):
        return weight.detach().clone().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone().cpu()


def _wants_fsdp() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def _wants_deepspeed() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


__all__ = [
    "check_wrapper",
    "device_arguments",
    "fill",
    "is_sharded",
    "open_methods",
    "start_processes",
    "weightless_copy",
    "wrapper_name",
]
