"""The statistics of a comparison between a base model and an aligned one; numpy only, every function pure.

P counts prompts, M the base samples drawn per prompt. Scores are floats, higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

_RESAMPLES_AT_ONCE = 500
"""Resamples drawn per block: bounds the memory of the bootstrap to this many rows of P indices."""


@dataclass(frozen=True)
class BestOfN:
    """How many base samples it takes to match the aligned model."""

    n: float  # fractional, in [1, M]
    reached: bool  # False: more than M samples are needed, and n is M


def count_wins(base: np.ndarray, aligned: np.ndarray) -> tuple[float, int]:
    """Prompts on which the aligned score is higher, out of how many; a tie counts one half.

    Both arrays are (P,), paired by prompt. Returns (wins, P); wins / P is the win rate.

    Raises:
        ValueError: the shapes differ, or a score is not finite.
    """
    base, aligned = _finite(base, "base", ndim=1), _finite(aligned, "aligned", ndim=1)
    if base.shape != aligned.shape:
        raise ValueError(f"scores are paired by prompt, but base has {len(base)} and aligned {len(aligned)}")
    wins = np.sum(aligned > base) + 0.5 * np.sum(aligned == base)
    return float(wins), len(base)


def wilson_interval(wins: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) in [0, 1] of the share wins / n; wins may be fractional.

    Raises:
        ValueError: n < 1, wins outside [0, n], or confidence outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"n={n}, but an interval needs at least one prompt")
    if not 0 <= wins <= n:
        raise ValueError(f"wins={wins} is outside [0, n={n}]")
    z = NormalDist().inv_cdf(0.5 + _checked_confidence(confidence) / 2)
    share, spread = wins / n, z * z / n
    centre = share + spread / 2
    half = math.sqrt(spread * share * (1 - share) + (spread / 2) ** 2)
    # Rounding may push the ends of 0 and n wins a hair past the share itself.
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def paired_bootstrap(
    differences: np.ndarray, seed: int = 0, num_resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the per-prompt differences (P,) and its percentile interval under resampling of prompts.

    Returns (mean, low, high); the same arguments give the same numbers.

    Raises:
        ValueError: no difference, one that is not finite, num_resamples < 1, or confidence outside (0, 1).
    """
    differences = _finite(differences, "differences", ndim=1)
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}, but a bootstrap needs at least one")
    tail = (1 - _checked_confidence(confidence)) / 2
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        block = means[start : start + _RESAMPLES_AT_ONCE]
        picks = rng.integers(0, len(differences), (len(block), len(differences)))
        block[:] = differences[picks].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(differences.mean()), float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` against `losses` when both are equally likely; ties are left out. 1 without any."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: p-values that hold for all comparisons together at the usual thresholds."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def best_of_n_mean(base_scores: np.ndarray, n: int) -> float:
    """Expected score of the best of n base samples, averaged over prompts; base_scores is (P, M).

    Unbiased: the mean of the maximum over every n-subset of the M samples, in closed form.

    Raises:
        ValueError: n outside 1..M, or a score is not finite.
    """
    base_scores = _finite(base_scores, "base_scores", ndim=2)
    num_samples = base_scores.shape[1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"n={n} is outside 1..{num_samples}, the base samples per prompt; draw more samples or lower n")
    return float(np.sort(base_scores, axis=1).mean(axis=0) @ _maximum_weights(num_samples, n))


def best_of_n_equivalent(base_scores: np.ndarray, aligned_mean: float) -> BestOfN:
    """The n at which best-of-n of the base (P, M) reaches the aligned mean score.

    The curve over whole n is interpolated linearly. An aligned mean at or below the base mean gives n = 1.

    Raises:
        ValueError: a score, or aligned_mean, is not finite.
    """
    base_scores = _finite(base_scores, "base_scores", ndim=2)
    if not math.isfinite(aligned_mean):
        raise ValueError(f"aligned_mean={aligned_mean} is not finite")
    num_samples = base_scores.shape[1]
    profile = np.sort(base_scores, axis=1).mean(axis=0)
    curve = np.array([profile @ _maximum_weights(num_samples, n) for n in range(1, num_samples + 1)])
    above = np.flatnonzero(curve >= aligned_mean)
    if len(above) == 0:
        return BestOfN(float(num_samples), reached=False)
    first = int(above[0])
    if first == 0:
        return BestOfN(1.0, reached=True)
    before, after = curve[first - 1], curve[first]
    return BestOfN(float(first + (aligned_mean - before) / (after - before)), reached=True)


def spread_ratio(base: Mapping[str, np.ndarray], aligned: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Diversity kept: per attribute, the within-group standard deviation of aligned over that of base.

    Every array is (P,); `groups` holds integers, and prompts that share one are expected to vary alike. Entries that
    are NaN are ignored, and so is a group with fewer than two finite members on either side. The standard deviation is
    pooled over groups. Below 1 the aligned model varies less. NaN where the base does not vary or no group is left;
    the key "mean" is the mean over the attributes that are not NaN.

    Raises:
        ValueError: the three do not name the same attributes, shapes differ, or an attribute is called "mean".
    """
    if not base.keys() == aligned.keys() == groups.keys():
        raise ValueError(f"attributes differ: base {sorted(base)}, aligned {sorted(aligned)}, groups {sorted(groups)}")
    if "mean" in base:
        raise ValueError("the attribute 'mean' collides with the mean over attributes; rename it")
    ratios = {name: _pooled_ratio(base[name], aligned[name], groups[name], name) for name in base}
    known = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
    return ratios | {"mean": float(np.mean(known)) if known else math.nan}


def _pooled_ratio(base: np.ndarray, aligned: np.ndarray, groups: np.ndarray, name: str) -> float:
    base, aligned, groups = np.asarray(base, float), np.asarray(aligned, float), np.asarray(groups)
    if base.ndim != 1 or not base.shape == aligned.shape == groups.shape:
        raise ValueError(f"attribute {name!r} needs arrays of one shape (P,), got {base.shape}, {aligned.shape}, {groups.shape}")
    squares, freedom = np.zeros(2), np.zeros(2)
    for group in np.unique(groups):
        members = [side[(groups == group) & np.isfinite(side)] for side in (base, aligned)]
        if min(len(side) for side in members) < 2:
            continue
        squares += [np.sum((side - side.mean()) ** 2) for side in members]
        freedom += [len(side) - 1 for side in members]
    if freedom[0] == 0 or squares[0] == 0:
        return math.nan
    variance = squares / freedom
    return float(np.sqrt(variance[1] / variance[0]))


def _maximum_weights(num_samples: int, n: int) -> np.ndarray:
    """Probability (M,) that the i-th smallest of M samples is the largest of a random n-subset."""
    subsets = math.comb(num_samples, n)
    return np.array([math.comb(rank, n - 1) / subsets for rank in range(num_samples)])


def _finite(values: np.ndarray, name: str, ndim: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != ndim or values.size == 0:
        raise ValueError(f"{name} must be a non-empty array of {ndim} dimension(s), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds {int(np.sum(~np.isfinite(values)))} values that are not finite; drop those prompts first")
    return values


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is outside (0, 1)")
    return confidence
