"""Links: from the logit of a pair to its loss. Pure functions of (G,) tensors; methods compose them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Link = Callable[[Tensor], Tensor]
"""Logit (G,), reward of the chosen minus that of the rejected image, to loss (G,)."""


def logistic(logit: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy of the label: -p log sigmoid(z) - (1 - p) log sigmoid(-z).

    logit: (G,), reward of the chosen minus that of the rejected image. probability: (G,) in [0, 1] that the chosen image
    is the better one; 1 is a certain label, 0.5 a tie. Returns (G,). Minimal at z = log(p / (1 - p)).
    """
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


def mixed(link: Link, logit: Tensor, probability: Tensor) -> Tensor:
    """The expected loss of an uncertain label: p link(z) + (1 - p) link(-z). Shapes as in `logistic`."""
    return probability * link(logit) + (1 - probability) * link(-logit)


LinkName = Literal["sigmoid", "hinge", "ipo"]
"""Links that any loss on a pair's logit can wear."""


def link_of(name: LinkName, beta: float) -> Link:
    """A link by its name: -log sigmoid(z), `hinge` or `ipo`. beta: of the method that made the logit, see `ipo`."""
    match name:
        case "sigmoid":
            return _negative_log_sigmoid
        case "hinge":
            return hinge
        case "ipo":
            return partial(ipo, beta=beta)


def _negative_log_sigmoid(logit: Tensor) -> Tensor:
    return F.softplus(-logit)


def hinge(logit: Tensor) -> Tensor:
    """max(0, 1 - z) (SLiC, arXiv:2305.10425): no gradient beyond a margin of 1."""
    return F.relu(1 - logit)


def ipo(logit: Tensor, beta: float) -> Tensor:
    """((z - 1/2) / beta)^2 (IPO, arXiv:2310.12036, Eq. 17): a finite optimum at z = 1/2.

    beta: the factor on half the error difference with which the logit was made, so that the target of that difference is
    1 / (2 beta) in the units of the logit over beta: here beta sets a target, not a slope.
    """
    return ((logit - 0.5) / beta).square()


def robust(logit: Tensor, flip_rate: float) -> Tensor:
    """Unbiased under labels that are flipped with `flip_rate` in [0, 0.5) (robust DPO, arXiv:2403.00409, Eq. 12).

    Unbounded below as z grows when flip_rate > 0.
    """
    return (-(1 - flip_rate) * F.logsigmoid(logit) + flip_rate * F.logsigmoid(-logit)) / (1 - 2 * flip_rate)


def reverse_kl(logit: Tensor, target: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(z)) || Bernoulli(target)), the mode-seeking direction (DMPO, arXiv:2507.07510).

    target: (G,) probability of the label, clamped to [1e-6, 1 - 1e-6]. Zero exactly at z = logit(target); both tails saturate.
    """
    target = target.clamp(1e-6, 1 - 1e-6)
    log_p, log_q = F.logsigmoid(logit), F.logsigmoid(-logit)
    return logit.sigmoid() * (log_p - target.log()) + (-logit).sigmoid() * (log_q - torch.log1p(-target))
