"""Statistics of pictures on pictures whose statistics are known."""

from __future__ import annotations

import numpy as np
import pytest

from diffpref.evaluation.pictures import STATISTICS, diversity, drift, thumbnail

GREY = np.full((40, 40, 3), 128, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
RED = np.zeros((40, 40, 3), np.uint8) + np.array([255, 0, 0], np.uint8)


@pytest.mark.parametrize("name", STATISTICS)
def test_noise_has_more_of_everything_than_grey(name: str) -> None:
    assert STATISTICS[name](NOISE) > STATISTICS[name](GREY) >= 0


def test_values_by_hand() -> None:
    assert STATISTICS["saturation"](RED) == 1.0
    halves = np.concatenate([np.zeros((40, 20, 3)), np.full((40, 20, 3), 255)], 1).astype(np.uint8)
    assert STATISTICS["contrast"](halves) == pytest.approx(0.5)
    assert STATISTICS["sharpness"](GREY) == pytest.approx(0, abs=1e-12)
    assert STATISTICS["sharpness"](GREY[:1]) == 0.0


def test_diversity_and_drift() -> None:
    black, white = np.zeros((32, 32, 3), np.float32), np.ones((32, 32, 3), np.float32)
    pair = np.stack([np.stack([black, white]), np.stack([white, white])])  # (2, 2, h, w, 3)
    assert diversity(pair) == pytest.approx(0.5)
    assert np.isnan(diversity(pair[:, :1]))
    assert drift(pair, pair) == 0
    assert drift(pair, 1 - pair) == pytest.approx(1)


def test_a_thumbnail_keeps_the_mean() -> None:
    assert thumbnail(NOISE).shape == (32, 32, 3)
    assert thumbnail(GREY).mean() == pytest.approx(128 / 255)
