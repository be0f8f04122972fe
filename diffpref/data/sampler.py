"""Which pair is seen when: a pure function of position, so that resuming means knowing one number.

Positions run over an endless concatenation of permutations of all pairs, one per visit (epoch).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from diffpref.core.random import permutation

Item = tuple[int, int]  # (index of the pair, visit)

_CACHED_VISITS = 3  # neighbouring ranks and prefetching workers straddle at most two visits when batches are not huge


class PairSampler:
    """The order of `num_pairs` pairs under `seed`.

    Raises:
        ValueError: `num_pairs` is below 1.
    """

    def __init__(self, num_pairs: int, seed: int) -> None:
        if num_pairs < 1:
            raise ValueError(f"num_pairs is {num_pairs}, accepted: 1 or more; give a dataset with at least one pair")
        self.num_pairs = num_pairs
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def at(self, position: int) -> Item:
        """(index, visit) at `position` >= 0; visit counts how often every pair was seen before."""
        if position < 0:
            raise ValueError(f"position is {position}, accepted: 0 or more")
        visit, offset = divmod(position, self.num_pairs)
        return int(self._order(visit)[offset]), visit

    def micro_batch(self, step: int, micro_step: int, rank: int, *, batch_size: int, accumulation: int, world_size: int) -> list[Item]:
        """The `batch_size` items of one forward pass of one rank.

        Micro-batches are numbered globally, rank fastest: two ranks together see what one rank sees with twice the accumulation.

        Raises:
            ValueError: a number is outside its range.
        """
        if min(batch_size, accumulation, world_size) < 1:
            raise ValueError(
                f"batch_size is {batch_size}, accumulation {accumulation}, world_size {world_size}; accepted: 1 or more for each"
            )
        if step < 0 or not 0 <= micro_step < accumulation or not 0 <= rank < world_size:
            raise ValueError(
                f"step is {step}, micro_step {micro_step}, rank {rank}; accepted: step from 0, micro_step in 0..{accumulation - 1} "
                f"(accumulation {accumulation}), rank in 0..{world_size - 1} (world_size {world_size})"
            )
        number = (step * accumulation + micro_step) * world_size + rank
        return [self.at(position) for position in range(number * batch_size, (number + 1) * batch_size)]

    def micro_batches(self, rank: int, *, batch_size: int, accumulation: int, world_size: int, first_step: int = 0) -> Iterator[list[Item]]:
        """All micro-batches of `rank` from optimizer step `first_step` on, without end."""
        for step in itertools.count(first_step):
            for micro_step in range(accumulation):
                yield self.micro_batch(step, micro_step, rank, batch_size=batch_size, accumulation=accumulation, world_size=world_size)

    def _order(self, visit: int) -> Tensor:
        """The permutation (num_pairs,) of one visit; the few latest are kept because making one takes time."""
        order = self._orders.get(visit)
        if order is None:
            order = permutation(self.num_pairs, self.seed, "order", visit)
            if len(self._orders) >= _CACHED_VISITS:
                del self._orders[min(self._orders)]
            self._orders[visit] = order
        return order
