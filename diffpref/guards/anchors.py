"""Terms on the chosen image that keep a pair method from making it worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F

from diffpref.core.rewards import policy_error, reference_error
from diffpref.core.types import Evaluation, Loss, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class WinnerAnchor:
    """Adds anchor_weight * ||eps_theta - eps||^2 of the first image of a group: fine-tuning on it (TAPO, arXiv:2508.19527)."""

    anchor_weight: float = 1.0
    """Weight of the chosen image's error; 0 leaves the loss as it is."""

    def __post_init__(self) -> None:
        if not self.anchor_weight >= 0:
            raise ValueError(f"anchor_weight is {self.anchor_weight}; it is 0 or more, usually 0.1 to 1")

    def __call__(self, loss: Loss) -> Loss:
        """The loss with the term added."""

        def guarded(batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
            out, term = loss(batch, evals), self.anchor_weight * policy_error(evals)[:, 0]
            return replace(out, per_group=out.per_group + term, metrics=out.metrics | {"winner_anchor/term": term.detach().mean()})

        return guarded


@dataclass(frozen=True, kw_only=True)
class WinnerFloor:
    """Adds floor_weight * max(0, policy error - reference error) of the first image: the term of DPOP (arXiv:2402.13228), added.

    Needs a reference.
    """

    floor_weight: float = 1.0
    """Weight of what the chosen image loses against the reference; 0 leaves the loss as it is."""

    def __post_init__(self) -> None:
        if not self.floor_weight >= 0:
            raise ValueError(f"floor_weight is {self.floor_weight}; it is 0 or more, about beta / 2 to weigh like the pair's margin")

    def __call__(self, loss: Loss) -> Loss:
        """The loss with the term added. Raises ValueError when the method has no reference."""

        def guarded(batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
            if any(e.reference is None and e.reference_error is None for e in evals):
                raise ValueError("guard winner_floor compares with the reference, but the method has none; use winner_anchor")
            term = self.floor_weight * F.relu(policy_error(evals) - reference_error(evals))[:, 0]
            out = loss(batch, evals)
            return replace(out, per_group=out.per_group + term, metrics=out.metrics | {"winner_floor/term": term.detach().mean()})

        return guarded
