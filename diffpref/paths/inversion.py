"""DDIM inversion of clean latents to each pair's own timestep: the path of InPO (Lu et al., 2025, arXiv:2503.18454) and, with
ReNoise (Garibi et al., 2024, arXiv:2403.14602), of SmPO (arXiv:2506.02698).

    x_t = Inversion(x_0, c, up to t)                                     no gradient, deterministic for eta 0
    e   = (x_t - alpha(t) x_0) / sigma(t)                                the noise that this x_t implies, per image

The released scripts reuse the first pair's t for the whole batch, stop at a grid node beside t but evaluate at t, and follow the
library's inverse scheduler, whose nodes, direction and network timesteps changed with its versions. Here every pair has its
own t and lands on it; pairs advance together and leave the batch when they have arrived. The two grids of the releases remain
for comparison. A network is asked at the level its timestep names, so epsilon and v-prediction give the same path.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffpref.core.distributed import all_max
from diffpref.core.policy import guided
from diffpref.core.process import DdpmProcess, like
from diffpref.core.random import PairRandom, moved
from diffpref.core.types import Conditioning, PathStep, Predict, PreferenceBatch

Move = tuple[int, int, int]
"""Level it starts from, level it ends at, timestep that the network is asked for. Below 0 a level is the clean end, level 0."""


@dataclass(frozen=True, kw_only=True)
class DdimInversion:
    """One step per batch, reached by the network itself; the timestep is drawn once per group."""

    num_steps: int = 10
    """Grid nodes over the whole schedule (10 for InPO, 5 for SmPO); cost grows with it, the error of the inversion falls."""
    grid: Literal["exact", "legacy020", "current022"] = "exact"
    """exact lands on each pair's t; the others stop at a node as the releases do under diffusers 0.20, and 0.22 or later."""
    network_timestep: Literal["destination", "source"] = "destination"
    """Timestep of the network within a move of the exact grid: where it ends, or where it starts."""
    eta: float = 0.0
    """Share of fresh noise after every move, in units of DDIM's standard deviation; 0.1 in InPO's release."""
    renoise_iterations: int = 0
    """Times that the noise of a move is estimated again at its end (ReNoise); 1 for SmPO."""
    renoise_average: bool = True
    """Average all estimates of a move as SmPO does, or keep the last one, which is more accurate."""
    inverter: Literal["policy", "reference"] = "policy"
    """The network that inverts: the policy as it is now, or the frozen reference."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the inversion only; 1 is none, and half the cost."""
    equal_forwards: bool = False
    """Ask the network equally often on every process, as sharded models must; plain data parallel does not need it."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; inversion needs at least 1 step, usually 10 (5 with ReNoise)")
        if self.renoise_iterations < 0:
            raise ValueError(f"renoise_iterations is {self.renoise_iterations}; it is 0 for plain inversion, or a positive number")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it is a share between 0 and 1, 0 for deterministic inversion")
        if self.grid != "exact" and self.network_timestep != "destination":
            raise ValueError(f"network_timestep is {self.network_timestep} with grid {self.grid}, which fixes it; use grid exact")

    @torch.no_grad()
    def __call__(
        self,
        batch: PreferenceBatch,
        process: DdpmProcess,
        draws: PairRandom,
        policy: Predict | None = None,
        reference: Predict | None = None,
        null: Conditioning | None = None,
    ) -> tuple[PathStep, ...]:
        """Invert the latents (G, K, C, h, w) to t uniform over process.timesteps; a single PathStep of weight 1.

        Raises ValueError when the inverter, or the null conditioning of a guided inversion, is missing.
        """
        predict = guided(inverter(self.inverter, policy, reference), null, self.guidance_scale)
        process.check_passage("inversion", int(process.timesteps[-1]))
        levels = process.timesteps[draws.integers("timestep", len(process.timesteps))]
        x_0 = batch.latents.to(torch.promote_types(batch.latents.dtype, torch.float32))
        x_t = self.invert(predict, process, x_0, levels.tolist(), batch.cond, draws)
        t = moved(levels, x_0.device)[:, None].expand(batch.group_shape)
        noise = (x_t - like(process.alpha(t).to(x_0.dtype), x_0) * x_0) / like(process.sigma(t).to(x_0.dtype), x_0)
        weight = torch.ones(batch.group_shape, device=x_0.device)
        return (PathStep(x_t, t, process.target(x_0, noise, t), weight, process.log_snr(t).float()),)

    def invert(
        self, predict: Predict, process: DdpmProcess, x_0: Tensor, levels: Sequence[int], cond: Conditioning, draws: PairRandom
    ) -> Tensor:
        """x_t (G, K, C, h, w) of clean latents x_0 at one level per group; groups that have arrived leave the batch."""
        plans = [self.moves(t, process.num_timesteps) for t in levels]
        rounds = max(map(len, plans))
        if self.equal_forwards:
            rounds = all_max(rounds, x_0.device)
        x = x_0.clone()
        for k in range(rounds):
            rows = [g for g, plan in enumerate(plans) if k < len(plan)]
            asked = rows or [0]  # all have arrived, but other processes go on: ask once more for nothing
            index = moved(torch.tensor(asked), x.device)
            columns = moved(torch.tensor([plans[g][k] if rows else (0, 0, 0) for g in asked]), x.device).T
            source, destination, network = (column[:, None].expand(-1, x.shape[1]) for column in columns)
            here, words = x[index], cond.map(operator.itemgetter(index))
            noise = self.estimate(predict, process, here, words, (source.clamp(min=0), destination, network))
            if rows:
                there = process.ddim_move(here, noise, source.clamp(min=0), destination)
                if self.eta:
                    std = process.ancestral_std(destination, source.clamp(min=0))
                    fresh = moved(draws.rows(rows).normal(f"inversion_{k}", there.shape[1:]), x.device).to(there.dtype)
                    there = there + like((self.eta * std).to(there.dtype), there) * fresh
                x[index] = there
        torch.clear_autocast_cache()  # casts of the weights made without a graph must not serve the training forward
        return x

    def moves(self, t: int, num_timesteps: int) -> list[Move]:
        """The moves from the clean end to level t."""
        stride = num_timesteps // self.num_steps
        if stride < 1:
            raise ValueError(f"num_steps is {self.num_steps}, but the schedule has {num_timesteps} timesteps; use at most that many")
        first = 1 - stride if self.grid == "legacy020" else 1
        nodes = [node for node in range(first, first + stride * self.num_steps, stride) if node < t]
        if self.grid == "legacy020":
            return [(node, node + stride, node) for node in nodes]
        if self.grid == "current022":
            return [(node - stride, node, node) for node in nodes]
        if t == 0:
            return []
        ends = itertools.pairwise([0, *nodes, t])
        return [(a, b, b if self.network_timestep == "destination" else a) for a, b in ends]

    def estimate(
        self, predict: Predict, process: DdpmProcess, x: Tensor, cond: Conditioning, move: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The noise along which x moves, re-estimated at the end of the move by ReNoise.

        move: levels of start and end, and the network's timestep, (G, K) each.
        """
        source, destination, network = move

        def noise_at(place: Tensor) -> Tensor:
            return process.epsilon(place, predict(place, network, cond).to(place.dtype), network.clamp(min=0))

        estimates = [noise_at(x)]
        for _ in range(self.renoise_iterations):
            estimates.append(noise_at(process.ddim_move(x, estimates[-1], source, destination)))
        return torch.stack(estimates).mean(0) if self.renoise_average else estimates[-1]


def inverter(name: str, policy: Predict | None, reference: Predict | None) -> Predict:
    """The network that inverts. Raises ValueError when the run has none of that name."""
    found = policy if name == "policy" else reference
    if found is None:
        raise ValueError(f"inverter is {name}, but the run has no {name}; use a method with a reference, or inverter policy")
    return found
