"""DRO (Li et al., 2025, arXiv:2503.22677): a linear, reference-free loss.

    loss = sum over images of (2p - 1) ||eps_theta - eps||^2         mean over (C, h, w)

For a pair that is the error of the chosen minus that of the rejected image; for single images labelled good (p = 1) or bad
(p = 0) it is plus or minus the error. There is no beta, and the weight of an image does not depend on the margin. The loss
has no lower bound: long runs raise the rejected images' errors without end and take the model with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.rewards import policy_error
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DRO:
    """Pairs or labelled images, no reference; nothing to tune."""

    needs_reference: ClassVar[bool] = False
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        warnings.warn(
            "method dro has no lower bound: without an end in sight it raises the errors of rejected images until the model is lost. "
            "Keep max_train_steps small, or wear guard sdpo or winner_anchor",
            stacklevel=2,
        )

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of groups of any size."""
        error = policy_error(evals)
        sign = 2 * batch.relevance.to(error.dtype) - 1
        seen = error.detach()
        desirable, undesirable = (((s * sign > 0) * seen).sum() / (s * sign > 0).sum().clamp(min=1) for s in (1, -1))
        metrics = {"error/policy_desirable": desirable, "error/policy_undesirable": undesirable}
        return LossOutput((sign * error).sum(1), metrics)
