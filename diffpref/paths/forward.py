"""Closed-form forward noising: x_t = alpha(t) x_0 + sigma(t) eps, the path of Diffusion-DPO and SFT."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.types import PathStep, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class ForwardNoising:
    """One step per batch; timestep and noise are drawn once per group and shared by its images."""

    def __call__(self, batch: PreferenceBatch, process: DdpmProcess, draws: PairRandom) -> tuple[PathStep, ...]:
        """Noise the latents (G, K, C, h, w) at t ~ U{0..T-1}; a single PathStep of weight 1."""
        x_0 = batch.latents
        t = draws.integers("timestep", process.num_timesteps).to(x_0.device)[:, None].expand(batch.group_shape)
        noise = draws.normal("noise", x_0.shape[2:]).to(x_0)[:, None].expand_as(x_0)
        weight = torch.ones(batch.group_shape, device=x_0.device)
        return (PathStep(process.add_noise(x_0, noise, t), t, process.target(x_0, noise, t), weight),)
