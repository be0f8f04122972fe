"""MaPO (Hong et al., 2024, arXiv:2406.06424): margin-aware, without a reference.

    loss   = m_chosen - beta * log sigmoid(q),   q = T * (phi(s m_chosen) - phi(s m_rejected))
    phi(y) = y / (exp(y) - 1),   m = ||eps_theta - eps||^2      mean over (C, h, w),   T = 1000

phi falls from 1 to 0, so the gain from making the rejected image worse is bounded. At the usual errors q is about
-T s / 2 (m_chosen - m_rejected): with the defaults the margin term weighs some 12 times the plain error. The authors' phi is
infinite near 0 and not a number at 0; here it is exact everywhere, as is its slope. Their "snr_value" is a constant multiplier,
whatever its name; snr_mode per_timestep multiplies it with alpha^2 / sigma^2, which is ours. A soft label p mixes the losses of
both orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffpref.core.links import logistic
from diffpref.core.rewards import error_metrics, margin_metrics, mean_squared_error, policy_error, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch

SCALE = 1000  # T, the number of training timesteps


def phi(y: Tensor) -> Tensor:
    """y / (exp(y) - 1) for y >= 0, with its slope: 1 and -1/2 at 0, 0 for large y."""
    small = y < 0.1
    # The untaken branch of a where still gets a gradient, so it is kept away from its own singular point.
    far = torch.where(small, torch.ones_like(y), y).clamp(max=80)  # beyond, phi is 0 for all purposes and exp overflows in float32
    near = torch.where(small, y, torch.zeros_like(y))
    series = 1 - near / 2 + near**2 / 12 - near**4 / 720 + near**6 / 30240
    return torch.where(small, series, far / torch.expm1(far))


@dataclass(frozen=True, kw_only=True)
class MaPO:
    """Pairs, no reference."""

    needs_reference: ClassVar[bool] = False
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 0.1
    """Weight of the margin term; 0 is plain fine-tuning on the chosen images. Not the beta of Diffusion-DPO."""
    snr: float = 0.5
    """Multiplier of the error inside phi; larger steepens the margin and saturates it earlier."""
    snr_mode: Literal["constant", "per_timestep"] = "constant"
    """Use the multiplier as it is, or times the signal-to-noise ratio of the timestep."""

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}; in MaPO it weighs the margin term and is 0 or more, usually 0.1")
        if not self.snr > 0:
            raise ValueError(f"snr is {self.snr}; it is positive, usually 0.5")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        error, label = policy_error(evals), soft_label(batch)
        reward = SCALE * phi(torch.stack([self._scaled(e) for e in evals]).sum(0))
        plain = label * error[:, 0] + (1 - label) * error[:, 1]
        margin = logistic(reward[:, 0] - reward[:, 1], label)
        metrics = margin_metrics(reward) | error_metrics("policy", error) | {"mapo/margin_loss": margin.detach().mean()}
        return LossOutput(plain + self.beta * margin, metrics)

    def _scaled(self, evaluation: Evaluation) -> Tensor:
        """The argument of phi at one step, (G, K)."""
        step = evaluation.step
        scaled = self.snr * step.weight * mean_squared_error(evaluation.policy, step.target)
        if self.snr_mode == "constant":
            return scaled
        assert step.log_snr is not None, "the path does not state log_snr"
        return scaled * step.log_snr.exp().to(scaled.dtype)
