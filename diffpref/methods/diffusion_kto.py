"""Diffusion-KTO (Li et al., 2024, arXiv:2404.04465): images that are good or bad on their own, without pairs.

    loss = w_y (1 - h(v)),   v = y * beta/2 * (d - z_0),   y = +1 desirable, -1 undesirable
    d    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2,   z_0 = max(0, mean of d over the batch of all processes), no gradient

An image's relevance is the probability that it is desirable. The authors' beta has no half: theirs of 1000 is 2000 here. Groups
may hold any number of images; a pair counts as one desirable and one undesirable image. z_0 is noisy with few images per
batch, and with a single one v would always be 0: that is refused. risk_seeking has no lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.core.distributed import all_mean, all_sum, world_size
from diffpref.core.rewards import policy_error, reference_error
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DiffusionKTO:
    """Labelled images in groups of any size, a reference, a statistic of the whole batch."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = None
    least_images: ClassVar[int] = 2
    """Images of all processes in a forward pass, below which there is nothing to compare with."""

    beta: float = 2000.0
    """Sharpness on half the mean squared error difference; larger saturates the value earlier."""
    value_function: Literal["sigmoid", "loss_averse", "risk_seeking"] = "sigmoid"
    """h: sigmoid(v), log sigmoid(v), or -log sigmoid(-v)."""
    reference_point: Literal["mean", "class_means"] = "mean"
    """z_0: the mean of all images, not below 0, or the mean of the two labels' means, of either sign."""
    desirable_weight: float = 1.0
    """w of desirable images."""
    undesirable_weight: float = 1.0
    """w of undesirable images."""

    def __post_init__(self) -> None:
        for name, least in (("beta", 0.0), ("desirable_weight", 0.0), ("undesirable_weight", 0.0)):
            if not getattr(self, name) > least:
                raise ValueError(f"{name} is {getattr(self, name)}; Diffusion-KTO needs {name} > 0")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,), mean over the images of a group. Raises ValueError for a batch of one image over all processes."""
        policy, reference = policy_error(evals), reference_error(evals)
        gain = reference - policy  # d, (G, K)
        if gain.numel() * world_size() == 1:
            raise ValueError("Diffusion-KTO compares images with the mean of their batch, which holds one image; raise train_batch_size")
        desirable = batch.relevance.to(gain.dtype)
        point = self._reference_point(gain.detach(), desirable)
        v = 0.5 * self.beta * (gain - point)
        good, bad = (w * (1 - self._value(s * v)) for w, s in ((self.desirable_weight, 1), (self.undesirable_weight, -1)))
        per_image = desirable * good + (1 - desirable) * bad
        seen = 0.5 * self.beta * gain.detach()
        metrics = {
            "rewards/desirable": (desirable * seen).sum() / desirable.sum().clamp(min=1),
            "rewards/undesirable": ((1 - desirable) * seen).sum() / (1 - desirable).sum().clamp(min=1),
            "diffusion_kto/reference_point": point,
            "error/policy": policy.detach().mean(),
            "error/reference": reference.mean(),
        }
        return LossOutput(per_image.mean(1), metrics)

    def _reference_point(self, gain: Tensor, desirable: Tensor) -> Tensor:
        """z_0, a scalar without gradient, equal on all processes."""
        if self.reference_point == "mean":
            return all_mean(gain.sum(), gain.numel()).clamp(min=0)
        shares = torch.stack([desirable, 1 - desirable])
        totals, counts = all_sum(torch.stack([(shares * gain).sum((1, 2)), shares.sum((1, 2))])).unbind(0)
        means = totals / counts.clamp(min=torch.finfo(counts.dtype).tiny)  # 0 for a label that is not there
        return means.sum() / (counts > 0).sum()

    def _value(self, v: Tensor) -> Tensor:
        """h(v)."""
        return {"sigmoid": torch.sigmoid, "loss_averse": F.logsigmoid, "risk_seeking": F.softplus}[self.value_function](v)
