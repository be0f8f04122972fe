"""Diffusion-DPO (Wallace et al., 2023, arXiv:2311.12908, Eq. 14).

    loss = -log sigmoid(z),   z = beta/2 * (r_chosen - r_rejected)
    r    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2          mean over (C, h, w)

T * w(lambda_t) of the paper is folded into beta, noise and timestep are shared within the pair, and beta multiplies half
the difference: all three as in the authors' code. Soft labels (ties, vote shares) enter as the probability p of the
label: loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z). Errors are taken in float32; the official script takes the
reference's in float16, which blurs z by about 0.06 at beta 5000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.links import logistic
from diffpref.core.rewards import error_metrics, margin_metrics, policy_error, reference_error
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """Pairs, a reference, one step per pair."""

    needs_reference: ClassVar[bool] = True
    images_per_group: ClassVar[int] = 2

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error difference; larger keeps the policy closer to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is flipped, in [0, 0.5); 0 is plain DPO."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; Diffusion-DPO needs beta > 0, usually 2000 to 5000 on SD and SDXL")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it is a probability in [0, 0.5)")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        policy, reference = policy_error(evals), reference_error(evals)
        reward = 0.5 * self.beta * (reference - policy)  # (G, 2)
        probability = batch.relevance[:, 0] * (1 - 2 * self.label_smoothing) + self.label_smoothing
        loss = logistic(reward[:, 0] - reward[:, 1], probability)
        metrics = margin_metrics(reward) | error_metrics("policy", policy) | error_metrics("reference", reference)
        return LossOutput(loss, metrics)
