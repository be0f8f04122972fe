"""Links and implicit rewards against their closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffpref.core.links import logistic
from diffpref.core.rewards import error_metrics, implicit_rewards, margin_metrics, mean_squared_error, policy_error, reference_error
from diffpref.core.types import Conditioning, Evaluation, PathStep, PreferenceBatch

LOGITS = torch.tensor([-3.0, -0.2, 0.0, 0.7, 4.0], dtype=torch.float64)


def full(value: float) -> Tensor:
    """A probability per logit."""
    return torch.full_like(LOGITS, value)


def test_a_certain_label_is_log_sigmoid() -> None:
    torch.testing.assert_close(logistic(LOGITS, full(1.0)), torch.log1p(torch.exp(-LOGITS)), rtol=1e-12, atol=0)


def test_swapping_the_pair_adds_the_logit() -> None:
    torch.testing.assert_close(logistic(-LOGITS, full(1.0)), logistic(LOGITS, full(1.0)) + LOGITS, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logistic(LOGITS, full(0.3)), logistic(-LOGITS, full(0.7)), rtol=1e-12, atol=0)


def test_a_logit_of_zero_is_log_two_whatever_the_label() -> None:
    labels = torch.tensor([0.0, 0.5, 0.8, 1.0], dtype=torch.float64)
    torch.testing.assert_close(logistic(torch.zeros_like(labels), labels), torch.full_like(labels, math.log(2)), rtol=1e-15, atol=0)


def test_a_tie_pulls_towards_zero_from_both_sides() -> None:
    torch.testing.assert_close(logistic(LOGITS, full(0.5)), logistic(-LOGITS, full(0.5)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.99])
def test_soft_labels_are_minimal_at_the_log_odds(probability: float) -> None:
    p = torch.tensor([probability], dtype=torch.float64)
    z = torch.log(p / (1 - p)).requires_grad_()
    loss = logistic(z, p)
    loss.sum().backward()
    assert z.grad is not None
    assert float(z.grad) == pytest.approx(0, abs=1e-15)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(loss.detach(), entropy, rtol=1e-12, atol=0)
    for shift in (-0.1, 0.1):
        assert logistic(z.detach() + shift, p) > loss


def test_extreme_logits_stay_finite() -> None:
    extreme = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = logistic(extreme, torch.ones(2))
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.0]
    assert extreme.grad is not None
    assert extreme.grad.tolist() == [-1.0, 0.0]


def evaluation(policy: Tensor, reference: Tensor | None, target: Tensor, weight: float) -> Evaluation:
    """A step of constant weight."""
    shape = target.shape[:2]
    step = PathStep(target, torch.zeros(shape, dtype=torch.int64), target, torch.full(shape, weight, dtype=target.dtype))
    return Evaluation(step, policy, reference)


def test_errors_are_means_over_an_image_and_weighted_sums_over_steps() -> None:
    target = torch.zeros(2, 2, 1, 2, 3, dtype=torch.float64)
    ones, twos = torch.ones_like(target), 2 * torch.ones_like(target)
    assert mean_squared_error(twos, ones).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    evals = [evaluation(ones, twos, target, 1.0), evaluation(twos, ones, target, 0.25)]
    assert torch.equal(policy_error(evals), torch.full((2, 2), 1 + 0.25 * 4, dtype=torch.float64))
    assert torch.equal(reference_error(evals), torch.full((2, 2), 4 + 0.25, dtype=torch.float64))


def test_errors_of_half_precision_are_taken_in_float32() -> None:
    half = torch.full((1, 2, 1, 1, 4), 0.1, dtype=torch.bfloat16)
    error = mean_squared_error(half, torch.zeros_like(half))
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, half.float().pow(2).flatten(2).mean(-1))


def test_a_method_without_its_reference_is_our_mistake() -> None:
    x = torch.zeros(1, 2, 1, 1, 1)
    with pytest.raises(AssertionError, match="reference"):
        reference_error([evaluation(x, None, x, 1.0)])


def test_metrics_keep_chosen_and_rejected_apart_and_halve_ties() -> None:
    reward = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]], requires_grad=True)
    metrics = margin_metrics(reward)
    expected = {"rewards/chosen": 1.0, "rewards/rejected": 5 / 3, "rewards/margins": -2 / 3, "rewards/accuracies": 0.5}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected | {"rewards/saturated": 0.0})
    flat = margin_metrics(torch.tensor([[9.0, 0.0], [0.0, 9.0], [3.0, 0.0], [0.0, 0.0]]))
    assert float(flat["rewards/saturated"]) == 0.5  # on either side, where the sigmoid has no slope left
    assert not any(x.requires_grad for x in metrics.values())
    assert {n: float(x) for n, x in error_metrics("policy", reward).items()} == pytest.approx(
        {"error/policy_chosen": 1.0, "error/policy_rejected": 5 / 3}
    )


def test_batches_can_be_cut_to_their_first_images() -> None:
    cond = Conditioning(torch.zeros(3, 2, 4, 5), time_ids=torch.zeros(3, 2, 6))
    batch = PreferenceBatch(torch.zeros(3, 2, 1, 2, 2), cond, torch.tensor([[1.0, 0.0]] * 3), ("a", "b", "c"), (0, 0, 1))
    first = batch.first(1)
    assert (batch.group_shape, first.group_shape) == ((3, 2), (3, 1))
    assert (first.latents.shape[1], first.cond.prompt_embeds.shape[1]) == (1, 1)
    assert first.cond.time_ids is not None
    assert first.cond.time_ids.shape == (3, 1, 6)
    assert first.cond.pooled_prompt_embeds is None
    assert batch.first(2) is batch
    assert batch.random(5).visits == (0, 0, 1)


def test_errors_computed_beforehand_stand_for_the_prediction() -> None:
    x = torch.zeros(1, 2, 1, 1, 1)
    known = torch.tensor([[0.3, 0.4]], requires_grad=True)
    step = evaluation(x, None, x, 0.5).step
    error = reference_error([Evaluation(step, x, None, known)])
    assert error.tolist() == [[pytest.approx(0.15), pytest.approx(0.2)]]
    assert not error.requires_grad


def test_implicit_rewards_are_scaled_gains_with_their_metrics() -> None:
    target = torch.zeros(1, 2, 1, 1, 2, dtype=torch.float64)
    policy, reference = target + torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1, 1), target + 3
    reward, metrics = implicit_rewards([evaluation(policy, reference, target, 1.0)], 10)
    assert reward.tolist() == [[80, 50]]
    assert {name: float(x) for name, x in metrics.items()} == {
        "rewards/chosen": 80,
        "rewards/rejected": 50,
        "rewards/margins": 30,
        "rewards/accuracies": 1,
        "rewards/saturated": 1,
        "error/policy_chosen": 1,
        "error/policy_rejected": 4,
        "error/reference_chosen": 9,
        "error/reference_rejected": 9,
    }


def test_batches_carry_scores_weights_and_known_errors_along() -> None:
    cond = Conditioning(torch.zeros(2, 3, 4, 5))
    batch = PreferenceBatch(torch.zeros(2, 3, 1, 2, 2), cond, torch.ones(2, 3), ("a", "b"), (0, 0))
    assert (dict(batch.scores), batch.weight, batch.reference_error) == ({}, None, None)
    full = replace(batch, scores={"clip": torch.arange(6.0).reshape(2, 3)}, weight=torch.ones(2), reference_error=torch.ones(2, 3))
    first = full.first(2)
    assert first.scores["clip"].tolist() == [[0, 1], [3, 4]]
    assert first.reference_error is not None
    assert first.reference_error.shape == (2, 2)
    assert first.weight is full.weight
    assert full.first(None) is full
