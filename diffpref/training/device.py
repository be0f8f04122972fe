"""The processes and the device of a run."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedType

from diffpref.training.config import TrainConfig


def new_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ValueError for settings that this machine cannot run, and for ranks that do not know of each other."""
    on_cpu = not torch.cuda.is_available()  # also on a Mac, whose GPU has no float64 for the noise tables
    if (config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16" and on_cpu:
        raise ValueError("mixed_precision is fp16, which needs a GPU; on a CPU use no or bf16")
    trackers = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu, log_with=trackers, project_dir=config.output_dir)
    except ValueError as error:
        raise ValueError(f"report_to {config.report_to!r}: {error}; install it with pip install diffpref[trackers], or use none") from error
    if trackers and not accelerator.log_with:
        raise ValueError(f"report_to {config.report_to!r} is not installed; install it with pip install diffpref[trackers], or use none")
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


def pairs_per_update(config: TrainConfig, accelerator: Accelerator) -> int:
    """Pairs behind one optimizer step, all ranks together."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
