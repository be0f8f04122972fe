"""Batches and evaluations made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Conditioning, Evaluation, PathStep, PreferenceBatch

Case = tuple[PreferenceBatch, list[Evaluation]]
MakeCase = Callable[..., Case]


@pytest.fixture(scope="session")
def make_case() -> MakeCase:
    """make_case(policy, reference, target, probability=None) -> (batch, evaluations) of tensors (G, K, C, h, w).

    probability: that the first image of each pair is the better one, certain when not given.
    """

    def make(policy: Tensor, reference: Tensor, target: Tensor, probability: Sequence[float] | None = None) -> Case:
        groups, images = policy.shape[:2]
        dtype = torch.promote_types(target.dtype, torch.float32)
        certain = torch.tensor(probability or [1.0] * groups, dtype=dtype)
        relevance = torch.stack([certain, 1 - certain], 1)[:, :images]
        cond = Conditioning(torch.zeros(groups, images, 1, 1))
        batch = PreferenceBatch(torch.zeros_like(target), cond, relevance, tuple(map(str, range(groups))), (0,) * groups)
        weight = torch.ones(groups, images, dtype=dtype)
        step = PathStep(target, torch.zeros(groups, images, dtype=torch.int64), target, weight)
        return batch, [Evaluation(step, policy, reference)]

    return make


@pytest.fixture(scope="session")
def random_case(make_case: MakeCase) -> Callable[..., Case]:
    """random_case(groups, images, dtype): policy, reference and target drawn apart; the policy takes a gradient."""

    def make(groups: int, images: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
        drawn = torch.randn(3, groups, images, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        policy, reference, target = (x.to(dtype) for x in drawn)
        return make_case(policy.requires_grad_(), reference.requires_grad_(), target)

    return make
