"""Supervised fine-tuning on the chosen images: the baseline of every preference method (arXiv:2311.12908, section 5).

loss = ||eps_theta(x_t) - eps||^2                           mean over (C, h, w), chosen image only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.rewards import policy_error
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Chosen images only, no reference; nothing to tune."""

    needs_reference: ClassVar[bool] = False
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 1

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,): the denoising error of the first image of each group."""
        error = policy_error(evals)[:, 0]
        return LossOutput(error, {"error/policy_chosen": error.detach().mean()})
