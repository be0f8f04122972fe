"""DDIM inversion: its closed forms, pairs together and alone, and what it costs. Worked numbers: test_inversion_numbers.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpref.core.policy import evaluate
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, Evaluation, PathStep, Predict, PreferenceBatch
from diffpref.methods import DiffusionDPO, SmPO
from diffpref.paths.inversion import DdimInversion

Pair = Callable[[float], PreferenceBatch]
Pairs = Callable[..., PreferenceBatch]
AtLevels = Callable[..., Any]


def only(path: DdimInversion, batch: PreferenceBatch, process: DdpmProcess, draws: Any, policy: Predict) -> PathStep:
    """The single step of a path."""
    (step,) = path(batch, process, draws, policy)
    return step


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_constant_network_inverts_in_closed_form(
    kind: str, pairs: Pairs, at_levels: AtLevels, process: DdpmProcess, v_process: DdpmProcess
) -> None:
    batch, levels = pairs(4), (0, 1, 450, 999)
    made = process if kind == "epsilon" else v_process

    def constant(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return made.implied(x_t, torch.full_like(x_t, 0.3), timesteps)

    step = only(DdimInversion(renoise_iterations=1), batch, made, at_levels(batch, *levels), constant)
    a_0, a_t = process.alphas_cumprod[0], process.alphas_cumprod[list(levels)].reshape(4, 1, 1, 1, 1)
    expected = (a_t / a_0).sqrt() * (batch.latents - (1 - a_0).sqrt() * 0.3) + (1 - a_t).sqrt() * 0.3
    torch.testing.assert_close(step.x_t, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(step.timesteps, torch.tensor(levels)[:, None].expand(-1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "path", [DdimInversion(), DdimInversion(grid="legacy020", eta=0.1), DdimInversion(num_steps=3, renoise_iterations=2)]
)
def test_the_implied_noise_reproduces_x_t(
    path: DdimInversion, dtype: torch.dtype, pairs: Pairs, process: DdpmProcess, policy: Predict
) -> None:
    batch = pairs(5, dtype)
    step = only(path, batch, process, batch.random(1), policy)
    assert step.x_t.dtype == dtype
    assert not step.x_t.requires_grad
    assert not step.target.requires_grad
    assert len(set(step.timesteps[:, 0].tolist())) == 5
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(process.add_noise(batch.latents, step.target, step.timesteps), step.x_t, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(step.target[:, 0], step.target[:, 1])


@pytest.mark.parametrize("settings", [{}, {"renoise_iterations": 2}, {"network_timestep": "source"}, {"grid": "current022"}])
def test_v_prediction_takes_the_path_of_the_equivalent_network(
    settings: dict[str, Any], pairs: Pairs, process: DdpmProcess, v_process: DdpmProcess, policy: Predict
) -> None:
    def v_network(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return v_process.implied(x_t, policy(x_t, timesteps, cond), timesteps)

    batch, path = pairs(3), DdimInversion(**settings)
    there, here = (only(path, batch, p, batch.random(0), f) for p, f in ((process, policy), (v_process, v_network)))
    torch.testing.assert_close(here.x_t, there.x_t, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(v_process.epsilon(here.x_t, here.target, here.timesteps), there.target, rtol=1e-10, atol=1e-10)


def alone(batch: PreferenceBatch, g: int) -> PreferenceBatch:
    """One pair of a batch."""
    return replace(
        batch,
        latents=batch.latents[g : g + 1],
        cond=batch.cond.map(lambda x: x[g : g + 1]),
        relevance=batch.relevance[g : g + 1],
        pair_ids=batch.pair_ids[g : g + 1],
        visits=batch.visits[g : g + 1],
    )


def counting(predict: Predict) -> tuple[Predict, list[int]]:
    """The network, and the number of images of each of its forwards."""
    seen: list[int] = []

    def counted(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        assert x_t.shape[:2] == timesteps.shape == cond.prompt_embeds.shape[:2]
        seen.append(timesteps.numel())
        return predict(x_t, timesteps, cond)

    return counted, seen


@pytest.mark.parametrize("settings", [{}, {"renoise_iterations": 1, "num_steps": 5}, {"eta": 0.1}, {"grid": "legacy020", "eta": 0.1}])
def test_a_batch_is_its_pairs_one_by_one_and_costs_no_more(
    settings: dict[str, Any], pairs: Pairs, process: DdpmProcess, policy: Predict, reference: Predict
) -> None:
    path, batch = DdimInversion(**settings), pairs(6)
    counted, images = counting(policy)
    together = only(path, batch, process, batch.random(4), counted)
    whole = sum(images)
    images.clear()
    singles = [only(path, alone(batch, g), process, alone(batch, g).random(4), counted) for g in range(6)]
    assert whole == sum(images) > 0
    torch.testing.assert_close(together.x_t, torch.cat([s.x_t for s in singles]), rtol=1e-12, atol=1e-12)
    method = DiffusionDPO(beta=100)
    losses = [method.loss(alone(batch, g), evaluate((s,), alone(batch, g).cond, policy, reference)) for g, s in enumerate(singles)]
    mean = method.loss(batch, evaluate((together,), batch.cond, policy, reference)).per_group.mean()
    torch.testing.assert_close(mean, torch.cat([out.per_group for out in losses]).mean(), rtol=1e-12, atol=0)


def test_forwards_shrink_as_pairs_arrive(pairs: Pairs, at_levels: AtLevels, process: DdpmProcess, policy: Predict) -> None:
    counted, images = counting(policy)
    batch = pairs(4)
    only(DdimInversion(), batch, process, at_levels(batch, 150, 0, 1, 950), counted)
    assert images == [6, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # 3 moves, none, 1 and 11 of pairs of two images


@pytest.mark.parametrize(
    ("settings", "average"),
    [
        ({"grid": "legacy020"}, 6.382),
        ({"grid": "current022"}, 5.48),
        ({}, 6.479),
        ({"grid": "legacy020", "num_steps": 5}, 3.792),
        ({"num_steps": 5}, 3.989),
    ],
)
def test_average_number_of_moves(settings: dict[str, Any], average: float) -> None:
    path = DdimInversion(**settings)
    assert sum(len(path.moves(t, 1000)) for t in range(1000)) / 1000 == pytest.approx(average, abs=1e-9)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50, 999, 1000])
def test_the_exact_grid_ends_at_t(num_steps: int) -> None:
    path = DdimInversion(num_steps=num_steps)
    for t in range(1, 1000, 37):
        moves = path.moves(t, 1000)
        assert moves[0][0] == 0
        assert moves[-1][1] == t
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(moves))
    assert path.moves(1, 1000) == [(0, 1, 1)]
    assert path.moves(0, 1000) == []


def test_legacy_grid_asks_below_zero() -> None:
    assert DdimInversion(grid="legacy020").moves(150, 1000) == [(-99, 1, -99), (1, 101, 1), (101, 201, 101)]
    assert DdimInversion(grid="current022").moves(150, 1000) == [(-99, 1, 1), (1, 101, 101)]


STANDARD_DEVIATIONS = [0.020648, 0.040984, 0.260957, 0.361792, 0.448090, 0.527609, 0.601188, 0.667887, 0.726482, 0.776332]


def test_fresh_noise_has_the_standard_deviation_of_ddim(process: DdpmProcess) -> None:
    latents = torch.zeros(1, 2, 4, 50, 50, dtype=torch.float64)
    batch = PreferenceBatch(latents, Conditioning(torch.zeros(1, 2, 1, 1)), torch.ones(1, 2), ("a",), (0,))
    moves = DdimInversion(grid="legacy020").moves(999, 1000)
    assert len(moves) == 10
    for (source, destination, _), expected in zip(moves, STANDARD_DEVIATIONS, strict=True):
        std = process.transition(torch.tensor(destination), torch.tensor(max(source, 0)), 1.0)[2]
        assert float(std) == pytest.approx(expected, abs=1e-6)
    path = DdimInversion(grid="legacy020", eta=0.5)
    x = path.invert(lambda x, t, c: torch.zeros_like(x), process, latents, [1], batch.cond, batch.random(0))
    assert float(x.std()) == pytest.approx(0.5 * STANDARD_DEVIATIONS[0], rel=0.03)
    assert abs(float((x[0, 0] * x[0, 1]).mean() / x.var())) < 0.05  # images of a pair draw apart
    assert torch.equal(x, path.invert(lambda x, t, c: torch.zeros_like(x), process, latents, [1], batch.cond, batch.random(0)))


def test_without_renoise_smpo_takes_the_path_of_inpo(pairs: Pairs, process: DdpmProcess, policy: Predict) -> None:
    batch = pairs(2)
    inpo, smpo = DdimInversion(num_steps=5), DdimInversion(num_steps=5, renoise_iterations=0, renoise_average=False)
    assert torch.equal(*(only(path, batch, process, batch.random(0), policy).x_t for path in (inpo, smpo)))


def test_the_reference_can_invert(pairs: Pairs, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    batch = pairs(2)
    (step,) = DdimInversion(inverter="reference")(batch, process, batch.random(0), policy, reference)
    assert torch.equal(step.x_t, only(DdimInversion(), batch, process, batch.random(0), reference).x_t)
    with pytest.raises(ValueError, match="inverter is reference, but the run has no reference"):
        DdimInversion(inverter="reference")(batch, process, batch.random(0), policy)
    with pytest.raises(ValueError, match="inverter is policy, but the run has no policy"):
        DdimInversion()(batch, process, batch.random(0))


def test_guided_inversion(pairs: Pairs, process: DdpmProcess, policy: Predict) -> None:
    batch, null = pairs(3), Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    (guided,) = DdimInversion(guidance_scale=2.0)(batch, process, batch.random(0), policy, null=null)
    stronger = replace(batch, cond=batch.cond.map(lambda c: 2 * c))  # the toy is linear in its conditioning
    torch.testing.assert_close(guided.x_t, only(DdimInversion(), stronger, process, batch.random(0), policy).x_t, rtol=1e-12, atol=1e-12)
    assert guided.guidance_scale == 1
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0, but there is no null conditioning"):
        DdimInversion(guidance_scale=2.0)(batch, process, batch.random(0), policy)


def test_inversion_changes_no_gradient(
    pairs: Pairs, process: DdpmProcess, policy: Predict, reference: Predict, policy_weights: Tensor
) -> None:
    batch = pairs(2)
    step = only(DdimInversion(), batch, process, batch.random(0), policy)
    for x in (step, replace(step, x_t=step.x_t.clone(), target=step.target.clone())):
        evals: list[Evaluation] = evaluate((x,), batch.cond, policy, reference)
        DiffusionDPO(beta=10).loss(batch, evals).per_group.sum().backward()
    assert policy_weights.grad is not None
    half = policy_weights.grad / 2
    policy_weights.grad = None
    DiffusionDPO(beta=10).loss(batch, evaluate((step,), batch.cond, policy, reference)).per_group.sum().backward()
    torch.testing.assert_close(policy_weights.grad, half, rtol=1e-14, atol=0)


def test_training_under_autocast_still_has_a_gradient_after_an_inversion_by_the_policy(pairs: Pairs, process: DdpmProcess) -> None:
    layer = nn.Linear(3, 3)

    def network(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return layer(x_t)

    batch = pairs(2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = only(DdimInversion(), batch, process, batch.random(0), network)
        (evaluation,) = evaluate((step,), batch.cond, network, None)
    assert step.x_t.dtype == torch.float32
    evaluation.policy.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().max()) > 0


def test_all_processes_ask_equally_often(
    monkeypatch: pytest.MonkeyPatch, pairs: Pairs, at_levels: AtLevels, process: DdpmProcess, policy: Predict
) -> None:
    monkeypatch.setattr("diffpref.paths.inversion.all_max", lambda value, device: 11)
    counted, images = counting(policy)
    batch = pairs(2)
    path = DdimInversion(equal_forwards=True, renoise_iterations=1)
    step = only(path, batch, process, at_levels(batch, 150, 50), counted)
    assert len(images) == 22
    assert images[:6] == [4, 4, 4, 4, 2, 2]
    plain = only(replace(path, equal_forwards=False), batch, process, at_levels(batch, 150, 50), policy)
    assert torch.equal(step.x_t, plain.x_t)


def test_weight_level_and_snr(pairs: Pairs, process: DdpmProcess, policy: Predict) -> None:
    batch = pairs(3)
    step = only(DdimInversion(num_steps=2), batch, process, batch.random(0), policy)
    assert torch.equal(step.weight, torch.ones(3, 2))
    assert step.log_snr is not None
    a = process.alphas_cumprod[step.timesteps]
    torch.testing.assert_close(step.log_snr.double(), (a / (1 - a)).log(), rtol=1e-6, atol=1e-6)
    assert torch.equal(step.timesteps[:, 0], batch.random(0).integers("timestep", 1000))  # as on the path of forward noising


def test_levels_are_those_that_the_model_is_trained_at(pairs: Pairs, process: DdpmProcess, policy: Predict) -> None:
    refiner, turbo = replace(process, trained_at=tuple(range(200))), replace(process, trained_at=(249, 499, 749))
    batch = pairs(6)
    step = only(DdimInversion(), batch, refiner, batch.random(0), policy)
    assert torch.equal(step.timesteps[:, 0], batch.random(0).integers("timestep", 200))
    with pytest.raises(ValueError, match="path inversion passes through timesteps 0 to 749"):
        only(DdimInversion(), batch, turbo, batch.random(0), policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; inversion needs at least 1 step"),
        ({"renoise_iterations": -1}, "renoise_iterations is -1"),
        ({"eta": 1.5}, r"eta is 1\.5"),
        ({"eta": math.nan}, "eta is nan"),
        ({"grid": "legacy020", "network_timestep": "source"}, "network_timestep is source with grid legacy020"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DdimInversion(**settings)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 1001, but the schedule has 1000 timesteps"):
        DdimInversion(num_steps=1001).moves(500, 1000)


def test_losses_are_log_two_where_policy_is_reference(pairs: Pairs, process: DdpmProcess, reference: Predict) -> None:
    batch = pairs(3)
    step = only(DdimInversion(), batch, process, batch.random(0), reference)
    for method in (DiffusionDPO(), SmPO(score=None)):
        loss = method.loss(batch, evaluate((step,), batch.cond, reference, reference)).per_group
        torch.testing.assert_close(loss, F.softplus(torch.zeros(3, dtype=torch.float64)), rtol=1e-14, atol=0)
