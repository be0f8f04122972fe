"""The processes, the device and the precision of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object
from torch import Tensor

from diffpref.models.attention import check_attention
from diffpref.training.config import TrainConfig
from diffpref.training.sharding import is_set, is_sharded
from diffpref.training.trackers import tracker_names

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def new_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ValueError for settings that this machine cannot run, and for ranks that do not know of each other."""
    logs = Path(str(config.output_dir)) / config.logging_dir
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("the launcher asks for Megatron-LM, which is not supported; use configs/accelerate/ddp.yaml or fsdp2.yaml")
    on_cpu = not torch.cuda.is_available()  # also on a Mac, whose GPU has no float64 for the noise tables
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    check_precision(config, precision, on_cpu)
    check_attention(config.attention, is_training=True)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=on_cpu,
        log_with=tracker_names(config.report_to) or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(logs)),
        # no buffer ever changes, and ranks may differ in the number of their forward passes
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.rank_timeout)),
        ],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported; use one process or plain data parallel"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {world} but {accelerator.num_processes} process takes part; launch with torchrun or accelerate launch"
        )
    return accelerator


def check_precision(config: TrainConfig, precision: str, on_cpu: bool) -> None:
    """Raises ValueError for a precision that the device computes not at all, or only by emulation, or that base_dtype contradicts."""
    if config.base_dtype not in ("fp32", precision):
        raise ValueError(
            f"base_dtype is {config.base_dtype}, but mixed_precision is {precision}; weights in half precision need forward passes of "
            f"the same: add --mixed_precision {config.base_dtype}, or use base_dtype fp32"
        )
    if on_cpu:
        if precision == "fp16":
            raise ValueError("mixed_precision is fp16, which needs a GPU; on a CPU use no or bf16")
        if config.allow_tf32:
            raise ValueError("allow_tf32 is true, but there is no GPU; leave it out")
        return
    if torch.cuda.is_bf16_supported(including_emulation=False):  # such cards have TF32 too
        return
    name = torch.cuda.get_device_name()
    if precision == "bf16":
        raise ValueError(f"mixed_precision is bf16, which {name} only emulates; use fp16, where the loss is scaled against underflow")
    if config.allow_tf32:
        raise ValueError(f"allow_tf32 is true, but {name} has no TF32; leave it out, or use mixed_precision fp16")


def check_ranks_agree(accelerator: Accelerator, facts: Mapping[str, object]) -> None:
    """Raises ValueError on all ranks when they were started with other settings or read other data. Every rank has to call this."""
    if accelerator.num_processes == 1:
        return
    found: list[dict[str, str]] = gather_object([{name: str(value) for name, value in facts.items()}])
    differing = [name for name in found[0] if len({str(other.get(name)) for other in found}) > 1]
    if differing:
        values = "; ".join(f"{name}: {', '.join(dict.fromkeys(str(other.get(name))[:80] for other in found))}" for name in differing)
        raise ValueError(f"the processes disagree ({values}); start all of them with the same command, on the same data")


def check_same_weights(accelerator: Accelerator, weights: Mapping[str, Tensor]) -> None:
    """Ranks hold the same weights, or the run is not data-parallel training; of sharded ones each has its own. Every rank has to call it.

    Raises RuntimeError otherwise, which no setting can cause.
    """
    if accelerator.num_processes == 1 or is_sharded(next(iter(weights.values()))):
        return
    total = torch.stack([p.detach().double().sum() for p in weights.values()])[None]
    found = accelerator.gather(total)
    if not all(torch.equal(other, found[0]) for other in found):
        raise RuntimeError("the processes hold different weights: gradients were not averaged. Please report this as a defect")


def pairs_per_update(config: TrainConfig, accelerator: Accelerator) -> int:
    """Pairs behind one optimizer step, all ranks together."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes


def effective_learning_rate(config: TrainConfig, accelerator: Accelerator) -> float:
    """The rate that the optimizer uses: learning_rate, with scale_lr times the pairs per update."""
    return config.learning_rate * (pairs_per_update(config, accelerator) if config.scale_lr else 1)
