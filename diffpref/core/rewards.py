"""Implicit rewards: how much better than the reference the policy explains an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.core.types import Evaluation


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
        assert e.reference is not None, "the run was built without the reference that its method declares"
        errors.append(e.step.weight * mean_squared_error(e.reference, e.step.target).detach())
    return torch.stack(errors).sum(0)


def margin_metrics(reward: Tensor) -> dict[str, Tensor]:
    """What every pairwise method logs, from rewards (G, K) with the chosen image first. A tie counts as half correct."""
    reward = reward.detach()
    margin = reward[:, 0] - reward[:, -1]
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return {
        "rewards/chosen": reward[:, 0].mean(),
        "rewards/rejected": reward[:, -1].mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": accuracy.mean(),
    }


def error_metrics(name: str, error: Tensor) -> dict[str, Tensor]:
    """Errors (G, K) of `name` (policy or reference) as log entries, chosen and rejected apart."""
    error = error.detach()
    return {f"error/{name}_chosen": error[:, 0].mean(), f"error/{name}_rejected": error[:, -1].mean()}
