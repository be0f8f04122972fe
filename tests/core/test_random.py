"""Keyed draws depend on their key and on nothing else."""

from __future__ import annotations

import pytest
import torch

from diffpref.core.random import PairRandom, generator, normal, permutation, uniform


def test_draws_ignore_and_leave_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = normal((4,), 0, "noise", "a", 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(normal((4,), 0, "noise", "a", 0), first)


@pytest.mark.parametrize(
    "other", [(1, "noise", "a", 0), (0, "posterior", "a", 0), (0, "noise", "b", 0), (0, "noise", "a", 1), (0, "noise", "a", "0")]
)
def test_every_part_of_the_key_matters(other: tuple[int, str, str, int]) -> None:
    assert not torch.equal(normal((4,), 0, "noise", "a", 0), normal((4,), *other))


def test_a_pair_draws_the_same_in_any_batch_and_order() -> None:
    three = PairRandom(7, ("a", "b", "c"), (0, 1, 2))
    turned = PairRandom(7, ("c", "a"), (2, 0))
    assert torch.equal(turned.normal("noise", (2, 3)), three.normal("noise", (2, 3))[[2, 0]])
    assert torch.equal(turned.integers("timestep", 1000), three.integers("timestep", 1000)[[2, 0]])
    assert torch.equal(turned.uniform("empty_prompt"), three.uniform("empty_prompt")[[2, 0]])


def test_another_visit_or_draw_is_another_value() -> None:
    base = PairRandom(7, ("a",), (0,)).normal("noise", (3,))
    assert not torch.equal(PairRandom(7, ("a",), (1,)).normal("noise", (3,)), base)
    assert not torch.equal(PairRandom(7, ("a",), (0,), draw=1).normal("noise", (3,)), base)


def test_ids_and_visits_must_run_in_parallel() -> None:
    with pytest.raises(ValueError, match="zip"):
        PairRandom(0, ("a", "b"), (0,)).normal("noise", (1,))


def test_draws_are_float32_on_the_cpu_with_the_right_moments() -> None:
    draws = PairRandom(3, tuple(f"pair-{i}" for i in range(2000)), (0,) * 2000)
    noise, levels, shares = draws.normal("noise", (4,)), draws.integers("timestep", 1000), draws.uniform("flip")
    assert (noise.dtype, levels.dtype, shares.dtype) == (torch.float32, torch.int64, torch.float32)
    assert {x.device.type for x in (noise, levels, shares)} == {"cpu"}
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert int(levels.min()) >= 0
    assert int(levels.max()) <= 999
    assert abs(float(levels.double().mean()) - 499.5) < 25
    assert float(shares.min()) >= 0
    assert float(shares.max()) < 1
    correlation = torch.corrcoef(torch.stack([noise[:, 0], shares, levels.float()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.08


def test_uniform_and_permutation() -> None:
    assert uniform(0, "flip", "a", 0) == uniform(0, "flip", "a", 0) != uniform(0, "flip", "a", 1)
    order = permutation(50, 0, "order", 0)
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, permutation(50, 0, "order", 1))
    assert generator(2**62, "order").initial_seed() >= 0


def test_rows_and_subsets_belong_to_their_pair() -> None:
    three = PairRandom(7, ("a", "b", "c"), (0, 1, 2))
    assert torch.equal(three.rows([2, 0]).normal("noise", (3,)), three.normal("noise", (3,))[[2, 0]])
    chosen = three.subset("nodes", 10, 4)
    assert chosen.shape == (3, 4)
    assert (chosen.diff(dim=1) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() <= 9
    assert torch.equal(three.rows([1]).subset("nodes", 10, 4), chosen[1:2])
    assert len({tuple(PairRandom(0, ("a",), (v,)).subset("nodes", 10, 4)[0].tolist()) for v in range(20)}) > 10
