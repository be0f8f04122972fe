"""The criterion of reward models against its formula in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.core.preference import agreement, label_divergence, loss_share, prompt_weights

F64 = torch.float64


def test_two_examples_by_hand() -> None:
    """Unit features, scale 10, one certain label and one tie, prompts with one and with three pairs."""
    texts = [(1.0, 0.0), (0.0, 1.0)]
    images = [[(0.9, 0.1), (0.5, 0.5)], [(0.3, 0.8), (0.2, 0.9)]]  # (G, 2), not yet of unit length
    scores = [[10 * (a * c + b * d) / math.hypot(c, d) for c, d in pair] for (a, b), pair in zip(texts, images, strict=True)]
    assert scores[0] == pytest.approx([9.938837, 7.071068], abs=1e-6)
    assert scores[1] == pytest.approx([9.363292, 9.761871], abs=1e-6)
    p0, weight = [1.0, 0.5], [1.0, 1 / 3]
    expected = []
    for (s0, s1), p in zip(scores, p0, strict=True):
        log_sum = math.log(math.exp(s0) + math.exp(s1))
        expected.append(-p * (s0 - log_sum) - (1 - p) * (s1 - log_sum) + (math.log(0.5) if p == 0.5 else 0.0))
    assert expected == pytest.approx([0.055270, 0.019728], abs=1e-6)

    per_pair = label_divergence(torch.tensor(scores, dtype=F64), torch.tensor(p0, dtype=F64))
    assert per_pair.tolist() == pytest.approx(expected, abs=1e-12)
    loss = loss_share(per_pair, torch.tensor(weight, dtype=F64), sum(weight))
    assert float(loss) == pytest.approx((expected[0] + expected[1] / 3) / (1 + 1 / 3), abs=1e-12)
    assert float(loss) == pytest.approx(0.046384, abs=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_gradient_is_that_of_the_cross_entropy_of_the_softmax(p: float) -> None:
    values = torch.tensor([[1.3, -0.4]], dtype=F64)
    label = torch.tensor([[p, 1 - p]], dtype=F64)
    ours, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    label_divergence(ours, label[:, 0]).sum().backward()
    F.cross_entropy(plain, label, reduction="sum").backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert torch.allclose(ours.grad, plain.grad, atol=1e-14)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_a_perfect_model_has_loss_zero_on_soft_labels_and_ties(p: float) -> None:
    scores = torch.tensor([[math.log(p / (1 - p)), 0.0], [0.0, 0.0]], dtype=F64)
    loss = label_divergence(scores, torch.full((2,), p, dtype=F64))
    assert float(loss[0]) == pytest.approx(0.0, abs=1e-14)
    assert float(loss[1]) > 0 or p == 0.5


def test_extreme_scores_stay_finite() -> None:
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = label_divergence(scores, torch.ones(2))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2e4]
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_every_prompt_counts_the_same() -> None:
    assert prompt_weights(["a", "b", "a", "c", "a", "b"]) == [1 / 3, 1 / 2, 1 / 3, 1, 1 / 3, 1 / 2]
    losses = torch.tensor([2.0, 4.0], dtype=F64)
    weights = [torch.tensor([w, 1.0], dtype=F64) for w in (1 / 2, 1 / 4)]
    shares = [[float(loss_share(losses[i : i + 1], w[i : i + 1], float(w.sum()))) for i in (0, 1)] for w in weights]
    assert (shares[1][0] / losses[0]) / (shares[1][1] / losses[1]) == pytest.approx(
        (shares[0][0] / losses[0]) / (shares[0][1] / losses[1]) / 2
    )


def weighted_mean(scores: Tensor, p0: Tensor, weight: Tensor) -> Tensor:
    """The loss of the whole batch at once, written out."""
    cross_entropy = F.cross_entropy(scores, torch.stack([p0, 1 - p0], 1), reduction="none")
    entropy = torch.tensor([-sum(q * math.log(q) for q in (p, 1 - p) if q > 0) for p in p0.tolist()], dtype=F64)
    return ((cross_entropy - entropy) * weight).sum() / weight.sum()


def test_the_shares_of_two_ranks_add_up_to_the_loss_of_one() -> None:
    """Weights differ within and between the ranks, so a mean of the ranks' own weighted means would be wrong."""
    draws = torch.Generator().manual_seed(3)
    scores = torch.randn((6, 2), generator=draws, dtype=F64)
    p0 = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.3], dtype=F64)
    weight = torch.tensor([1.0, 0.5, 0.5, 0.1, 0.1, 0.2], dtype=F64)
    whole = scores.clone().requires_grad_()
    expected = weighted_mean(whole, p0, weight)
    expected.backward()
    parts = scores.clone().requires_grad_()
    gathered = float(weight.sum())
    shares = [loss_share(label_divergence(parts[r], p0[r]), weight[r], gathered) for r in (slice(0, 3), slice(3, 6))]
    sum(shares, torch.zeros((), dtype=F64)).backward()
    assert (shares[0] + shares[1]).item() == pytest.approx(expected.item(), abs=1e-14)
    assert parts.grad is not None
    assert whole.grad is not None
    assert torch.allclose(parts.grad, whole.grad, atol=1e-15)
    own_means = [weighted_mean(scores[r], p0[r], weight[r]) for r in (slice(0, 3), slice(3, 6))]
    assert abs(sum(own_means).item() / 2 - expected.item()) > 1e-3


def test_agreement_counts_ties_half() -> None:
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    assert agreement(scores, torch.tensor([1.0, 0.0, 1.0, 0.5, 0.4])).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]
