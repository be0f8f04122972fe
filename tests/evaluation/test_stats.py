"""Known values, identities and brute force for the statistics of a comparison."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffpref.evaluation.stats import (
    BestOfN,
    best_of_n_equivalent,
    best_of_n_mean,
    count_wins,
    paired_bootstrap,
    spread_ratio,
    wilson_interval,
)


def scores(prompts: int = 7, samples: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, samples))


def test_count_wins_counts_a_tie_one_half() -> None:
    assert count_wins(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 1.0, 5.0])) == (2.5, 4)


def test_wins_of_both_sides_add_up() -> None:
    base, aligned = np.random.default_rng(1).integers(0, 4, (2, 50))
    assert count_wins(base, aligned)[0] + count_wins(aligned, base)[0] == 50


@pytest.mark.parametrize(("base", "aligned"), [([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([], [])])
def test_count_wins_rejects(base: list[float], aligned: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|finite|non-empty"):
        count_wins(np.array(base), np.array(aligned))


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_textbook_values(wins: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(wins, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("wins", [0, 0.5, 3, 7.5, 12])
def test_wilson_ends_solve_the_score_equation(wins: float) -> None:
    n, z, share = 12, 1.959964, wins / 12
    for end in wilson_interval(wins, n):
        assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-6)


def test_wilson_is_symmetric_holds_the_share_and_shrinks() -> None:
    low, high = wilson_interval(30.5, 80)
    assert wilson_interval(49.5, 80) == pytest.approx((1 - high, 1 - low))
    assert 0 <= low < 30.5 / 80 < high <= 1
    wide, narrow = wilson_interval(61, 160, confidence=0.99), wilson_interval(61, 160, confidence=0.5)
    assert wide[0] < low + 0.05
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


@pytest.mark.parametrize(("wins", "n", "confidence"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (math.nan, 5, 0.95), (1, 5, 1.0)])
def test_wilson_rejects(wins: float, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"interval needs|outside"):
        wilson_interval(wins, n, confidence)


def test_bootstrap_is_deterministic_and_holds_the_mean() -> None:
    differences = np.random.default_rng(2).normal(0.3, 1.0, 60)
    first = paired_bootstrap(differences, seed=4, num_resamples=1200)
    assert first == paired_bootstrap(differences, seed=4, num_resamples=1200)
    assert first != paired_bootstrap(differences, seed=5, num_resamples=1200)
    mean, low, high = first
    assert mean == pytest.approx(differences.mean())
    assert low < mean < high


def test_bootstrap_width_is_that_of_the_normal_approximation() -> None:
    differences = np.random.default_rng(3).normal(size=400)
    _, low, high = paired_bootstrap(differences)
    assert high - low == pytest.approx(2 * 1.96 * differences.std() / 20, rel=0.05)


def test_bootstrap_covers_a_known_mean() -> None:
    rng = np.random.default_rng(6)
    intervals = [paired_bootstrap(rng.normal(0.5, 2.0, 80), seed=k, num_resamples=500)[1:] for k in range(200)]
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_bootstrap_of_equal_differences_has_no_width() -> None:
    assert paired_bootstrap(np.full(5, 0.25), num_resamples=50) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("differences", [[], [0.0, math.inf]])
def test_bootstrap_rejects(differences: list[float]) -> None:
    with pytest.raises(ValueError, match=r"non-empty|finite"):
        paired_bootstrap(np.array(differences))


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    base = scores()
    subsets = itertools.combinations(range(6), n)
    want = np.mean([base[:, list(subset)].max(axis=1).mean() for subset in subsets])
    assert best_of_n_mean(base, n) == pytest.approx(want, rel=1e-12)


def test_best_of_n_rises_from_the_mean_to_the_maximum() -> None:
    base = scores(samples=64)
    curve = [best_of_n_mean(base, n) for n in range(1, 65)]
    assert curve[0] == pytest.approx(base.mean())
    assert curve[-1] == pytest.approx(base.max(axis=1).mean())
    assert np.all(np.diff(curve) > 0)


def test_best_of_n_of_uniform_samples_is_known() -> None:
    base = np.random.default_rng(0).random((20_000, 8))
    assert best_of_n_mean(base, 3) == pytest.approx(3 / 4, abs=5e-3)


@pytest.mark.parametrize("n", [0, 7])
def test_best_of_n_rejects_n_outside_the_samples(n: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.6"):
        best_of_n_mean(scores(), n)


@pytest.mark.parametrize("n", range(2, 7))
def test_equivalent_inverts_the_curve(n: int) -> None:
    base = scores()
    assert best_of_n_equivalent(base, best_of_n_mean(base, n) - 1e-12).n == pytest.approx(n)
    halfway = (best_of_n_mean(base, n - 1) + best_of_n_mean(base, n)) / 2
    found = best_of_n_equivalent(base, halfway)
    assert found.reached
    assert found.n == pytest.approx(n - 0.5)


def test_equivalent_outside_the_curve() -> None:
    base = scores()
    assert best_of_n_equivalent(base, base.min() - 1) == BestOfN(1.0, reached=True)
    assert best_of_n_equivalent(base, base.max() + 1) == BestOfN(6.0, reached=False)
    assert best_of_n_equivalent(np.ones((3, 4)), 1.0) == BestOfN(1.0, reached=True)


def test_equivalent_rejects_a_mean_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="aligned_mean"):
        best_of_n_equivalent(scores(), math.nan)


def test_spread_ratio_sees_scale_and_ignores_shifts_of_groups() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, 200)
    base = rng.normal(size=200)
    shift = 100.0 * groups
    found = spread_ratio({"x": base, "y": base}, {"x": 0.5 * base + shift, "y": base - shift}, {"x": groups, "y": groups})
    assert found == pytest.approx({"x": 0.5, "y": 1.0, "mean": 0.75})


def test_spread_ratio_pools_by_hand() -> None:
    base = {"x": np.array([0.0, 2.0, 5.0, 5.0, 8.0, 9.0])}
    aligned = {"x": np.array([0.0, 1.0, 5.0, math.nan, 5.0, 1e9])}
    groups = {"x": np.array([0, 0, 1, 1, 1, 2])}
    # Group 2 has one member. Sums of squares: base 2 + 6 over 3 degrees of freedom, aligned 0.5 + 0 over 2.
    want = math.sqrt((0.5 / 2) / (8 / 3))
    assert spread_ratio(base, aligned, groups)["x"] == pytest.approx(want)


def test_spread_ratio_skips_what_cannot_be_compared() -> None:
    base = {"still": np.ones(4), "alone": np.arange(4.0), "x": np.arange(4.0)}
    pairs = np.array([0, 0, 1, 1])
    found = spread_ratio(base, base, {"still": pairs, "alone": np.arange(4), "x": pairs})
    assert math.isnan(found["still"])
    assert math.isnan(found["alone"])
    assert found["mean"] == found["x"] == 1.0


def test_spread_ratio_rejects() -> None:
    x = {"x": np.arange(4.0)}
    with pytest.raises(ValueError, match="attributes differ"):
        spread_ratio(x, {}, x)
    with pytest.raises(ValueError, match="one shape"):
        spread_ratio(x, {"x": np.arange(3.0)}, x)
    with pytest.raises(ValueError, match="collides"):
        spread_ratio({"mean": x["x"]}, {"mean": x["x"]}, {"mean": x["x"]})
