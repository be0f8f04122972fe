"""The implicit reward of an aligned model as a scorer (arXiv:2311.12908, section 5.2).

    score(image, prompt) = mean over draws of  ||eps_ref(x_t) - eps||^2 - ||eps_theta(x_t) - eps||^2

An estimate of the ELBO difference between policy and reference from keyed draws of t and noise, one t in each of D equal
buckets of the time axis; the draws are shared by the images of a prompt, so differences between them carry less noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpref.core.policy import evaluate
from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.rewards import policy_error, reference_error
from diffpref.core.types import Conditioning, PathStep, Predict, PreferenceBatch


@dataclass(frozen=True)
class ImplicitReward:
    """Policy and its reference as a scorer of latents."""

    policy: Predict
    reference: Predict
    process: DdpmProcess
    seed: int = 0
    num_draws: int = 10
    """Draws per image, each from its own bucket of timesteps."""

    @torch.no_grad()
    def gains(self, batch: PreferenceBatch) -> Tensor:
        """How much better the policy denoises than the reference, per draw from low to high noise. (G, K, D) float32."""
        columns = []
        for draw in range(self.num_draws):
            evals = evaluate((self._step(batch, draw),), batch.cond, self.policy, self.reference)
            columns.append(reference_error(evals) - policy_error(evals))
        return torch.stack(columns, -1)

    def _step(self, batch: PreferenceBatch, draw: int) -> PathStep:
        x_0 = batch.latents
        draws = PairRandom(self.seed, batch.pair_ids, (0,) * len(batch.pair_ids), draw)
        levels = self.process.timesteps
        low, high = (round(edge * len(levels) / self.num_draws) for edge in (draw, draw + 1))
        low = min(low, len(levels) - 1)  # with fewer levels than draws, neighbouring draws share a level
        t = levels[low + draws.integers("score_timestep", max(high - low, 1))].to(x_0.device)[:, None].expand(batch.group_shape)
        noise = draws.normal("score_noise", x_0.shape[2:]).to(x_0)[:, None].expand_as(x_0)
        weight = torch.ones(batch.group_shape, device=x_0.device)
        return PathStep(self.process.add_noise(x_0, noise, t), t, self.process.target(x_0, noise, t), weight)


def implicit_scorer(
    reward: ImplicitReward, encode_images: Callable[[Any], Tensor], encode_prompts: Callable[[Sequence[str]], Conditioning]
) -> Callable[[Any, Sequence[str]], Tensor]:
    """A scorer (N pictures, N prompts) -> float32 (N,).

    encode_images: pictures, in whatever form the caller has them, to scaled latents (N, C, h, w).
    encode_prompts: N prompts to conditioning (N, 1, ...), time_ids included where the model
    needs them. An image's score depends on its prompt and pixels only, not on its neighbours.
    """

    def score(images: Any, prompts: Sequence[str]) -> Tensor:
        latents = encode_images(images)[:, None]
        relevance = torch.ones(latents.shape[:2], device=latents.device)
        batch = PreferenceBatch(latents, encode_prompts(prompts), relevance, tuple(prompts), (0,) * len(prompts))
        return reward.gains(batch).mean(-1)[:, 0]

    return score


def pair_accuracy(gains: Tensor) -> tuple[float, list[float]]:
    """Share of pairs in which the first image scores higher, overall and per draw bucket; a tie counts one half.

    gains: (G, 2, D) of pairs with the preferred image first.
    """
    margin = gains[:, 0] - gains[:, 1]  # (G, D)

    def share(m: Tensor) -> float:
        return float(((m > 0).float() + 0.5 * (m == 0).float()).mean())

    return share(margin.mean(-1)), [share(m) for m in margin.unbind(-1)]
