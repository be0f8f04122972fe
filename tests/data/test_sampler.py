"""The order of pairs is a pure function of position."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from diffpref.data.sampler import Item, PairSampler

SIZES = (7, 1, 12, 30)  # pairs of four buckets
BUCKETS = np.random.default_rng(0).permutation(np.repeat([5, 2, 9, 0], SIZES))


def at(sampler: PairSampler, position: int) -> Item:
    """The pair at one position."""
    return sampler.micro_batch(position, 0, 0, batch_size=1, accumulation=1, world_size=1)[0]


def stream(sampler: PairSampler, count: int, batch_size: int, first_step: int = 0) -> list[list[Item]]:
    """`count` micro-batches of a single rank."""
    return list(
        itertools.islice(sampler.micro_batches(0, batch_size=batch_size, accumulation=1, world_size=1, first_step=first_step), count)
    )


def test_every_pair_once_per_visit() -> None:
    sampler = PairSampler(7, seed=3)
    items = [at(sampler, position) for position in range(21)]
    for visit in range(3):
        part = items[7 * visit : 7 * visit + 7]
        assert {index for index, _ in part} == set(range(7))
        assert {seen for _, seen in part} == {visit}
    assert items[:7] != [(index, 0) for index, _ in items[7:14]]


def test_depends_on_seed_and_position_only() -> None:
    forward = [at(PairSampler(11, seed=1), position) for position in range(60)]
    sampler = PairSampler(11, seed=1)
    assert [at(sampler, position) for position in reversed(range(60))] == forward[::-1]
    assert [at(PairSampler(11, seed=2), position) for position in range(60)] != forward


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
    assert got == [at(sampler, position) for position in range(48)]


def test_resuming_is_starting_at_a_step() -> None:
    shape = {"batch_size": 4, "accumulation": 2, "world_size": 2}
    whole = list(itertools.islice(PairSampler(9, seed=5).micro_batches(1, **shape), 12))
    rest = list(itertools.islice(PairSampler(9, seed=5).micro_batches(1, first_step=4, **shape), 4))
    assert rest == whole[8:]


@pytest.mark.reliability("D9")
def test_a_batch_may_exceed_the_data() -> None:
    items = PairSampler(1, seed=0).micro_batch(0, 0, 0, batch_size=3, accumulation=1, world_size=1)
    assert items == [(0, 0), (0, 1), (0, 2)]


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="num_pairs is 0"):
        PairSampler(0, seed=0)
    sampler = PairSampler(3, seed=0)
    with pytest.raises(ValueError, match="step is -1"):
        at(sampler, -1)
    with pytest.raises(ValueError, match="rank 2"):
        sampler.micro_batch(0, 0, 2, batch_size=1, accumulation=1, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        sampler.micro_batch(0, 0, 0, batch_size=0, accumulation=1, world_size=2)


def test_the_order_without_buckets_stays_what_it_was() -> None:
    items = PairSampler(10, 3).micro_batch(1, 0, 0, batch_size=12, accumulation=1, world_size=1)
    assert [index for index, _ in items] == [3, 6, 4, 9, 1, 8, 2, 5, 9, 7, 2, 6]
    assert [visit for _, visit in items] == [1] * 8 + [2] * 4
    one = PairSampler(10, 3, np.full(10, 4))  # a single bucket has an order of its own, cut in the same way
    assert [visit for _, visit in one.micro_batch(1, 0, 0, batch_size=12, accumulation=1, world_size=1)] == [1] * 8 + [2] * 4


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_a_micro_batch_lies_in_one_bucket_and_is_full(batch_size: int) -> None:
    for items in stream(PairSampler(50, 1, BUCKETS), 60, batch_size):
        assert len(items) == batch_size
        assert len({int(BUCKETS[index]) for index, _ in items}) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_every_pass_brings_every_pair_to_its_next_visit(batch_size: int) -> None:
    sampler = PairSampler(50, 1, BUCKETS)
    seen: Counter[int] = Counter()
    done = 0
    for number in range(1, 12):
        total = sampler.num_micro_batches(number, batch_size)
        for items in stream(sampler, total - done, batch_size, done):
            for index, visit in items:
                assert visit == seen[index]  # visits count up, one by one
                seen[index] += 1
        done = total
        for bucket, size in zip([5, 2, 9, 0], SIZES, strict=True):
            visits = [seen[i] for i, of in enumerate(BUCKETS) if of == bucket]
            assert number * size <= sum(visits) < number * size + batch_size  # what is drawn ahead is less than one batch
            assert min(visits) >= number


def test_with_batches_of_one_a_pass_is_a_permutation() -> None:
    sampler = PairSampler(50, 1, BUCKETS)
    first, second = ([items[0] for items in stream(sampler, 50, 1, start)] for start in (0, 50))
    assert sorted(first) == [(i, 0) for i in range(50)]
    assert sorted(second) == [(i, 1) for i in range(50)]
    assert [BUCKETS[i] for i, _ in first] != [BUCKETS[i] for i, _ in second]


def test_buckets_take_turns_at_random() -> None:
    sampler = PairSampler(50, 1, BUCKETS)
    turns = [int(BUCKETS[items[0][0]]) for items in stream(sampler, sampler.num_micro_batches(1, 2), 2)]
    assert turns != sorted(turns)
    assert sum(a != b for a, b in itertools.pairwise(turns)) > 6
    assert Counter(turns) == {5: 4, 2: 1, 9: 6, 0: 15}


def test_with_buckets_two_ranks_see_what_accumulation_sees() -> None:
    sampler = PairSampler(50, 1, BUCKETS)
    mixed = 0
    for step in range(40):
        two = [sampler.micro_batch(step, 0, rank, batch_size=4, accumulation=1, world_size=2) for rank in range(2)]
        assert two == [sampler.micro_batch(step, micro, 0, batch_size=4, accumulation=2, world_size=1) for micro in range(2)]
        mixed += BUCKETS[two[0][0][0]] != BUCKETS[two[1][0][0]]
    assert mixed > 5


def test_with_buckets_any_step_can_be_had_alone() -> None:
    whole = stream(PairSampler(50, 1, BUCKETS), 300, 3)
    for step in (0, 1, 17, 18, 19, 150, 299):
        assert stream(PairSampler(50, 1, BUCKETS), 1, 3, step) == [whole[step]]
    backwards = PairSampler(50, 1, BUCKETS)
    assert [stream(backwards, 1, 3, step)[0] for step in reversed(range(300))] == whole[::-1]
    assert stream(PairSampler(50, 2, BUCKETS), 300, 3) != whole
    far = PairSampler(50, 1, BUCKETS).micro_batch(10**9, 0, 0, batch_size=3, accumulation=1, world_size=1)
    assert {visit for _, visit in far} <= set(range(6 * 10**7 - 2, 6 * 10**7 + 3))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_the_number_of_micro_batches(batch_size: int) -> None:
    assert PairSampler(50, 1).num_micro_batches(3, batch_size) == -(-150 // batch_size)
    assert PairSampler(50, 1, BUCKETS).num_micro_batches(3, batch_size) == sum(-(-3 * size // batch_size) for size in SIZES)
