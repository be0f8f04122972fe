"""One worked pair, and batches of random ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Conditioning, Evaluation, PathStep, PreferenceBatch

Case = tuple[PreferenceBatch, list[Evaluation]]


def _case(policy: Tensor, reference: Tensor | None, target: Tensor) -> Case:
    shape = policy.shape[:2]
    step = PathStep(target, torch.zeros(shape, dtype=torch.int64), target, torch.ones(shape, dtype=torch.float64))
    relevance = torch.linspace(1, 0, shape[1], dtype=torch.float64).expand(shape)
    cond = Conditioning(torch.zeros(*shape, 1, 1))
    ids = tuple(map(str, range(shape[0])))
    return PreferenceBatch(torch.zeros_like(target), cond, relevance, ids, (0,) * shape[0]), [Evaluation(step, policy, reference)]


@pytest.fixture
def worked() -> Case:
    """The pair with margin 0.115 whose winner got worse than the reference; its policy is a leaf."""

    def rows(*values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[None, :, None, None]

    policy = rows([0.6, -0.7], [0.2, -0.4]).requires_grad_()
    return _case(policy, rows([0.7, -0.8], [0.3, -0.6]), rows([0.5, -1.0], [0.5, -1.0]))


@pytest.fixture
def two_pairs() -> Case:
    """The worked pair, and one with opposed errors."""
    values = [[0.6, -0.7], [0.2, -0.4], [0.55, -1.2], [0.9, -0.9]]
    policy = torch.tensor(values, dtype=torch.float64).reshape(2, 2, 1, 1, 2).requires_grad_()
    target = torch.tensor([0.5, -1.0], dtype=torch.float64).expand(2, 2, 1, 1, 2)
    return _case(policy, None, target)


@pytest.fixture
def many() -> Case:
    """Six random pairs; the policy is a leaf."""
    drawn = torch.randn(3, 6, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return _case(drawn[0].clone().requires_grad_(), drawn[1], drawn[2])
