"""Diffusion-DPO (Wallace et al., 2023, arXiv:2311.12908, Eq. 14).

    loss = -log sigmoid(z),   z = beta/2 * (r_chosen - r_rejected)
    r    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2          mean over (C, h, w)

T * w(lambda_t) of the paper is folded into beta, noise and timestep are shared within the pair, and beta multiplies half
the difference: all three as in the authors' code. Soft labels (ties, vote shares) enter as the probability p of the
label: loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z), and so they do with every other loss_type. Errors are taken in
float32; the official script takes the reference's in float16, which blurs z by about 0.06 at beta 5000.

On the path of DDIM inversion this is InPO (arXiv:2503.18454); with a caption per image it is DCPO (arXiv:2502.06023), and with
one image and two captions TDPO (arXiv:2509.25771).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffpref.core.links import hinge, ipo, logistic, mixed, robust
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """Pairs, a reference, one step per pair."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error difference; larger keeps the policy closer to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is flipped, in [0, 0.5); 0 is plain DPO."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "ipo_diffusers", "robust"] = "sigmoid"
    """Link from z to the loss. With ipo a larger beta asks for a smaller margin, z of 1/2; ipo_diffusers is four times ipo."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; Diffusion-DPO needs beta > 0, usually 2000 to 5000 on SD and SDXL")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it is a probability in [0, 0.5)")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        return LossOutput(self.link(reward[:, 0] - reward[:, 1], soft_label(batch)), metrics)

    def link(self, logit: Tensor, label: Tensor) -> Tensor:
        """Loss (G,) of logits and label probabilities (G,)."""
        probability = label * (1 - 2 * self.label_smoothing) + self.label_smoothing
        match self.loss_type:
            case "sigmoid":
                return logistic(logit, probability)
            case "hinge":
                return mixed(hinge, logit, probability)
            case "robust":
                return mixed(lambda z: robust(z, self.label_smoothing), logit, label)
            case "ipo":
                return mixed(lambda z: ipo(z, self.beta), logit, probability)
            case "ipo_diffusers":
                return mixed(lambda z: ipo(z, 0.5 * self.beta), logit, probability)
