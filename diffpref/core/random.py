"""Keyed randomness: every draw is a pure function of (seed, purpose, key), made in float32 on the CPU.

No rank, no worker and no global generator takes part, so resuming, the number of workers and the number of processes do
not change what a pair sees, and one step can be replayed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """A CPU generator whose state depends on the arguments only.

    `purpose` names what is drawn ("noise", "timestep", "order", ...), so that two uses of one key stay independent.
    """
    return torch.Generator().manual_seed(derived(seed, purpose, *key))


def derived(seed: int, purpose: str, *key: int | str) -> int:
    """Another seed, in [0, 2**63)."""
    digest = hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(seed: int, purpose: str, *key: int | str) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, purpose, *key)))


def permutation(length: int, seed: int, purpose: str, *key: int | str) -> Tensor:
    """A random order of 0..length-1 as int64 (length,)."""
    return torch.randperm(length, generator=generator(seed, purpose, *key))


def moved(x: Tensor, device: torch.device) -> Tensor:
    """What was drawn or read on the CPU, on `device`. To a GPU through pinned memory, so that nothing waits for the GPU."""
    if x.device == device or device.type == "cpu":
        return x.to(device)
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def normal(shape: Sequence[int], seed: int, purpose: str, *key: int | str) -> Tensor:
    """Standard normal float32 of `shape`."""
    return torch.randn(tuple(shape), generator=generator(seed, purpose, *key))


@dataclass(frozen=True)
class PairRandom:
    """Draws for the pairs of one batch, each keyed by its own (seed, pair id, visit, draw)."""

    seed: int
    pair_ids: tuple[str, ...]  # (G,)
    visits: tuple[int, ...]  # (G,)
    draw: int = 0

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 (G, *shape), on the CPU."""
        return torch.stack([normal(shape, self.seed, purpose, *key) for key in self._keys()])

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform int64 in [0, high), (G,), on the CPU."""
        rows = [torch.randint(high, (), generator=generator(self.seed, purpose, *key)) for key in self._keys()]
        return torch.stack(rows)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform float32 in [0, 1), (G,), on the CPU."""
        return torch.tensor([uniform(self.seed, purpose, *key) for key in self._keys()])

    def subset(self, purpose: str, size: int, count: int) -> Tensor:
        """`count` different numbers of 0..size-1 in rising order, int64 (G, count), on the CPU."""
        rows = [permutation(size, self.seed, purpose, *key)[:count].sort().values for key in self._keys()]
        return torch.stack(rows)

    def rows(self, index: Sequence[int]) -> PairRandom:
        """The draws of some of the pairs."""
        return replace(self, pair_ids=tuple(self.pair_ids[i] for i in index), visits=tuple(self.visits[i] for i in index))

    def _keys(self) -> list[tuple[str, int, int]]:
        return [(pair_id, visit, self.draw) for pair_id, visit in zip(self.pair_ids, self.visits, strict=True)]
