"""The weights that are looked at and kept, where these are not the ones that are trained: a moving average, or the optimizer's own.

    average <- d average + (1 - d) weights        after every optimizer step that was taken, d = min(ema_decay, (1 + n) / (10 + n))

n counts those steps: early on the average follows closely, so that it does not remember the starting weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ema:
    """An exponential moving average of the trained tensors in float32, on their devices."""

    decay: float
    average: dict[str, Tensor]
    updates: int = 0

    @classmethod
    def start(cls, decay: float, trainable: Mapping[str, Tensor]) -> Ema:
        """A copy of the present weights."""
        return cls(decay, {name: p.detach().float().clone() for name, p in trainable.items()})

    @torch.no_grad()
    def update(self, trainable: Mapping[str, Tensor]) -> None:
        """Move the average towards the weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), [trainable[name] for name in self.average], 1 - decay)

    def restore(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint."""
        for name, x in self.average.items():
            x.copy_(average[name])
        self.updates = updates


@contextmanager
def exchanged(trainable: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the parameters hold the other tensors: pointers are exchanged, nothing is copied."""
    own = {name: p.data for name, p in trainable.items()}
    try:
        for name, p in trainable.items():
            p.data = others[name]
        yield
    finally:
        for name, p in trainable.items():
            p.data = own[name]


@contextmanager
def evaluation_mode(trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the parameters hold what a schedule-free optimizer would have us evaluate; other optimizers: no change.

    The trained values come back bit for bit: the optimizer's own way there and back would round them.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    with exchanged(trainable, {name: p.detach().clone() for name, p in trainable.items()}):
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()  # type: ignore[attr-defined]  # sets the mode; the values of this copy do not matter any more
