"""Data-parallel training of small networks on a few CPU cores: one single-threaded process per core.

At these sizes one process per core with parameter averaging every few steps does about twice the work of one process
with several threads, and its result depends on the step counts and the seed only, not on the speed of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

AVERAGE_EVERY = 8


def run_parallel(work: Callable[..., None], num_processes: int, *args: Any) -> None:
    """Call `work(rank, num_processes, *args)` in `num_processes` single-threaded processes and wait for them."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(29600 + os.getpid() % 300)
    mp.spawn(_enter, (num_processes, work, args), nprocs=num_processes)


def _enter(rank: int, num_processes: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_processes)
    try:
        work(rank, num_processes, *args)
    finally:
        dist.destroy_process_group()


def average_parameters(module: nn.Module) -> None:
    """Replace every parameter by its mean over the processes, in one message."""
    with torch.no_grad():
        flat = torch.cat([p.flatten() for p in module.parameters()])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, mean in zip(module.parameters(), flat.split([p.numel() for p in module.parameters()]), strict=True):
            p.copy_(mean.view_as(p))
