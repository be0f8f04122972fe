"""SPO, step-by-step preference optimization (Liang et al., 2024, arXiv:2406.04314), and with clip_range 0 TailorPO (arXiv:2502.01667).

    loss = -log sigmoid( beta (log r_chosen - log r_rejected) )
    r    = clamp( p_theta(x_p | x_t, c) / p_ref(x_p | x_t, c), 1 - clip_range, 1 + clip_range )

p is the normal density of a stochastic DDIM step, its logarithm averaged over (C, h, w); chosen and rejected x_p come from the same
x_t, and a step-aware preference model tells them apart (sources/stepwise.py). Guidance is part of policy and reference.

The clamp is in the authors' code and not in their paper; outside the band a term has no gradient. beta has no factor of one half.
The code takes log(clamp(exp(.))), here the logarithm is clamped, which is the same number without its rounding; log_ratio naive
is the code's form. Clipped at another width this also is D3PO's loss (arXiv:2311.13231).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffpref.core.links import logistic
from diffpref.core.rewards import implicit_rewards, margin_metrics, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class SPO:
    """Pairs of samples of one step, a reference."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 10.0
    """Inverse temperature on the mean log ratios; larger keeps the policy closer to the reference."""
    clip_range: float = 0.1
    """Ratios outside 1 -+ this are held at the border and have no gradient, in [0, 1); 0 does not clip."""
    log_ratio: Literal["direct", "naive"] = "direct"
    """Clip the logarithm of the ratio, or take the logarithm of the clipped exponential as the release does."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; SPO needs beta > 0, the authors use 10")
        if not 0 <= self.clip_range < 1:
            raise ValueError(f"clip_range is {self.clip_range}; it lies in [0, 1), 0.1 in the release and 0 for none")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen sample first."""
        log_ratio, metrics = implicit_rewards(evals, 1.0)
        low, high = (math.log1p(-self.clip_range), math.log1p(self.clip_range)) if self.clip_range else (-math.inf, math.inf)
        naive = self.log_ratio == "naive"
        kept = log_ratio.exp().clamp(math.exp(low), math.exp(high)).log() if naive else log_ratio.clamp(low, high)
        reward = self.beta * kept
        outside = (log_ratio < low) | (log_ratio > high)
        metrics |= margin_metrics(reward)
        metrics |= {"spo/clipped": outside.to(reward.dtype).mean(), "spo/log_ratio_size": log_ratio.detach().abs().mean()}
        return LossOutput(logistic(reward[:, 0] - reward[:, 1], soft_label(batch)), metrics)
