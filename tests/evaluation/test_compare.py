"""The comparison takes any scorer that is a plain callable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from diffpref.evaluation.compare import compare, compare_scores
from diffpref.evaluation.generate import Images


def brightness(images: Images, prompts: Sequence[str]) -> np.ndarray:
    return images.mean((1, 2, 3))


def test_a_plain_callable_decides() -> None:
    base = np.full((10, 4, 4, 3), 100, np.uint8)
    aligned = base.copy()
    aligned[:8] += 10
    found = compare(base, aligned, ["p"] * 10, brightness)
    assert found["win_rate"] == pytest.approx(0.9)  # eight wins and two ties
    assert found["score_difference"] == pytest.approx(8.0)
    assert found["win_rate_low"] < 0.9 < found["win_rate_high"]
    assert "best_of_n_equivalent" not in found


def test_exchange_mirrors_the_result() -> None:
    rng = np.random.default_rng(0)
    base, aligned = rng.normal(size=(2, 50))
    one, other = compare_scores(base, aligned), compare_scores(aligned, base)
    assert one["win_rate"] == pytest.approx(1 - other["win_rate"])
    assert one["win_rate_low"] == pytest.approx(1 - other["win_rate_high"])
    assert one["score_difference"] == pytest.approx(-other["score_difference"])


def test_best_of_n_of_the_base_itself() -> None:
    ruler = np.random.default_rng(0).normal(size=(400, 12))
    best_of_four = ruler[:, :4].max(1)
    found = compare_scores(ruler[:, 0], best_of_four, ruler)
    assert found["best_of_n_equivalent"] == pytest.approx(4, abs=0.6)
    assert found["best_of_n_samples"] == 12
