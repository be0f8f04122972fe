"""Weights, gradients and optimizer state split over the processes: torch's fully_shard (FSDP2), one unit per block of the UNet.

Sharded is what is trained, and by itself the frozen copy that full training compares with. Checkpoints and the export hold whole tensors,
so that a run may go on with another number of processes.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffpref.training.config import TrainConfig
from diffpref.training.objective import Objective

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

UNITS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes whose weights are gathered together, when they are needed; all others belong to the whole model's unit."""
_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_STAGES: dict[str, Literal["weights", "gradients"]] = {"2": "gradients", "3": "weights"}


def asked_by_launcher() -> Literal["weights", "gradients"] | None:
    """What a configuration of accelerate for FSDP or DeepSpeed asks for, as a value of `shard`; the request is then taken over.

    accelerate's wrapper for FSDP prepares one model, on GPUs only, and leaves a frozen reference whole. Of DeepSpeed, ZeRO-2 splits what
    `gradients` splits and ZeRO-3 what `weights` splits; torch does both. Raises ValueError for FSDP1, for other stages of ZeRO, for a
    DeepSpeed file of its own and for weights or optimizer state kept in RAM.
    """
    if is_set(_DEEPSPEED):
        return _deepspeed_stage()
    if not is_set(_FSDP):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version is {version}; this program shards with version 2: see configs/accelerate/fsdp2.yaml")
    if is_set("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params is true, which is not supported; set it to false")
    os.environ[_FSDP] = "false"
    return "weights" if is_set("FSDP_RESHARD_AFTER_FORWARD", "true") else "gradients"


def is_set(name: str, otherwise: str = "false") -> bool:
    """Whether a variable of the environment says yes, as a launcher writes it."""
    return os.environ.get(name, otherwise).lower() in ("true", "1")


def _deepspeed_stage() -> Literal["weights", "gradients"]:
    for part in ("config_file", "offload_optimizer_device", "offload_param_device"):
        value = os.environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}", "none")
        if value.lower() != "none":
            setting = f"deepspeed_{part}" if part == "config_file" else part
            raise ValueError(f"{setting} is {value}, which is not supported; leave it out: see configs/accelerate/deepspeed_zero2.yaml")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in _STAGES:
        raise ValueError(f"zero_stage is {stage}; accepted: 2, 3. To split nothing, use configs/accelerate/ddp.yaml")
    os.environ[_DEEPSPEED] = "false"
    return _STAGES[stage]


def check_sharding(config: TrainConfig, objective: Objective) -> None:
    """Raises ValueError for what needs whole weights, and for forward passes that processes do not make together."""
    if config.shard == "no":
        return
    where = f"shard is {config.shard}, but "
    for name in ("use_ema", "validation_steps", "reference_update_steps", "train_text_encoder", "use_dora", "compile"):
        if getattr(config, name):
            raise ValueError(f"{where}{name} is {getattr(config, name)}, which does not work with split weights; use shard no, or drop it")
    if config.base_dtype != "fp32":
        raise ValueError(f"{where}base_dtype is {config.base_dtype}; weights of one unit must have one dtype: use base_dtype fp32")
    if config.optimizer != "adamw":
        raise ValueError(f"{where}optimizer is {config.optimizer}, which looks at whole tensors; use adamw, or shard no")
    if objective.conditioning or objective.source:
        raise ValueError(f"{where}method {config.method} asks its network outside of the shared forward passes; use shard no")
    if not getattr(objective.path, "equal_forwards", True):
        remedy = "leave sampled_steps out" if hasattr(objective.path, "sampled_steps") else "add --equal_forwards"
        raise ValueError(f"{where}processes would ask the network different numbers of times; {remedy}, or use shard no")


def share_out(config: TrainConfig, module: nn.Module, frozen_copy: nn.Module | None) -> nn.Module | None:
    """Split the trained module and its frozen copy in place, as `shard` asks; an outline of the module, None where nothing is split.

    Every process has to call this, with equal weights. Raises ValueError without a process group.
    """
    if config.shard == "no":
        return None
    if not dist.is_initialized():
        raise ValueError(f"shard is {config.shard}, but there is one process; launch several with torchrun or accelerate, or use shard no")
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    outline = copy.deepcopy(module, dict(empty))
    for part in (module, frozen_copy):
        if part is not None:
            _split(part, again=config.shard == "weights" or part is frozen_copy)  # no backward pass would ever drop gathered frozen weights
    return outline


def _split(module: nn.Module, again: bool) -> None:
    """again: drop gathered weights after the forward pass, and gather them once more for the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    for part in list(module.modules()):
        if type(part).__name__ in UNITS:
            fully_shard(part, mesh=mesh, reshard_after_forward=again)
    fully_shard(module, mesh=mesh, reshard_after_forward=again)


def is_sharded(x: Tensor) -> bool:
    """Whether this process has a part of `x` only."""
    return hasattr(x, "device_mesh")


def whole(x: Tensor) -> Tensor:
    """All of a tensor; every process has to call this for a sharded one."""
    return x.detach().full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def collected(x: Tensor) -> Tensor:
    """All of a sharded tensor in the RAM of process 0, nothing elsewhere; `x` itself if it is not sharded. Every process has to call it."""
    if not is_sharded(x):
        return x
    full = whole(x)
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def split_as(x: Tensor, example: Tensor) -> Tensor:
    """The whole tensor `x`, split as `example` is, of which it has the shape; `x` itself where that is not sharded."""
    if not is_sharded(example) or x.shape != example.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    split: DTensor = example  # type: ignore[assignment]
    return distribute_tensor(x.to(split.device), split.device_mesh, split.placements, src_data_rank=None)


def filled(outline: nn.Module, module: nn.Module) -> nn.Module:
    """`outline` with the whole weights of the sharded `module` in process 0; elsewhere empty. Every process has to call this."""
    weights = {name: collected(p) for name, p in module.named_parameters()}
    for name, p in list(outline.named_parameters()):
        owner, _, own = name.rpartition(".")
        outline.get_submodule(owner)._parameters[own] = nn.Parameter(weights[name], requires_grad=p.requires_grad)
    return outline
