"""How far the labels of each annotator can be trusted, estimated while training (LCPO, arXiv:2509.24159)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffpref.core.noisy_labels import updated_reliability
from diffpref.core.random import moved
from diffpref.core.types import LossOutput, PreferenceBatch
from diffpref.data.loader import PairPixels

SCORE = "reliability"
"""Name under which a batch carries it, and columns that give it per pair."""


@dataclass
class Reliability:
    """One number per annotator, and what was seen since it was last moved."""

    eta: Tensor  # (A,) float64, on the CPU
    annotator: Mapping[str, int]  # of each group id; those that are not there belong to annotator 0
    decay: float
    floor: float
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # confidence and annotators of each micro-batch

    @classmethod
    def start(cls, method: Any, pixels: PairPixels) -> Reliability | None:
        """For a method that estimates it; None for others, and where the data has columns of it."""
        if not hasattr(method, "reliability_decay") or SCORE in pixels.pairs.scores:
            return None
        users = [pixels.pairs.user_ids[i] for i in range(len(pixels))]
        names = sorted({str(user) for user in users})
        place = {name: number for number, name in enumerate(names)}
        of_group = {pixels.group_id(i): place[str(user)] for i, user in enumerate(users)} if len(names) > 1 else {}
        eta = torch.full((len(names),), method.reliability, dtype=torch.float64)
        return cls(eta, of_group, method.reliability_decay, method.reliability_floor)

    def attach(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with the present reliability of whoever labelled each group, as a score (G, K)."""
        found = moved(self.eta[self._annotators(batch)], batch.relevance.device).to(batch.relevance.dtype)
        return replace(batch, scores={**batch.scores, SCORE: found[:, None].expand(batch.group_shape)})

    def note(self, batch: PreferenceBatch, out: LossOutput) -> None:
        """Remember how sure the method was of the labels of a micro-batch."""
        assert out.confidence is not None, "the method states no confidence"
        self.seen.append((out.confidence.detach().double(), self._annotators(batch)))

    def update(self, device: torch.device) -> None:
        """Move every annotator's number by what all processes saw since the last time; every process must call it."""
        confidence, annotators = (torch.cat(parts).to(device) for parts in zip(*self.seen, strict=True))
        known = confidence.isfinite()  # an update that was skipped says nothing
        self.eta = updated_reliability(self.eta.to(device), confidence[known], annotators[known], self.decay, self.floor).cpu()
        self.seen.clear()

    def _annotators(self, batch: PreferenceBatch) -> Tensor:
        return torch.tensor([self.annotator.get(pair_id, 0) for pair_id in batch.pair_ids])
