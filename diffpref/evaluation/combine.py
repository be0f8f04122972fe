"""Several scorers, one verdict: how strongly one picture of a prompt is preferred to another, and which pairs that gives.

G prompts, K pictures each. Every rule turns scores {name: (G, K)} into verdicts (G, K, K): positive where picture i is
better than picture j, antisymmetric, 0 where the rule cannot decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Scores = Mapping[str, np.ndarray]


def z_scores(scores: Scores) -> np.ndarray:
    """(S, G, K): every scorer with mean 0 and standard deviation 1 over all pictures. Raises ValueError for a constant scorer."""
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"scorer {name!r} gave a score that is not finite")
        if values.std() == 0:
            raise ValueError(
                f"scorer {name!r} gives all {values.size} pictures the score {values.flat[0]:g}; it cannot decide, leave it out"
            )
    return np.stack([(values - values.mean()) / values.std() for values in scores.values()])


def _differences(values: np.ndarray) -> np.ndarray:
    """(..., K) to (..., K, K): row picture minus column picture."""
    return values[..., :, None] - values[..., None, :]


def mean_z(scores: Scores) -> np.ndarray:
    """Difference of the mean z-score."""
    return _differences(z_scores(scores).mean(0))


def log_sigmoid(scores: Scores) -> np.ndarray:
    """Difference of the mean of log sigmoid(z): a low score of one scorer weighs more than a high one of another."""
    return _differences(-np.logaddexp(0, -z_scores(scores)).mean(0))


def majority(scores: Scores) -> np.ndarray:
    """Share of the scorers that prefer i to j minus the share that prefer j to i, in [-1, 1]."""
    return np.sign(_differences(np.stack(list(scores.values())))).mean(0)


def win_count(scores: Scores) -> np.ndarray:
    """Difference of the share of comparisons within the prompt, over all scorers, that a picture wins, in [-1, 1]."""
    signs = np.sign(_differences(np.stack(list(scores.values()))))  # (S, G, K, K)
    others = max(1, signs.shape[-1] - 1)
    return _differences((signs > 0).sum(-1).mean(0) / others)


def pareto(scores: Scores) -> np.ndarray:
    """1 where no scorer prefers j and at least one prefers i, -1 the other way round, else 0."""
    difference = _differences(np.stack(list(scores.values())))
    better = (difference >= 0).all(0) & (difference > 0).any(0)
    return better.astype(float) - np.swapaxes(better, -1, -2)


RULES: Mapping[str, Callable[[Scores], np.ndarray]] = {
    "mean_z": mean_z,
    "log_sigmoid": log_sigmoid,
    "majority": majority,
    "win_count": win_count,
    "pareto": pareto,
}
"""Rules by name."""


@dataclass(frozen=True)
class Picked:
    """A pair of pictures of one prompt, the better one first."""

    group: int
    better: int
    worse: int
    margin: float  # of the verdict, positive


def pick_pairs(verdicts: np.ndarray, which: str, min_margin: float = 0.0) -> tuple[list[Picked], int]:
    """(pairs, number of undecided ones) from verdicts (G, K, K).

    which: "best_worst" takes the pair with the largest verdict of each prompt, "all" every pair. Pairs whose verdict is 0 or
    below min_margin are undecided.
    """
    pairs, undecided = [], 0
    for group, verdict in enumerate(verdicts):
        if which == "best_worst":
            candidates = [divmod(int(verdict.argmax()), len(verdict))]
        else:
            candidates = [(i, j) if verdict[i, j] >= 0 else (j, i) for i in range(len(verdict)) for j in range(i)]
        for i, j in candidates:
            margin = float(verdict[i, j])
            if margin <= 0 or margin < min_margin:
                undecided += 1
            else:
                pairs.append(Picked(group, int(i), int(j), margin))
    return pairs, undecided


def ranks(verdicts: np.ndarray) -> np.ndarray:
    """Ranks (G, K) from 1 = best by the sum of a picture's verdicts; equal sums share the smaller number."""
    totals = verdicts.sum(-1).round(12)
    return 1 + (totals[:, None, :] > totals[:, :, None]).sum(-1)
