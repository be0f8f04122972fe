"""The reward model that comes with the testbed: it is the file its manifest describes, and as good as that says."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from diffpref.data.images import decode_image
from diffpref.data.pairs import load_pairs
from diffpref.locations import asset
from diffpref.scorers.scorer import Scorer
from diffpref.testbed.reward import reward
from diffpref.testbed.scorer import shipped_scorer

COUNT = 300


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """The shipped one."""
    return shipped_scorer()


@cache
def manifest() -> dict[str, Any]:
    """What was measured when it was made."""
    return json.loads(asset("testbed", "scorer", "reward_model.json").read_text())  # type: ignore[no-any-return]


def test_it_is_the_file_that_was_measured(scorer: Scorer) -> None:
    found = manifest()
    assert scorer.checksum == found["sha256"]
    assert scorer.record["name"] == "testbed_pickscore"
    assert scorer.version == f"own model, step {found['step']}"
    assert found["held_out_accuracy"] < found["pairs"]["sampled"]["agreement"]
    size = sum(p.stat().st_size for p in asset("testbed", "scorer").iterdir())
    assert size < 3e6


def test_it_reaches_the_stated_accuracy_on_shipped_pairs(scorer: Scorer) -> None:
    pairs = load_pairs(str(asset("testbed", "pairs")), split="own", max_samples=COUNT)
    rows = [pairs.row(i) for i in range(COUNT)]
    images = [decode_image(data) for row in rows for data in (row.image_0, row.image_1)]
    prompts = [row.prompt for row in rows for _ in (0, 1)]
    guess = -np.diff(scorer(images, prompts).numpy().reshape(-1, 2))[:, 0]
    truth = -np.diff(reward(np.stack([np.asarray(i) for i in images]), prompts).reshape(-1, 2))[:, 0]
    measured = manifest()["measured"]

    def share(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.sign(a) == np.sign(b)).mean())

    noise = 3 * (0.25 / COUNT) ** 0.5  # three standard errors at most
    assert share(guess, pairs.p0 - 0.5) == pytest.approx(measured["accuracy"]["value"], abs=noise)
    assert share(guess, truth) == pytest.approx(measured["agreement_with_true_reward"]["value"], abs=noise)
    assert share(guess, truth) > 0.85
    shuffled = np.random.default_rng(0).permutation(guess)
    assert share(shuffled, truth) < 0.6
    assert measured["accuracy"]["value"] < measured["ceiling"]["value"]
