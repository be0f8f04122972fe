"""Aligned against base with any scorer: the same prompts, seeds and starting latents for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from diffpref.evaluation.generate import Images
from diffpref.evaluation.stats import best_of_n_equivalent, count_wins, paired_bootstrap, wilson_interval


def compare(
    base: Images,
    aligned: Images,
    prompts: Sequence[str],
    scorer: Callable[[Images, Sequence[str]], np.ndarray],
    ruler: np.ndarray | None = None,
) -> dict[str, float | int | bool]:
    """Score both models' pictures of the same prompts and seeds, uint8 (N, H, W, 3), and compare; see `compare_scores`."""
    scores = [np.asarray(scorer(images, prompts), dtype=np.float64) for images in (base, aligned)]
    return compare_scores(scores[0], scores[1], ruler)


def compare_scores(base: np.ndarray, aligned: np.ndarray, ruler: np.ndarray | None = None) -> dict[str, float | int | bool]:
    """Win rate with Wilson interval, mean scores, paired difference with bootstrap over prompts; with a ruler also best-of-N.

    base, aligned: (N,), one score per prompt. ruler: (N, M) scores of further base pictures of the same prompts. Intervals are
    95 %.
    """
    wins, n = count_wins(base, aligned)
    low, high = wilson_interval(wins, n)
    difference = paired_bootstrap(aligned - base)
    found: dict[str, float | int | bool] = {
        "win_rate": wins / n,
        "win_rate_low": low,
        "win_rate_high": high,
        "num_prompts": n,
        "score_base": float(base.mean()),
        "score_aligned": float(aligned.mean()),
        "score_difference": difference[0],
        "score_difference_low": difference[1],
        "score_difference_high": difference[2],
    }
    if ruler is not None:
        best = best_of_n_equivalent(ruler, float(aligned.mean()))
        found |= {"best_of_n_equivalent": best.n, "best_of_n_reached": best.reached, "best_of_n_samples": int(ruler.shape[1])}
    return found
