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


def all_rows(x: Tensor) -> Tensor:
    """The rows of all processes, those of process 0 first; they may differ in number, and processes may have none.

    x: (N, ...) with the same further axes and dtype everywhere. Every process must call it. Returns (sum of N, ...) on x's device.
    """
    if world_size() == 1:
        return x
    counts = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    most = max(int(count) for count in counts)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
