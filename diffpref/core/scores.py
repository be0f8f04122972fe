"""Explicit scores of images: from scorers' columns to probabilities, relevance and pair weights."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpref.core.types import PreferenceBatch


def named_score(batch: PreferenceBatch, name: str, method: str) -> Tensor:
    """The scores (G, K) of one scorer. Raises ValueError when the batch does not carry them."""
    if name not in batch.scores:
        has = ", ".join(sorted(batch.scores)) or "none"
        raise ValueError(f"{method} needs the score {name!r} of every image, but the data has {has}; score the images first")
    return batch.scores[name]


def score_range(scores: Tensor, name: str) -> tuple[float, float]:
    """Smallest and largest score of a data set, any shape; compute it once per data set and store it with the data.

    Raises ValueError for scores that are not finite, or all the same: a constant column holds no preference.
    """
    if not scores.numel() or not bool(scores.isfinite().all()):
        raise ValueError(f"the scores {name!r} are empty or not finite; score the images again")
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        raise ValueError(f"the scores {name!r} are {low} for every image; a constant column holds no preference, choose another scorer")
    return low, high


def smoothed_probability(scores: Tensor, low: float, high: float) -> Tensor:
    """Softmax over min-max normalised scores: probability (G,) of the first image of scores (G, 2) (SmPO, arXiv:2506.02698)."""
    return torch.sigmoid((scores[:, 0] - scores[:, 1]) / (high - low))


def win_counts(scores: Tensor) -> Tensor:
    """Share of comparisons won, over other images and scorers (Syn-Pic, arXiv:2410.18013): (G, n, K) of n scorers -> (G, K).

    In [0, 1]; a tie is half a win. Raises ValueError for lists of one image.
    """
    if scores.shape[-1] < 2:
        raise ValueError(f"groups have {scores.shape[-1]} image, but counting wins needs at least two")
    margin = scores[..., :, None] - scores[..., None, :]
    wins = ((margin.sign() + 1) / 2).sum(-1) - 0.5  # without the comparison of an image with itself
    return wins.sum(-2) / (scores.shape[-2] * (scores.shape[-1] - 1))


def histogram_share(scores: Tensor, num_bins: int) -> Tensor:
    """For every score of a data set (N,) the share of scores in its bin of equal width, (N,) in (0, 1]."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; a histogram needs at least 1 bin, for example 20")
    low, high = score_range(scores, "of the histogram")
    bins = ((scores - low) / (high - low) * num_bins).long().clamp(max=num_bins - 1)
    return (torch.bincount(bins, minlength=num_bins) / len(scores))[bins].to(scores.dtype)


def rarity_weight(share: Tensor, exponent: float, scale: float | None = None) -> Tensor:
    """Pair weight (scale / share)^exponent: frequent score regions count less (VideoDPO, arXiv:2412.14167).

    share: (N,), see `histogram_share`. exponent 0 is no weighting. scale: the share of weight 1, the mean share when not given
    (the authors' code has 0.72, which belongs to their data).
    """
    if exponent < 0:
        raise ValueError(f"exponent is {exponent}; it is 0 for equal weights or positive, larger favours rare scores")
    return (((share.mean() if scale is None else scale) / share) ** exponent).to(share.dtype)
