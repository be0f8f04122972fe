"""From scores to probabilities, relevance and weights."""

from __future__ import annotations

import pytest
import torch

from diffpref.core.scores import histogram_share, rarity_weight, score_range, win_counts


def test_win_counts() -> None:
    scores = torch.tensor([[[0.3, 0.1, 0.2], [1.0, 2.0, 0.5]]], dtype=torch.float64)
    assert win_counts(scores).tolist() == [[0.75, 0.5, 0.25]]
    torch.testing.assert_close(win_counts(scores.exp()), win_counts(scores))  # only the order counts
    assert win_counts(torch.zeros(1, 5, 4)).tolist() == [[0.5] * 4]
    drawn = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(win_counts(drawn).mean(1), torch.full((7,), 0.5))
    with pytest.raises(ValueError, match="at least two"):
        win_counts(torch.zeros(2, 3, 1))


def test_rarity_weight() -> None:
    share = torch.tensor([0.36, 0.72, 0.9], dtype=torch.float64)
    assert rarity_weight(share, 1, 0.72).tolist() == pytest.approx([2, 1, 0.8], rel=1e-12)
    assert rarity_weight(share, 0, 0.72).tolist() == [1, 1, 1]
    assert rarity_weight(share, 2, 0.72).tolist() == pytest.approx([4, 1, 0.64], rel=1e-12)
    assert float(rarity_weight(share, 1)[0]) == pytest.approx(0.66 / 0.36, rel=1e-12)
    with pytest.raises(ValueError, match="exponent is -1"):
        rarity_weight(share, -1)


def test_histogram_share() -> None:
    scores = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.0])
    torch.testing.assert_close(histogram_share(scores, 2), torch.tensor([0.6, 0.6, 0.6, 0.4, 0.4]))
    assert histogram_share(scores, 1).tolist() == [1] * 5
    with pytest.raises(ValueError, match="num_bins is 0"):
        histogram_share(scores, 0)


def test_score_range() -> None:
    assert score_range(torch.tensor([[0.25, 0.5], [0.125, 0.5]]), "clip") == (0.125, 0.5)
    with pytest.raises(ValueError, match="'clip' are empty or not finite"):
        score_range(torch.tensor([0.1, float("nan")]), "clip")
    with pytest.raises(ValueError, match="'clip' are empty"):
        score_range(torch.zeros(0), "clip")
    with pytest.raises(ValueError, match="a constant column holds no preference"):
        score_range(torch.zeros(3), "clip")
