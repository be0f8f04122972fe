"""Which pair is seen when: a pure function of position, so that resuming means knowing one number.

Positions run over an endless concatenation of permutations of all pairs, one per visit (epoch). With buckets each bucket has
such a sequence of its own, cut into micro-batches; a pass over the data is as many micro-batches of each bucket as bring
every pair to its next visit, in random order. The last micro-batch of a bucket is filled with the first pairs of the bucket's
next visit, which the next pass does not repeat: every batch is full and no pair is left out.

With a balance two such sequences, of good and of bad pictures, are dealt out in a fixed proportion, evenly spread: every batch
has the wanted share, up to rounding, and the smaller class comes to its later visits sooner.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor

from diffpref.core.random import permutation

Item = tuple[int, int]  # (index of the pair, visit)

_CACHED_VISITS = 3  # neighbouring ranks and prefetching workers straddle at most two visits when batches are not huge


@dataclass(frozen=True)
class Stages:
    """Which pairs a curriculum draws: those of members[k] in stage k, each of which lasts `steps` optimizer steps, the last one longer."""

    members: list[np.ndarray]  # indices of pairs, (n,) each; a later stage holds all of an earlier one
    steps: int


class PairSampler:
    """The order of `num_pairs` pairs under `seed`; every micro-batch lies in one bucket of `bucket_of_pair` (num_pairs,), if given.

    balance: which members are good, bool (num_pairs,), and their share of what is drawn. stages: which members are drawn when.

    Raises:
        ValueError: `num_pairs` is below 1, the share is not between 0 and 1, or one class has no member.
    """

    def __init__(
        self,
        num_pairs: int,
        seed: int,
        bucket_of_pair: np.ndarray | None = None,
        balance: tuple[np.ndarray, float] | None = None,
        stages: Stages | None = None,
    ) -> None:
        if num_pairs < 1:
            raise ValueError(f"num_pairs is {num_pairs}, accepted: 1 or more; give a dataset with at least one pair")
        self.num_pairs = num_pairs
        self.seed = seed
        self._classes: tuple[_Stream, _Stream, Fraction] | None = None
        if balance is not None:
            self._classes = _two_classes(*balance, seed)
        self._stages = stages
        self._stage_streams = [_Stream(members, seed, stage) for stage, members in enumerate(stages.members)] if stages else []
        if bucket_of_pair is None:
            self._streams = [_Stream(np.arange(num_pairs), seed)]
        else:
            assert bucket_of_pair.shape == (num_pairs,)
            self._streams = [_Stream(np.flatnonzero(bucket_of_pair == b), seed, int(b)) for b in np.unique(bucket_of_pair)]
        self._sizes = np.array([len(stream.members) for stream in self._streams])
        self._passes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

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
        if self._classes is not None:
            return [_dealt(*self._classes, position) for position in range(number * batch_size, (number + 1) * batch_size)]
        if self._stages is not None:
            return self._staged(number, batch_size, accumulation * world_size)
        stream, number = self._place(number, batch_size)
        return [stream.at(position) for position in range(number * batch_size, (number + 1) * batch_size)]

    def micro_batches(self, rank: int, *, batch_size: int, accumulation: int, world_size: int, first_step: int = 0) -> Iterator[list[Item]]:
        """All micro-batches of `rank` from optimizer step `first_step` on, without end."""
        for step in itertools.count(first_step):
            for micro_step in range(accumulation):
                yield self.micro_batch(step, micro_step, rank, batch_size=batch_size, accumulation=accumulation, world_size=world_size)

    def num_micro_batches(self, passes: int, batch_size: int) -> int:
        """How many micro-batches bring every pair to at least `passes` visits."""
        return int(self._before(passes, batch_size).sum())

    def _staged(self, number: int, batch_size: int, per_step: int) -> list[Item]:
        """The items of the global micro-batch `number`, of which an optimizer step has `per_step`.

        A stage begins a sequence of its own. Its visits go on after the most that a pair can have had before, so that no draw repeats.
        """
        assert self._stages is not None
        stage = min(number // per_step // self._stages.steps, len(self._stage_streams) - 1)
        drawn = self._stages.steps * per_step * batch_size  # in a stage
        earlier = sum(-(-drawn // len(stream.members)) for stream in self._stage_streams[:stage])
        first = number * batch_size - stage * drawn
        found = (self._stage_streams[stage].at(position) for position in range(first, first + batch_size))
        return [(index, earlier + visit) for index, visit in found]

    def _before(self, number: int, batch_size: int) -> np.ndarray:
        """Micro-batches of each bucket before pass `number`."""
        return -(-number * self._sizes // batch_size)

    def _place(self, number: int, batch_size: int) -> tuple[_Stream, int]:
        """The bucket of the global micro-batch `number`, and how many of that bucket are before it."""
        if len(self._streams) == 1:
            return self._streams[0], number
        # Pass p begins at or after p * num_pairs / batch_size, so none after this one can have begun.
        latest = number * batch_size // self.num_pairs
        begun = bisect.bisect_right(range(latest + 1), number, key=lambda p: self.num_micro_batches(p, batch_size)) - 1
        buckets, earlier = self._pass(begun, batch_size)
        first = self._before(begun, batch_size)
        offset = number - int(first.sum())
        bucket = int(buckets[offset])
        return self._streams[bucket], int(first[bucket] + earlier[offset])

    def _pass(self, number: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """For the M micro-batches of a pass: their buckets in random order (M,), how many of the same bucket come earlier (M,)."""
        found = self._passes.get((number, batch_size))
        if found is None:
            counts = self._before(number + 1, batch_size) - self._before(number, batch_size)
            buckets = np.repeat(np.arange(len(counts)), counts)
            buckets = buckets[permutation(len(buckets), self.seed, "bucket_order", number).numpy()]
            earlier = np.empty_like(buckets)
            for bucket, count in enumerate(counts):
                earlier[buckets == bucket] = np.arange(count)
            found = buckets, earlier
            if len(self._passes) >= _CACHED_VISITS:
                del self._passes[min(self._passes)]
            self._passes[number, batch_size] = found
        return found


def _two_classes(is_good: np.ndarray, share: float, seed: int) -> tuple[_Stream, _Stream, Fraction]:
    """(bad, good, share of the good)."""
    good, bad = np.flatnonzero(is_good), np.flatnonzero(~is_good)
    if not 0 < share < 1:
        raise ValueError(f"desirable_share is {share}; it is a share between 0 and 1, both excluded, 0.8 in the paper")
    if not len(good) or not len(bad):
        raise ValueError(f"desirable_share is {share}, but the data has {len(good)} good and {len(bad)} bad pictures; both are needed")
    return _Stream(bad, seed, 0), _Stream(good, seed, 1), Fraction(share).limit_denominator(10_000)


def _dealt(bad: _Stream, good: _Stream, share: Fraction, position: int) -> Item:
    """What comes at `position` when `share` of all positions go to `good`, spread evenly."""
    before, after = math.floor(position * share), math.floor((position + 1) * share)
    return good.at(before) if after > before else bad.at(position - before)


class _Stream:
    """The endless sequence of `members`, indices of pairs (n,), under `seed`; `key` names the bucket."""

    def __init__(self, members: np.ndarray, seed: int, *key: int) -> None:
        self.members = members
        self._seed, self._key = seed, key
        self._orders: dict[int, Tensor] = {}

    def at(self, position: int) -> Item:
        """(index, visit) at `position` >= 0; visit counts how often every member was seen before."""
        visit, offset = divmod(position, len(self.members))
        return int(self.members[self._order(visit)[offset]]), visit

    def _order(self, visit: int) -> Tensor:
        """The permutation (n,) of one visit; the few latest are kept because making one takes time."""
        order = self._orders.get(visit)
        if order is None:
            order = permutation(len(self.members), self._seed, "order", visit, *self._key)
            if len(self._orders) >= _CACHED_VISITS:
                del self._orders[min(self._orders)]
            self._orders[visit] = order
        return order
