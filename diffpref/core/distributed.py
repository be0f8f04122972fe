"""Batch statistics over all processes; without a process group they are those of this process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that take part, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Elementwise sum of `x` over the processes, without gradient. Every process must call it."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_mean(total: Tensor, count: Tensor | float) -> Tensor:
    """Sum of `total` divided by sum of `count` over the processes, without gradient; 0 where nothing was counted.

    total: any shape; count: the number of summands behind it, same shape or a number. The pair, rather than a mean of means,
    keeps the result independent of how samples are spread over processes.
    """
    counts = torch.as_tensor(count, dtype=total.dtype, device=total.device).expand_as(total)
    both = all_sum(torch.stack([total, counts]))
    return both[0] / both[1].clamp(min=1)


def all_max(value: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
