"""Closed-form forward noising: x_t = alpha(t) x_0 + sigma(t) eps, the path of Diffusion-DPO and SFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom, moved
from diffpref.core.types import Conditioning, PathStep, Predict, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class ForwardNoising:
    """One step per batch; the timestep is drawn once per group and shared by its images, and so is the noise."""

    shared_noise: bool = True
    """Give all images of a group the same noise; RankDPO draws it per image."""
    noise_offset: float = 0.0
    """Standard deviation of a constant per channel that is added to the noise, drawn once per group; lets brightness move."""
    input_perturbation: float = 0.0
    """Share of extra noise in x_t that the target does not contain, drawn once per group (arXiv:2301.11706)."""

    def __post_init__(self) -> None:
        for name in ("noise_offset", "input_perturbation"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a share between 0 and 1, usually 0.1 or 0 for none")

    def __call__(
        self,
        batch: PreferenceBatch,
        process: DdpmProcess,
        draws: PairRandom,
        policy: Predict | None = None,
        reference: Predict | None = None,
        null: Conditioning | None = None,
    ) -> tuple[PathStep, ...]:
        """Noise the latents (G, K, C, h, w) at t uniform over process.timesteps; a single PathStep of weight 1. Asks no network."""
        x_0 = batch.latents
        levels = process.timesteps
        t = moved(levels[draws.integers("timestep", len(levels))], x_0.device)[:, None].expand(batch.group_shape)
        noise = self._noise(x_0, draws)
        seen = noise
        if self.input_perturbation:
            extra = moved(draws.normal("input_perturbation", x_0.shape[2:]), x_0.device).to(x_0.dtype)[:, None]
            seen = noise + self.input_perturbation * extra
        weight = torch.ones(batch.group_shape, device=x_0.device)
        log_snr = process.log_snr(t).float()
        return (PathStep(process.add_noise(x_0, seen, t), t, process.target(x_0, noise, t), weight, log_snr),)

    def _noise(self, x_0: Tensor, draws: PairRandom) -> Tensor:
        """Like x_0, shared within a group or not."""

        def drawn(purpose: str, shape: Sequence[int]) -> Tensor:
            return moved(draws.normal(purpose, shape), x_0.device).to(x_0.dtype)

        noise = drawn("noise", x_0.shape[2:])[:, None].expand_as(x_0) if self.shared_noise else drawn("noise_per_image", x_0.shape[1:])
        if self.noise_offset:
            noise = noise + self.noise_offset * drawn("noise_offset", (x_0.shape[2], 1, 1))[:, None]
        return noise
