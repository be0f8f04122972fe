"""What holds for every method; a new one must be named here, with an instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, PreferenceBatch
from diffpref.methods import METHODS, Method

Case = tuple[PreferenceBatch, list[Evaluation]]

# Hyper-parameters under which a random policy has a gradient worth looking at.
INSTANCES: dict[str, dict[str, Any]] = {"diffusion_dpo": {"beta": 2.0}, "sft": {}}

each_method = pytest.mark.parametrize("name", list(METHODS))


def instance(name: str) -> Method:
    """A method that can be differentiated without saturating."""
    return METHODS[name](**INSTANCES[name])


def leaf(case: Case) -> Tensor:
    """The policy's prediction."""
    return case[1][0].policy


def mean_loss(method: Method, case: Case, policy: Tensor | None = None) -> Tensor:
    """The loss that training minimises."""
    batch, (evaluation,) = case
    return method.loss(batch, [evaluation if policy is None else replace(evaluation, policy=policy)]).per_group.mean()


def test_the_registry_holds_exactly_these() -> None:
    assert set(METHODS) == set(INSTANCES) == {"diffusion_dpo", "sft"}


@each_method
def test_one_loss_per_group_and_detached_scalar_metrics(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    case = random_case(3, method.images_per_group)
    out = method.loss(*case)
    assert out.per_group.shape == (3,)
    assert out.per_group.requires_grad
    assert out.metrics
    assert all(x.ndim == 0 and not x.requires_grad and torch.isfinite(x) for x in out.metrics.values())


@each_method
def test_gradient_reaches_the_policy_and_not_the_reference(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    case = random_case(3, method.images_per_group)
    mean_loss(method, case).backward()
    gradient, reference = leaf(case).grad, case[1][0].reference
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(2).norm(dim=2) > 0).all()
    assert reference is not None
    assert reference.requires_grad
    assert reference.grad is None


@each_method
def test_a_small_step_against_the_gradient_lowers_the_loss(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    case = random_case(3, method.images_per_group)
    before = mean_loss(method, case)
    before.backward()
    policy = leaf(case)
    assert policy.grad is not None
    after = mean_loss(method, case, policy.detach() - 1e-3 * policy.grad)
    assert after < before
    expected = 1e-3 * policy.grad.pow(2).sum()
    torch.testing.assert_close(before.detach() - after, expected, rtol=1e-2, atol=0)


@each_method
def test_a_batch_is_its_groups_one_by_one_in_any_order(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    batch, (evaluation,) = random_case(4, method.images_per_group)
    whole = method.loss(batch, [evaluation])

    def some(rows: list[int]) -> Case:
        step = replace(evaluation.step, **{n: getattr(evaluation.step, n)[rows] for n in ("x_t", "timesteps", "target", "weight")})
        reference = None if evaluation.reference is None else evaluation.reference[rows]
        part = replace(batch, latents=batch.latents[rows], relevance=batch.relevance[rows], cond=batch.cond.map(lambda x: x[rows]))
        return part, [Evaluation(step, evaluation.policy[rows], reference)]

    singles = torch.cat([method.loss(*some([g])).per_group for g in range(4)])
    torch.testing.assert_close(whole.per_group, singles, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method.loss(*some([2, 0, 3, 1])).per_group, whole.per_group[[2, 0, 3, 1]], rtol=1e-12, atol=1e-12)


@each_method
def test_float32_is_close_to_float64(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    exact = method.loss(*random_case(4, method.images_per_group)).per_group
    single = method.loss(*random_case(4, method.images_per_group, torch.float32)).per_group
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=2e-5)


@each_method
def test_half_precision_predictions_give_a_float32_loss(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    out = method.loss(*random_case(2, method.images_per_group, torch.bfloat16))
    assert out.per_group.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in out.metrics.values())


@each_method
def test_what_a_method_declares_is_what_it_uses(name: str, random_case: Callable[..., Case]) -> None:
    method = instance(name)
    batch, (evaluation,) = random_case(2, method.images_per_group)
    bare = [replace(evaluation, reference=None)]
    if method.needs_reference:
        with pytest.raises(AssertionError, match="reference"):
            method.loss(batch, bare)
    else:
        torch.testing.assert_close(method.loss(batch, bare).per_group, method.loss(batch, [evaluation]).per_group, rtol=0, atol=0)
