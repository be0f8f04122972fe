"""Batches and evaluations made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Conditioning, Evaluation, PathStep, PreferenceBatch

Case = tuple[PreferenceBatch, list[Evaluation]]
MakeCase = Callable[..., Case]


@pytest.fixture(scope="session")
def make_case() -> MakeCase:
    """make_case(policy, reference, target, probability, relevance, scores) -> (batch, evaluations) of tensors (G, K, C, h, w).

    probability: that the first image of each pair is the better one, certain when not given. relevance: (G, K) instead of it.
    """

    def make(
        policy: Tensor,
        reference: Tensor,
        target: Tensor,
        probability: Sequence[float] | None = None,
        relevance: Tensor | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> Case:
        groups, images = policy.shape[:2]
        dtype = torch.promote_types(target.dtype, torch.float32)
        certain = torch.tensor(probability or [1.0] * groups, dtype=dtype)
        if relevance is None:
            relevance = torch.stack([certain, 1 - certain], 1)[:, :images]
        cond = Conditioning(torch.zeros(groups, images, 1, 1))
        ids, visits = tuple(map(str, range(groups))), (0,) * groups
        batch = PreferenceBatch(torch.zeros_like(target), cond, relevance, ids, visits, scores or {})
        weight, log_snr = torch.ones(groups, images, dtype=dtype), torch.full((groups, images), -0.5, dtype=dtype)
        step = PathStep(target, torch.zeros(groups, images, dtype=torch.int64), target, weight, log_snr)
        return batch, [Evaluation(step, policy, reference)]

    return make


@pytest.fixture(scope="session")
def random_case(make_case: MakeCase) -> Callable[..., Case]:
    """random_case(groups, images, dtype): policy, reference and target drawn apart; the policy takes a gradient.

    Pairs have certain labels, longer lists relevances of equal distance; everyone has a score.
    """

    def make(groups: int, images: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
        maker = torch.Generator().manual_seed(seed)
        drawn = torch.randn(3, groups, images, 2, 3, 4, generator=maker, dtype=torch.float64)
        policy, reference, target = (x.to(dtype) for x in drawn)
        wide = torch.promote_types(dtype, torch.float32)
        scores = {"score": torch.rand(groups, images, generator=maker, dtype=torch.float64).to(wide)}
        falling = torch.linspace(1, 0, max(images, 2), dtype=wide)[:images].expand(groups, images)
        return make_case(policy.requires_grad_(), reference.requires_grad_(), target, relevance=falling, scores=scores)

    return make


@pytest.fixture(scope="session")
def fixture_p() -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference and target (1, 2, 1, 1, 2) of a pair with margin 0.115: the winner got worse than the reference."""

    def rows(*values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[None, :, None, None]

    return rows([0.6, -0.7], [0.2, -0.4]), rows([0.7, -0.8], [0.3, -0.6]), rows([0.5, -1.0], [0.5, -1.0])
