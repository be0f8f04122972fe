"""Losses on ranked lists: from the rewards of K images and their relevance to one loss per list."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def check_ranked(reward: Tensor, relevance: Tensor) -> None:
    """Raises ValueError when rewards and relevance do not describe the same lists of at least two images in [0, 1]."""
    if reward.shape != relevance.shape:
        raise ValueError(f"relevance is {tuple(relevance.shape)} for {tuple(reward.shape)} images; give one value per image of every group")
    if reward.shape[1] < 2:
        raise ValueError(f"groups have {reward.shape[1]} image, but a ranking needs at least two; use a source of ranked lists or pairs")


def ranks(values: Tensor) -> Tensor:
    """Rank 1 for the largest of each row (G, K); equal values share the mean of their ranks, so order within a row is no matter."""
    higher = (values[:, None, :] > values[:, :, None]).sum(-1)
    equal = (values[:, None, :] == values[:, :, None]).sum(-1)
    return 1 + higher + (equal - 1) / 2


def ranks_in_order(values: Tensor) -> Tensor:
    """Rank 1 for the largest of each row (G, K); equal values are ranked as they stand."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) + 1


def lambda_dcg(reward: Tensor, relevance: Tensor, rank: Tensor) -> Tensor:
    """Pairs weighted by what exchanging them would change in the discounted gain (arXiv:2410.18013, arXiv:2402.01878).

        sum over phi_i > phi_j of |G_i - G_j| |1/D_i - 1/D_j| softplus(-(s_i - s_j)),   G = 2^phi - 1,  D = log(1 + rank)

    reward: (G, K). relevance phi: (G, K) in [0, 1]. rank: (G, K), 1 is best. Returns (G,); ties in relevance count nothing.
    """
    gain = torch.exp2(relevance) - 1
    discount = 1 / torch.log1p(rank.to(reward.dtype))
    weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    return pairwise(reward, relevance, lambda margin: F.softplus(-margin), weight.detach())


def pairwise(reward: Tensor, relevance: Tensor, link: Callable[[Tensor], Tensor], weight: Tensor | None = None) -> Tensor:
    """Sum of link(s_i - s_j) over all pairs with a higher relevance of i, (G,); weight: (G, K, K)."""
    better = relevance[:, :, None] > relevance[:, None, :]
    losses = link(reward[:, :, None] - reward[:, None, :])
    return torch.where(better, losses if weight is None else weight * losses, 0).sum((1, 2))


def list_mle(reward: Tensor, relevance: Tensor) -> Tensor:
    """Negative log-likelihood of the ranking under Plackett-Luce (Xia et al., 2008), (G,).

    Images of equal relevance count in the order in which they stand.
    """
    order = relevance.argsort(dim=1, descending=True, stable=True)
    ordered = reward.gather(1, order)
    remaining = ordered.flip(1).logcumsumexp(1).flip(1)
    return (remaining - ordered).sum(1)


def softmax_cross_entropy(reward: Tensor, relevance: Tensor) -> Tensor:
    """Cross-entropy of softmax(s) against relevance / sum(relevance), (G,); uniform where no image is relevant."""
    total = relevance.sum(1, keepdim=True)
    share = torch.where(total > 0, relevance / total.clamp(min=torch.finfo(relevance.dtype).tiny), 1 / relevance.shape[1])
    return -(share * reward.log_softmax(1)).sum(1)
