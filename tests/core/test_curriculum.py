"""The stages of a curriculum."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffpref.core.curriculum import admitted, rank_thresholds, score_thresholds, stage_of


def test_rank_thresholds() -> None:
    assert rank_thresholds(11, 5).tolist() == [8, 6, 4, 2, 0]  # the bins [8,10], [6,8], [4,6], [2,4], [0,2]


def test_admitted_sets_are_nested_and_the_last_holds_all() -> None:
    gaps = torch.tensor([0.0, 0.02, 0.3, 0.55, 0.81, 1.02], dtype=torch.float64)
    for thresholds in (rank_thresholds(3, 4) / 2, score_thresholds(gaps, 4)):
        sets = [admitted(gaps, thresholds, stage) for stage in range(1, 5)]
        assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(sets))
        assert sets[-1].tolist() == [False, True, True, True, True, True]
        assert sets[0].sum() < sets[-1].sum()


def test_score_thresholds_are_equally_spaced() -> None:
    gaps = torch.tensor([0.1, 0.7, 1.1])
    torch.testing.assert_close(score_thresholds(gaps, 5), torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64), rtol=1e-6, atol=0)
    assert admitted(gaps, score_thresholds(gaps, 5), 5).all()


def test_stages_follow_the_step() -> None:
    assert [stage_of(step, 400, 5) for step in (0, 399, 400, 1999, 2000, 9999)] == [1, 1, 2, 5, 5, 5]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="num_stages is 0"):
        rank_thresholds(4, 0)
    with pytest.raises(ValueError, match="num_images is 1"):
        rank_thresholds(1, 3)
    with pytest.raises(ValueError, match="steps_per_stage is 0"):
        stage_of(1, 0, 3)
