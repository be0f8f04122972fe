"""Steps that an on-policy source recorded while it sampled; a sampled transition is a regression like any other.

    x_p ~ N(a x_t + b eps_theta, std^2)        a stochastic DDIM step from level t to p
    log p_theta(x_p | x_t) = -weight * mean((target - eps_theta)^2) + const,      target = (x_p - a x_t) / b,  weight = b^2 / (2 std^2)

The logarithm of the density is averaged over (C, h, w), as in the code of DDPO, D3PO and SPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.core.process import DdpmProcess, like
from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, PathStep, Predict, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Replays the steps that came with the batch."""

    def __call__(
        self,
        batch: PreferenceBatch,
        process: DdpmProcess,
        draws: PairRandom,
        policy: Predict | None = None,
        reference: Predict | None = None,
        null: Conditioning | None = None,
    ) -> tuple[PathStep, ...]:
        """The recorded steps. Asks no network. Raises ValueError when there are none."""
        if not batch.steps:
            raise ValueError("path recorded needs a source that records steps; use it with a method that samples, such as spo")
        return batch.steps


def transition_step(
    process: DdpmProcess,
    x_t: Tensor,
    x_p: Tensor,
    t: Tensor,
    p: Tensor,
    *,
    eta: float = 1.0,
    guidance_scale: float = 1.0,
    shared_input: tuple[bool, ...] = (),
) -> PathStep:
    """The step from x_t at levels t to the sampled x_p at levels p < t. Latents (G, K, C, h, w), levels int64 (G, K).

    shared_input: (G,) groups whose samples have one x_t, for which the networks are asked once; none of them when empty.
    Raises ValueError where the step has no density: eta outside (0, 1], or p not below t.
    """
    a, b, std = process.transition(t, p, eta)
    wide = torch.promote_types(x_t.dtype, torch.float32)
    target = (x_p.to(wide) - like(a.to(wide), x_t) * x_t.to(wide)) / like(b.to(wide), x_t)
    weight = (b.square() / (2 * std.square())).to(wide)
    return PathStep(x_t, t, target, weight, process.log_snr(t).float(), guidance_scale, shared_input=shared_input)
