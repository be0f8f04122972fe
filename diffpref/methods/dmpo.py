"""DMPO (arXiv:2507.07510): the reverse Kullback-Leibler divergence instead of cross-entropy.

    loss = KL( Bernoulli(sigmoid(z)) || Bernoulli(1 - alpha) ),   z = beta/2 * (r_chosen - r_rejected)
    r    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2          mean over (C, h, w)

Zero exactly at z = logit(1 - alpha): the margin is finite, where Diffusion-DPO's is not. Both tails are flat, so that badly
ordered pairs teach almost nothing: start from a model close to the data. The released default alpha 0 puts the optimum at a
clamp and is refused. A soft label p aims at p (1 - alpha) + (1 - p) alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.links import reverse_kl
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DMPO:
    """Pairs, a reference."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 2000.0
    """Inverse temperature on half the mean squared error difference; the authors use 2000 on SD1.5 and 6000 on SDXL."""
    alpha: float = 0.01
    """Probability left to the rejected image at the optimum, in (0, 0.5); smaller asks for a larger margin."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; DMPO needs beta > 0, usually 2000 to 6000")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha is {self.alpha}; it is a probability in (0, 0.5), usually 0.01: at 0 the optimum is an artefact")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        target = soft_label(batch).to(reward.dtype) * (1 - 2 * self.alpha) + self.alpha
        return LossOutput(reverse_kl(reward[:, 0] - reward[:, 1], target), metrics)
