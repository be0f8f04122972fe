"""DSPO (Zhu et al., ICLR 2025, openreview xyfb9HHvMe): regression of the chosen image onto a preference-shifted target.

    loss = || (eps_theta - eps) - beta (1 - sigmoid(u)) (eps_theta - eps_ref) ||^2     chosen image, mean over (C, h, w)
    u    = beta/2 * (r_chosen - r_rejected),   r = ||eps_ref - eps||^2 - ||eps_theta - eps||^2

The same beta twice, and the sigmoid is differentiated: the rejected image acts through it alone. At the authors' beta of 0.001
u is about 0, so this is in practice regression on the chosen image with a small push away from the reference. Their SDXL
script has another, underived loss, kept as form "sdxl_release": the second term alone where the move from the reference is at
least 0.1 in mean square, else (1 - sigmoid(u))^2. A soft label p puts p - sigmoid(u) for 1 - sigmoid(u).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch

LARGE_MOVE = 0.1  # chosen by hand in the released SDXL script


@dataclass(frozen=True, kw_only=True)
class DSPO:
    """Pairs, a reference with its prediction."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = True
    images_per_group: ClassVar[int | None] = 2

    beta: float = 0.001
    """Size of the push from the reference and sharpness of u; the authors use 0.001 to 0.05 (sdxl_release: 1000 to 5000)."""
    form: Literal["paper", "sdxl_release"] = "paper"
    """The derived loss, or the one of the released SDXL script, for comparison only."""

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}; DSPO needs beta >= 0, usually 0.001 to 0.05; 0 is regression on the chosen image")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        doubt = soft_label(batch) - (reward[:, 0] - reward[:, 1]).sigmoid()  # (G,)
        loss = torch.stack([e.step.weight[:, 0] * self._residual(e, doubt) for e in evals]).sum(0)
        return LossOutput(loss, metrics | {"dspo/doubt": doubt.detach().mean()})

    def _residual(self, evaluation: Evaluation, doubt: Tensor) -> Tensor:
        """Mean square (G,) of the residual of the chosen image at one step."""
        assert evaluation.reference is not None, "DSPO compares with the reference's prediction"
        dtype = torch.promote_types(evaluation.policy.dtype, torch.float32)
        policy, reference, target = (x[:, 0].to(dtype) for x in (evaluation.policy, evaluation.reference.detach(), evaluation.step.target))
        move, push = policy - reference, doubt.reshape(-1, *(1,) * (policy.ndim - 1))
        if self.form == "paper":
            return (policy - target - self.beta * push * move).square().flatten(1).mean(1)
        large = move.square().flatten(1).mean(1) >= LARGE_MOVE
        return torch.where(large, (push * move).square().flatten(1).mean(1), doubt.square())
