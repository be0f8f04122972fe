"""A ceiling on the rejected image's error, beyond which it neither counts nor pulls.

TPO (arXiv:2509.25771) reports a clip on its negative term without its form; this one is ours:
rejected error <- min(rejected error, clip_ratio * reference error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffpref.core.process import like
from diffpref.core.rewards import mean_squared_error
from diffpref.core.types import Evaluation, Loss, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class RejectedClip:
    """For pairs with a reference."""

    clip_ratio: float = 1.5
    """Largest error of the rejected image in units of the reference's; lower stops pushing it away earlier."""

    def __post_init__(self) -> None:
        if not self.clip_ratio >= 1:
            raise ValueError(f"clip_ratio is {self.clip_ratio}; below 1 it would cut at the reference itself, usually 1.5")

    def __call__(self, loss: Loss) -> Loss:
        """The loss on clipped evaluations. Raises ValueError when the method has no reference or no pairs."""

        def guarded(batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
            clipped = [self._clipped(e) for e in evals]
            share = torch.stack([c.float().mean() for _, c in clipped]).mean()
            out = loss(batch, [e for e, _ in clipped])
            return replace(out, metrics=out.metrics | {"rejected_clip/share": share})

        return guarded

    def _clipped(self, evaluation: Evaluation) -> tuple[Evaluation, torch.Tensor]:
        """The evaluation with rejected predictions drawn towards the target where they are too far, and where that was, (G,)."""
        step, known = evaluation.step, evaluation.reference_error
        if (images := evaluation.policy.shape[1]) != 2:
            raise ValueError(f"guard rejected_clip needs pairs, but groups have {images} images; leave the guard out")
        if known is None and evaluation.reference is None:
            raise ValueError("guard rejected_clip compares with the reference, but the method has none; leave the guard out")
        if known is None:
            assert evaluation.reference is not None
            known = mean_squared_error(evaluation.reference, step.target)
        ceiling = self.clip_ratio * known[:, 1].detach()
        policy, target = evaluation.policy[:, 1], step.target[:, 1]
        error = mean_squared_error(evaluation.policy, step.target)[:, 1].detach()
        beyond = error > ceiling
        shrink = (ceiling / torch.where(beyond, error, 1)).sqrt()
        fixed = (target + like(shrink, target) * (policy.detach() - target)).to(policy.dtype)
        rejected = torch.where(like(beyond, policy), fixed, policy)
        return replace(evaluation, policy=torch.stack([evaluation.policy[:, 0], rejected], 1)), beyond
