"""Diffusion-SDPO (arXiv:2511.03317): the gradient through the rejected image never raises the chosen image's error.

    gradient through rejected <- lambda * gradient,   lambda = clip((1 - mu) <a, a> / <a, b>, 0, 1) if <a, b> > 0, else 1
    a = eps_theta - eps of the chosen image, b of the rejected one

The value of the loss does not change. With output gradients as a stand-in for those of the weights, the update lowers the chosen
image's error to first order under plain gradient descent; Adam need not keep that. The released code has one lambda per
micro-batch, which then depends on how pairs are batched, and adds 1e-9 to the denominator, which biases it; in raw half
precision its inner products vanish and the guard is off without a word. Here lambda is per pair by default, and float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffpref.core.process import like
from diffpref.core.types import Evaluation, Loss, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class SDPO:
    """For pairs; a loss that reads predictions or errors is guarded alike."""

    mu: float = 0.9
    """Required decrease of the chosen error, in [0, 1]: 0 never raises it, 1 drops the rejected image; 0.9 on SD1.5, 0.6 on SDXL."""
    scope: Literal["sample", "microbatch"] = "sample"
    """One factor per pair, or one for all pairs of a forward pass as in the released code."""

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu is {self.mu}; it lies in [0, 1], usually 0.9 on SD1.5 and 0.6 on SDXL")

    def __call__(self, loss: Loss) -> Loss:
        """The loss with the gradient through rejected predictions scaled."""

        def guarded(batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
            scale = self.factor(evals)
            out = loss(batch, [replace(e, policy=_scaled(e.policy, scale)) for e in evals])
            return replace(out, metrics=out.metrics | {"sdpo/factor": scale.mean()})

        return guarded

    def factor(self, evals: Sequence[Evaluation]) -> Tensor:
        """lambda (G,) without gradient; equal for all pairs with scope microbatch. Raises ValueError for groups that are not pairs."""
        images = evals[0].policy.shape[1]
        if images != 2:
            raise ValueError(f"guard sdpo needs pairs, but groups have {images} images; leave the guard out")
        own, mutual = torch.stack([self._products(e) for e in evals]).sum(0)
        if self.scope == "microbatch":
            own, mutual = own.sum().expand_as(own), mutual.sum().expand_as(mutual)
        opposed = mutual <= 0
        ratio = (1 - self.mu) * own / torch.where(opposed, 1, mutual)
        return torch.where(opposed, 1, ratio).clamp(0, 1)

    def _products(self, evaluation: Evaluation) -> Tensor:
        """<a, a> and <a, b>, (2, G), of the output gradients at one step."""
        dtype = torch.promote_types(evaluation.policy.dtype, torch.float32)
        error = (evaluation.policy.detach().to(dtype) - evaluation.step.target.to(dtype)) * like(evaluation.step.weight, evaluation.policy)
        chosen, rejected = error.flatten(2).unbind(1)
        return torch.stack([(chosen * chosen).sum(-1), (chosen * rejected).sum(-1)])


def _scaled(policy: Tensor, scale: Tensor) -> Tensor:
    """The same prediction (G, 2, C, h, w); the gradient through the second image is multiplied by scale (G,)."""
    chosen, rejected = policy.unbind(1)
    fixed = rejected.detach()
    return torch.stack([chosen, fixed + like(scale.to(policy.dtype), rejected) * (rejected - fixed)], 1)
