"""Verdicts of several scorers against their definitions, and the pairs that they give."""

from __future__ import annotations

import numpy as np
import pytest

from diffpref.evaluation.combine import RULES, mean_z, pick_pairs, ranks, z_scores

RNG = np.random.default_rng(0)
SCORES = {"a": RNG.normal(size=(5, 4)), "b": 100 + 30 * RNG.normal(size=(5, 4)), "c": RNG.normal(size=(5, 4)).round()}


@pytest.mark.parametrize("rule", RULES)
def test_verdicts_are_antisymmetric_and_follow_a_single_scorer(rule: str) -> None:
    verdicts = RULES[rule](SCORES)
    assert verdicts.shape == (5, 4, 4)
    np.testing.assert_allclose(verdicts, -np.swapaxes(verdicts, 1, 2), atol=1e-12)
    alone = RULES[rule]({"a": SCORES["a"]})
    difference = SCORES["a"][:, :, None] - SCORES["a"][:, None, :]
    assert (np.sign(alone) == np.sign(difference)).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_depends_on_the_unit_of_a_scorer(rule: str) -> None:
    scaled = {name: 7 * values - 3 for name, values in SCORES.items()}
    np.testing.assert_allclose(RULES[rule](scaled), RULES[rule](SCORES), atol=1e-12)


def test_rules_by_hand() -> None:
    scores = {"a": np.array([[3.0, 1.0, 2.0]]), "b": np.array([[1.0, 1.0, 5.0]])}
    assert RULES["majority"](scores)[0, 0].tolist() == [0.0, 0.5, 0.0]
    assert RULES["pareto"](scores)[0].tolist() == [[0, 1, 0], [-1, 0, -1], [0, 1, 0]]
    # wins of a: 2, 0, 1 of two; of b: 0, 0, 2
    assert RULES["win_count"](scores)[0, 2].tolist() == [0.25, 0.75, 0.0]
    z = z_scores(scores)
    assert mean_z(scores)[0, 0, 1] == pytest.approx(z[:, 0, 0].mean() - z[:, 0, 1].mean())
    sigmoid = np.log(1 / (1 + np.exp(-z))).mean(0)
    assert RULES["log_sigmoid"](scores)[0, 2, 0] == pytest.approx(sigmoid[0, 2] - sigmoid[0, 0])


def test_best_and_worst() -> None:
    verdicts = mean_z({"a": SCORES["a"]})
    pairs, undecided = pick_pairs(verdicts, "best_worst")
    assert [(p.better, p.worse) for p in pairs] == [(int(row.argmax()), int(row.argmin())) for row in SCORES["a"]]
    assert undecided == 0
    assert all(p.margin > 0 for p in pairs)


def test_all_pairs_and_margins() -> None:
    scores = {"a": np.array([[0.0, 0.0, 1.0, 3.0]])}
    pairs, undecided = pick_pairs(mean_z(scores), "all")
    assert len(pairs) == 5
    assert undecided == 1
    assert all(scores["a"][0, p.better] > scores["a"][0, p.worse] for p in pairs)
    sd = scores["a"].std()
    strict, left = pick_pairs(mean_z(scores), "all", min_margin=1.5 / sd)
    assert {(p.better, p.worse) for p in strict} == {(3, 0), (3, 1), (3, 2)}
    assert left == 3


def test_ranks_share_places() -> None:
    assert ranks(mean_z({"a": np.array([[1.0, 5.0, 1.0, 0.0]])})).tolist() == [[2, 1, 2, 4]]


@pytest.mark.parametrize("value", [2.0, np.nan])
def test_a_scorer_that_says_nothing_is_named(value: float) -> None:
    with pytest.raises(ValueError, match="scorer 'flat'"):
        mean_z({"a": SCORES["a"], "flat": np.full((5, 4), value)})
