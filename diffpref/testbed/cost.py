"""What an update costs: CPU seconds, network evaluations per picture, peak of memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

SHORT, LONG = 2, 8
"""Updates of the two trainings whose difference is measured, so that loading and encoding cancel."""
ROUNDS = 3
"""Times that both are trained; the least counts, for whatever else a machine does only adds."""


@dataclass
class Evaluations:
    """Pictures that went through a UNet, with and without a gradient."""

    with_gradient: int = 0
    without_gradient: int = 0


@contextmanager
def counted_evaluations() -> Iterator[Evaluations]:
    """Count the pictures of every UNet call inside the block."""
    counts = Evaluations()

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            if torch.is_grad_enabled():
                counts.with_gradient += len(args[0])
            else:
                counts.without_gradient += len(args[0])

    hook = register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def update_cost(train: Callable[[int], None], pictures_per_update: int) -> dict[str, float]:
    """Cost of an update of `train(updates)`, which trains from the beginning. For a process that does nothing else.

    The first training of a process also pays for what is loaded and set up once, so that a short one goes before those that count.
    """
    train(SHORT)
    seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
    counts = {}
    for updates in (SHORT, LONG) * ROUNDS:
        start = time.process_time()
        with counted_evaluations() as counts[updates]:
            train(updates)
        seconds[updates].append(time.process_time() - start)
    images = (LONG - SHORT) * pictures_per_update
    return {
        "cpu_seconds_per_update": (min(seconds[LONG]) - min(seconds[SHORT])) / (LONG - SHORT),
        "evaluations_with_gradient": (counts[LONG].with_gradient - counts[SHORT].with_gradient) / images,
        "evaluations_without_gradient": (counts[LONG].without_gradient - counts[SHORT].without_gradient) / images,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
