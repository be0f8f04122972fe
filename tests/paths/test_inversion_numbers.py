"""DDIM inversion against worked numbers: those of the released scripts in float64, and round trips of the toy network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.policy import evaluate
from diffpref.core.process import DdpmProcess
from diffpref.core.types import PathStep, Predict, PreferenceBatch
from diffpref.methods import DiffusionDPO, SmPO
from diffpref.paths.inversion import DdimInversion

Pair = Callable[[float], PreferenceBatch]
Pairs = Callable[..., PreferenceBatch]
AtLevels = Callable[..., Any]


def only(path: DdimInversion, batch: PreferenceBatch, process: DdpmProcess, draws: Any, policy: Predict) -> PathStep:
    """The single step of a path."""
    (step,) = path(batch, process, draws, policy)
    return step


INPO = {
    "legacy020": (
        [0.656196704, -0.278813725, 0.06569707, 0.407191043, -0.532279571, 0.322695058, 0.737722763, -0.193084618],
        0.692338857046,
    ),
    "current022": (
        [0.729701103, -0.310386896, 0.071747455, 0.451319226, -0.592551258, 0.357199686, 0.821185119, -0.21522009],
        0.695130045910,
    ),
    "exact": ([0.686354071], 0.693685419695),
    "source": ([0.703241177], 0.693571151748),
}
SMPO = {
    "legacy020": (
        [0.549054739, -0.249501769, 0.045390068, 0.337276363, -0.465745091, 0.265180783, 0.618149085, -0.17617672],
        0.692410200726,
    ),
    "current022": (
        [0.716362746, -0.318948755, 0.061297183, 0.439181181, -0.599613253, 0.345468637, 0.807444278, -0.224271271],
        0.693724402164,
    ),
    "exact": ([0.672762091], 0.693288573428),
    "source": ([0.706313186], 0.693221209263),
}


def on_grid(name: str, **settings: Any) -> DdimInversion:
    """The path of a worked example."""
    return DdimInversion(network_timestep="source", **settings) if name == "source" else DdimInversion(grid=name, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(INPO))
def test_inpo(name: str, pair: Pair, at_levels: AtLevels, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    batch = pair(0.4)
    step = only(on_grid(name), batch, process, at_levels(batch, 450), policy)
    x_t, loss = INPO[name]
    assert step.x_t.flatten().tolist()[: len(x_t)] == pytest.approx(x_t, abs=1e-9)
    out = DiffusionDPO(beta=200).loss(batch, evaluate((step,), batch.cond, policy, reference))
    assert float(out.per_group.detach()) == pytest.approx(loss, abs=1e-11)


def test_inpo_errors_and_gradient(
    pair: Pair, at_levels: AtLevels, process: DdpmProcess, policy: Predict, reference: Predict, policy_weights: Tensor
) -> None:
    batch = pair(0.4)
    step = only(on_grid("legacy020"), batch, process, at_levels(batch, 450), policy)
    implied = [0.228836351, -0.126330553, 0.008398632, 0.139394388, -0.221292161, 0.107731399, 0.256823947, -0.093141529]
    assert step.target.flatten().tolist() == pytest.approx(implied, abs=1e-9)
    out = DiffusionDPO(beta=200).loss(batch, evaluate((step,), batch.cond, policy, reference))
    errors = [float(out.metrics[f"error/{who}_{which}"]) for who in ("policy", "reference") for which in ("chosen", "rejected")]
    assert errors == pytest.approx([0.002505676, 0.002615035, 0.002548546, 0.002641732], abs=1e-9)
    out.per_group.sum().backward()
    assert policy_weights.grad is not None
    assert policy_weights.grad.tolist() == pytest.approx([-0.759069024, -0.716846482, 0.04240225, 0.037690889], rel=1e-7)


@pytest.mark.parametrize("name", list(SMPO))
def test_smpo(
    name: str, pair: Pair, at_levels: AtLevels, process: DdpmProcess, policy: Predict, reference: Predict, policy_weights: Tensor
) -> None:
    batch = replace(pair(0.4), relevance=torch.tensor([[0.515, 0.485]], dtype=torch.float64))
    step = only(on_grid(name, num_steps=5, renoise_iterations=1), batch, process, at_levels(batch, 450), policy)
    x_t, loss = SMPO[name]
    assert step.x_t.flatten().tolist()[: len(x_t)] == pytest.approx(x_t, abs=1e-9)
    out = SmPO(beta=200, score=None).loss(batch, evaluate((step,), batch.cond, policy, reference))
    assert float(out.per_group.detach()) == pytest.approx(loss, abs=1e-11)
    if name == "legacy020":
        out.per_group.sum().backward()
        assert policy_weights.grad is not None
        assert policy_weights.grad.tolist() == pytest.approx([-0.408843664, -0.371778441, 0.2250774, 0.2000688], rel=1e-6)


NODES = {
    ("legacy020", 10): {1: 0.80385989, 101: 0.85465067, 201: 0.84869779, 301: 0.81183381, 401: 0.74647554, 501: 0.65619670},
    ("current022", 10): {1: 0.80361715, 101: 0.84863428, 201: 0.83880518, 301: 0.79836574, 401: 0.72970110},
    ("legacy020", 5): {1: 0.80411148, 201: 0.85305878, 401: 0.75091929, 601: 0.54905474},
    ("current022", 5): {1: 0.80362496, 201: 0.83256774, 401: 0.71636275},
}


@pytest.mark.parametrize(("grid", "num_steps"), list(NODES))
def test_every_node_of_the_released_grids(grid: str, num_steps: int, pair: Pair, process: DdpmProcess, policy: Predict) -> None:
    path = DdimInversion(grid=grid, num_steps=num_steps, renoise_iterations=int(num_steps == 5))  # type: ignore[arg-type]
    batch = pair(0.4)
    for k, (level, expected) in enumerate(NODES[grid, num_steps].items()):
        t = path.moves(999, 1000)[k][2] + 1  # just beyond the k-th node, which is then the last
        assert path.moves(t, 1000)[-1][1] == level
        x = path.invert(policy, process, batch.latents, [t], batch.cond, batch.random(0))
        assert float(x[0, 0, 0, 0, 0].detach()) == pytest.approx(expected, abs=1e-8)


ROUND_TRIP = {
    5: (0.5288, 0.3556, 0.2057, 0.0665, 1.4e-6),
    10: (0.2492, 0.1669, 0.0909, 0.0188, 1.3e-8),
    20: (0.1201, 0.0802, 0.0420, 0.0050, 5.5e-11),
    50: (0.0469, 0.0312, 0.0159, 8.4e-4, 2.3e-14),
    200: (0.0117, 0.0078, 0.0039, 5.5e-5, 1.8e-15),
}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("source", {}),
    ("destination", {}),
    ("destination", {"renoise_iterations": 1}),
    ("destination", {"renoise_iterations": 1, "renoise_average": False}),
    ("destination", {"renoise_iterations": 8, "renoise_average": False}),
]


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("num_moves", [5, 10, 20, 50, 200])
def test_invert_and_sample_back(num_moves: int, column: int, pair: Pair, process: DdpmProcess, toy: Callable[[Tensor], Predict]) -> None:
    network = toy(torch.tensor([0.3, 0.1, -0.2, 0.0], dtype=torch.float64))
    kind, settings = KINDS[column]
    path, batch = DdimInversion(**settings), pair(0.0)
    levels = [round(1 + 900 * i / num_moves) for i in range(num_moves + 1)]
    x = batch.latents[:, :1]
    cond = batch.cond.map(lambda c: c[:, :1])
    at = {level: torch.tensor([[level]]) for level in levels}
    for a, b in itertools.pairwise(levels):
        asked = at[b] if kind == "destination" else at[a]
        x = process.ddim_move(x, path.estimate(network, process, x, cond, (at[a], at[b], asked)), at[a], at[b])
    for a, b in zip(levels[:0:-1], levels[-2::-1], strict=True):
        x = process.ddim_move(x, network(x, at[a], cond), at[a], at[b])
    error = float((x - batch.latents[:, :1]).abs().max())
    expected = ROUND_TRIP[num_moves][column]
    if expected > 1e-3:
        assert error == pytest.approx(expected, abs=5.1e-5)  # four decimals are given
    else:
        last_digit = 10.0 ** (math.floor(math.log10(expected)) - 1)  # two digits are given
        assert error < 1e-13 if expected < 1e-13 else error == pytest.approx(expected, abs=0.51 * last_digit)


@pytest.mark.parametrize("num_moves", [1, 5, 20, 50, 200])
@pytest.mark.parametrize("renoise_iterations", [0, 1])
def test_a_constant_network_is_inverted_exactly(renoise_iterations: int, num_moves: int, pair: Pair, process: DdpmProcess) -> None:
    batch = pair(0.0)
    path = DdimInversion(num_steps=num_moves, renoise_iterations=renoise_iterations)
    noise = torch.full_like(batch.latents, 0.3)
    moves = path.moves(900, 1000)
    x = path.invert(lambda x, *_: torch.full_like(x, 0.3), process, batch.latents, [900], batch.cond, batch.random(0))
    assert float((x - batch.latents).abs().max()) > 0.1
    for source, destination, _ in reversed(moves):
        x = process.ddim_move(x, noise, torch.tensor([[destination]]), torch.tensor([[max(source, 0)]]))
    assert float((x - batch.latents).abs().max()) < 5e-15  # 4.4e-16 is reported
