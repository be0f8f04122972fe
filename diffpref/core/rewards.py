"""Implicit rewards: how much better than the reference the policy explains an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.core.types import Evaluation, PreferenceBatch

SATURATED_SLOPE = 0.01
"""Gradient of -log sigmoid by the margin below which a pair teaches hardly anything more; a margin of about 4.6."""


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over (C, h, w) of the squared difference, in float32 or better. (G, K, C, h, w) -> (G, K)."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).pow(2).flatten(2).mean(-1)


def policy_error(evals: Sequence[Evaluation]) -> Tensor:
    """Weighted error of the policy, summed over steps. (G, K), carries gradient."""
    return torch.stack([e.step.weight * mean_squared_error(e.policy, e.step.target) for e in evals]).sum(0)


def reference_error(evals: Sequence[Evaluation]) -> Tensor:
    """Weighted error of the reference, summed over steps. (G, K), no gradient."""
    errors = []
    for e in evals:
        error = e.reference_error
        if error is None:
            assert e.reference is not None, "the run was built without the reference that its method declares"
            error = mean_squared_error(e.reference, e.step.target)
        errors.append(e.step.weight * error.detach())
    return torch.stack(errors).sum(0)


def implicit_rewards(evals: Sequence[Evaluation], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards scale * (reference error - policy error), (G, K), and what every method with a reference logs."""
    policy, reference = policy_error(evals), reference_error(evals)
    reward = scale * (reference - policy)
    return reward, margin_metrics(reward) | error_metrics("policy", policy) | error_metrics("reference", reference)


def soft_label(batch: PreferenceBatch) -> Tensor:
    """Probability (G,) that the first image of a pair is the better one."""
    if batch.relevance.shape[1] != 2:
        raise ValueError(f"groups have {batch.relevance.shape[1]} images, but this method compares pairs; give it two images per prompt")
    return batch.relevance[:, 0]


def margin_metrics(reward: Tensor) -> dict[str, Tensor]:
    """What every pairwise method logs, from rewards (G, K) with the chosen image first. A tie counts as half correct."""
    reward = reward.detach()
    margin = reward[:, 0] - reward[:, -1]
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    flat = torch.sigmoid(-margin.abs()) < SATURATED_SLOPE
    return {
        "rewards/chosen": reward[:, 0].mean(),
        "rewards/rejected": reward[:, -1].mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": accuracy.mean(),
        "rewards/saturated": flat.float().mean(),
    }


def error_metrics(name: str, error: Tensor) -> dict[str, Tensor]:
    """Errors (G, K) of `name` (policy or reference) as log entries, chosen and rejected apart."""
    error = error.detach()
    return {f"error/{name}_chosen": error[:, 0].mean(), f"error/{name}_rejected": error[:, -1].mean()}
