"""Comparisons of many models: prompts as units, checked against scipy, and coverage by simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffpref.evaluation.score_table import ScoreTable, combine_scorers, compare_model, markdown, win_shares
from diffpref.evaluation.stats import holm, paired_bootstrap, sign_test, wilson_interval

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 3), (50, 50), (400, 100), (3, 90)])
def test_sign_test_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    want = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(want, rel=1e-9)


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {}
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_wilson_is_scipys() -> None:
    for wins, n in ((3, 10), (450, 500), (0, 20), (20, 20)):
        want = stats.binomtest(wins, n).proportion_ci(method="wilson")
        assert wilson_interval(wins, n) == pytest.approx((want.low, want.high), abs=1e-9)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_wilson_covers_the_true_rate(rate: float) -> None:
    rng = np.random.default_rng(0)
    inside = [low <= rate <= high for low, high in (wilson_interval(w, 200) for w in rng.binomial(200, rate, 1000))]
    assert 0.93 <= np.mean(inside) <= 0.975


def test_clustered_bootstrap_covers_where_the_unclustered_one_does_not() -> None:
    """Seeds of a prompt are alike: counting them as prompts would make the interval too narrow."""
    rng = np.random.default_rng(1)
    clustered, naive = 0, 0
    for trial in range(200):
        differences = rng.normal(size=(40, 1)) + 0.2 * rng.normal(size=(40, 8))
        _, low, high = paired_bootstrap(differences.mean(1), seed=trial, num_resamples=400)
        clustered += low <= 0 <= high
        _, low, high = paired_bootstrap(differences.ravel(), seed=trial, num_resamples=400)
        naive += low <= 0 <= high
    assert clustered >= 180
    assert naive <= 120


def test_a_tie_counts_one_half_and_seeds_are_averaged() -> None:
    base = np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 5.0]])
    model = np.array([[1.0, 2.0], [1.0, 1.0], [0.0, 5.0]])
    assert win_shares(base, model).tolist() == [0.75, 0.0, 0.5]
    (found,) = compare_model("m", {"s": base}, {"s": model})
    assert (found.wins, found.losses, found.ties, found.num_prompts) == (1, 1, 1, 3)
    assert found.win_rate == pytest.approx(1.25 / 3)
    assert found.difference == pytest.approx((model - base).mean())
    assert found.median == 1.0


def test_a_clear_winner_over_several_scorers() -> None:
    rng = np.random.default_rng(2)
    base = {name: rng.normal(size=(300, 2)) for name in ("a", "b")}
    better = {"a": base["a"] + 0.5 + 0.1 * rng.normal(size=(300, 2)), "b": base["b"] + rng.normal(size=(300, 2)), "only here": base["a"]}
    found = {c.scorer: c for c in compare_model("m", base, better)}
    assert set(found) == {"a", "b"}
    assert found["a"].win_rate_low > 0.9
    assert found["a"].p_value_holm == pytest.approx(2 * found["a"].p_value)
    assert found["a"].difference_low < 0.5 < found["a"].difference_high
    assert found["b"].win_rate_low < 0.5 < found["b"].win_rate_high
    text = markdown(list(found.values()))
    assert text.count("\n") == 4
    assert "| m | a |" in text


def test_all_scorers_together() -> None:
    base = {"a": np.array([[0.0], [0.0], [0.0], [0.0]]), "b": np.array([[0.0], [0.0], [0.0], [0.0]])}
    model = {"a": np.array([[1.0], [1.0], [-1.0], [np.nan]]), "b": np.array([[3.0], [-1.0], [-1.0], [1.0]])}
    found = {c.rule: c for c in combine_scorers("m", base, model)}
    assert found.keys() == {"mean_z", "log_sigmoid", "majority", "pareto"}
    assert {c.num_prompts for c in found.values()} == {3}
    assert found["majority"].win_rate == found["pareto"].win_rate == 0.5  # one win, one undecided, one loss
    assert found["pareto"].undecided == pytest.approx(1 / 3)
    assert found["mean_z"].undecided == 0
    swapped = {c.rule: c.win_rate for c in combine_scorers("m", model, base)}
    assert all(swapped[rule] == pytest.approx(1 - c.win_rate) for rule, c in found.items())
    assert combine_scorers("m", {"a": base["a"]}, {"a": model["a"]}) == []
    assert combine_scorers("m", base, {"a": model["a"], "b": base["b"]}) == []  # b says nothing


def test_the_table_is_stored_row_by_row(tmp_path: Path) -> None:
    seeds = np.arange(6).reshape(3, 2)
    scores = {name: {"s": np.full((3, 2), value) + seeds} for name, value in (("base", 0.0), ("m", 10.0))}
    ScoreTable(["p", "q", "r"], seeds, scores).save(tmp_path / "scores.parquet")
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(rows) == 12
    assert rows[-1] == {"model": "m", "prompt_index": 2, "picture": 1, "seed": 5, "prompt": "r", "s": 15.0}
