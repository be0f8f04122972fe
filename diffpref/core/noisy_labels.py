"""Label noise as a latent variable: expectation-maximisation over "is this label right?" (LCPO, arXiv:2509.24159)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpref.core.distributed import all_sum
from diffpref.core.links import Link


def label_confidence(link: Link, logit: Tensor, reliability: Tensor | float) -> Tensor:
    """E-step: probability (G,) that the label is right, without gradient.

        c = eta p / (eta p + (1 - eta)(1 - p)),   p = exp(-l(z)) / (exp(-l(z)) + exp(-l(-z)))

    logit: (G,). reliability eta: in (0, 1), a number or (G,). With eta 1/2 it is p itself: nothing would be learnt.
    """
    z = logit.detach()
    eta = torch.as_tensor(reliability, dtype=z.dtype, device=z.device)
    return torch.sigmoid(link(-z) - link(z) + eta.logit())


def updated_reliability(reliability: Tensor, confidence: Tensor, annotators: Tensor, decay: float = 0.99, floor: float = 0.5) -> Tensor:
    """M-step: eta (A,) of every annotator, moved towards the mean confidence of its labels in this batch, all processes together.

    confidence: (G,). annotators: int64 (G,) in [0, A). Annotators without a label in the batch keep their value. The decay, the
    floor and the usual start of 0.9 are ours; the paper's constants are not known. Raises ValueError for a decay outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it lies in [0, 1], usually 0.99")
    sums = torch.zeros(2, len(reliability), dtype=reliability.dtype, device=reliability.device)
    found = confidence.detach().to(reliability.dtype)
    sums[0].index_add_(0, annotators, found)
    sums[1].index_add_(0, annotators, torch.ones_like(found))
    total, count = all_sum(sums)
    moved = decay * reliability + (1 - decay) * total / count.clamp(min=1)
    return torch.where(count > 0, moved.clamp(min=floor), reliability)
