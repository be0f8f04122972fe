"""Losses on ranked lists; the worked list is in tests/methods/test_rankings.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from diffpref.core.lists import lambda_dcg, list_mle, pairwise, ranks, ranks_in_order, softmax_cross_entropy

REWARD = torch.tensor([[0.3, -0.2, 0.1, 0.4], [1.0, 1.0, -3.0, 0.0]], dtype=torch.float64)
RELEVANCE = torch.tensor([[0.9, 0.1, 0.5, 0.0], [0.2, 0.2, 1.0, 0.2]], dtype=torch.float64)


def test_ranks_share_ties_and_ranks_in_order_do_not() -> None:
    assert ranks(RELEVANCE).tolist() == [[1, 3, 2, 4], [3, 3, 1, 3]]
    assert ranks_in_order(RELEVANCE).tolist() == [[1, 3, 2, 4], [2, 3, 1, 4]]


def test_lambda_dcg_is_its_formula() -> None:
    expected = []
    for reward, relevance, rank in zip(REWARD, RELEVANCE, ranks(RELEVANCE), strict=True):
        total = 0.0
        for i, j in itertools.permutations(range(4), 2):
            if relevance[i] > relevance[j]:
                gain = abs(2 ** float(relevance[i]) - 2 ** float(relevance[j]))
                discount = abs(1 / math.log1p(float(rank[i])) - 1 / math.log1p(float(rank[j])))
                total += gain * discount * math.log1p(math.exp(float(reward[j] - reward[i])))
        expected.append(total)
    assert lambda_dcg(REWARD, RELEVANCE, ranks(RELEVANCE)).tolist() == pytest.approx(expected, rel=1e-9)


def test_list_mle_is_the_likelihood_of_the_ranking() -> None:
    weights = REWARD[0].exp()[[0, 2, 1, 3]]  # by falling relevance
    likelihood = math.prod(float(weights[i] / weights[i:].sum()) for i in range(4))
    assert float(list_mle(REWARD, RELEVANCE)[0]) == pytest.approx(-math.log(likelihood), rel=1e-12)
    orders = torch.tensor([*itertools.permutations(range(4))], dtype=torch.float64)
    assert float((-list_mle(REWARD[:1].expand(24, 4), orders)).exp().sum()) == pytest.approx(1, rel=1e-12)


def test_gradients_are_finite_at_extreme_rewards() -> None:
    reward = torch.tensor([[-1e4, 1e4, 0.0, 1e4]], requires_grad=True)
    for loss in (
        lambda_dcg(reward, RELEVANCE[:1].float(), ranks_in_order(reward.detach())),
        list_mle(reward, RELEVANCE[:1].float()),
        softmax_cross_entropy(reward, RELEVANCE[:1].float()),
    ):
        (g,) = torch.autograd.grad(loss.sum(), reward)
        assert loss.isfinite().all()
        assert g.isfinite().all()


def test_pairwise_counts_every_ordered_pair_once() -> None:
    count = pairwise(REWARD, RELEVANCE, torch.ones_like)
    assert count.tolist() == [6, 3]
    logistic = pairwise(REWARD, RELEVANCE, lambda margin: F.softplus(-margin))
    assert float(logistic[1]) == pytest.approx(sum(math.log1p(math.exp(x + 3)) for x in (1.0, 1.0, 0.0)), rel=1e-12)


def test_softmax_without_a_relevant_image_is_uniform() -> None:
    nothing = softmax_cross_entropy(REWARD, torch.zeros_like(RELEVANCE))
    torch.testing.assert_close(nothing, -REWARD.log_softmax(1).mean(1), rtol=1e-12, atol=0)
