"""The order of pairs is a pure function of position."""

from __future__ import annotations

import itertools

import pytest

from diffpref.data.sampler import PairSampler


def test_every_pair_once_per_visit() -> None:
    sampler = PairSampler(7, seed=3)
    items = [sampler.at(position) for position in range(21)]
    for visit in range(3):
        part = items[7 * visit : 7 * visit + 7]
        assert {index for index, _ in part} == set(range(7))
        assert {seen for _, seen in part} == {visit}
    assert items[:7] != [(index, 0) for index, _ in items[7:14]]


def test_depends_on_seed_and_position_only() -> None:
    forward = [PairSampler(11, seed=1).at(position) for position in range(60)]
    sampler = PairSampler(11, seed=1)
    assert [sampler.at(position) for position in reversed(range(60))] == forward[::-1]
    assert [PairSampler(11, seed=2).at(position) for position in range(60)] != forward


def test_two_ranks_see_what_accumulation_sees() -> None:
    sampler = PairSampler(10, seed=0)
    for step, rank in itertools.product(range(5), range(2)):
        got = sampler.micro_batch(step, 0, rank, batch_size=3, accumulation=1, world_size=2)
        assert got == sampler.micro_batch(step, rank, 0, batch_size=3, accumulation=2, world_size=1)


def test_micro_batches_tile_the_positions() -> None:
    sampler = PairSampler(10, seed=0)
    shape = {"batch_size": 2, "accumulation": 3, "world_size": 2}
    order = itertools.product(range(4), range(3), range(2))
    got = [item for step, micro, rank in order for item in sampler.micro_batch(step, micro, rank, **shape)]
    assert got == [sampler.at(position) for position in range(48)]


def test_resuming_is_starting_at_a_step() -> None:
    shape = {"batch_size": 4, "accumulation": 2, "world_size": 2}
    whole = list(itertools.islice(PairSampler(9, seed=5).micro_batches(1, **shape), 12))
    rest = list(itertools.islice(PairSampler(9, seed=5).micro_batches(1, first_step=4, **shape), 4))
    assert rest == whole[8:]


def test_a_batch_may_exceed_the_data() -> None:
    items = PairSampler(1, seed=0).micro_batch(0, 0, 0, batch_size=3, accumulation=1, world_size=1)
    assert items == [(0, 0), (0, 1), (0, 2)]


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="num_pairs is 0"):
        PairSampler(0, seed=0)
    sampler = PairSampler(3, seed=0)
    with pytest.raises(ValueError, match="position is -1"):
        sampler.at(-1)
    with pytest.raises(ValueError, match="rank 2"):
        sampler.micro_batch(0, 0, 2, batch_size=1, accumulation=1, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        sampler.micro_batch(0, 0, 0, batch_size=0, accumulation=1, world_size=2)
