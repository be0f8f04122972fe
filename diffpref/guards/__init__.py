"""What any pair method can wear: guards change its gradient or its evaluations, anchors add a term for every group.

A guard is a frozen dataclass of settings that turns a loss into a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from diffpref.core.types import Evaluation, Loss, LossOutput, PreferenceBatch
from diffpref.guards.anchors import WinnerAnchor, WinnerFloor
from diffpref.guards.rejected_clip import RejectedClip
from diffpref.guards.sdpo import SDPO


class Guard(Protocol):
    """Settings that are called with a loss and return the guarded loss."""

    def __call__(self, loss: Loss) -> Loss:
        """The loss with this guard around it; per_group stays (G,), metrics grow."""


GUARDS: dict[str, type[Guard]] = {"sdpo": SDPO, "winner_anchor": WinnerAnchor, "winner_floor": WinnerFloor, "rejected_clip": RejectedClip}


def guarded(loss: Loss, guards: Iterable[Guard] = ()) -> Loss:
    """The loss of a run: the method's, wearing `guards` in their order, times the weight of each group if the batch has one."""
    for guard in guards:
        loss = guard(loss)

    def weighted(batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        out = loss(batch, evals)
        if batch.weight is None:
            return out
        return replace(out, per_group=out.per_group * batch.weight.to(out.per_group.dtype))

    return weighted
