"""A denoiser of four numbers, the noise schedule of SD, and draws that can be prescribed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, Predict, PreferenceBatch

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@pytest.fixture(scope="session")
def process() -> DdpmProcess:
    """The schedule of SD, noise predicted."""
    return DdpmProcess.from_betas(BETAS)


@pytest.fixture(scope="session")
def v_process() -> DdpmProcess:
    """The schedule of SD, v predicted."""
    return DdpmProcess.from_betas(BETAS, "v_prediction")


def _toy(weights: Tensor) -> Predict:
    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        a, b, k, c = weights.to(x_t.dtype)
        constant = k * timesteps.to(x_t.dtype) / 1000 + c * cond.prompt_embeds.to(x_t.dtype).flatten(2).mean(-1)
        return a * x_t + b * x_t.tanh() + constant[..., None, None, None]

    return predict


@pytest.fixture(scope="session")
def toy() -> Callable[[Tensor], Predict]:
    """toy(weights (4,)) -> a x + b tanh(x) + k t / 1000 + c mean(conditioning)."""
    return _toy


@pytest.fixture
def policy_weights() -> Tensor:
    """The policy of the worked examples, as a leaf."""
    return torch.tensor([0.30, 0.10, -0.20, 0.05], dtype=torch.float64, requires_grad=True)


@pytest.fixture
def policy(policy_weights: Tensor) -> Predict:
    """The toy with the policy's weights."""
    return _toy(policy_weights)


@pytest.fixture
def reference() -> Predict:
    """The toy with the reference's weights, without gradient."""
    return torch.no_grad()(_toy(torch.tensor([0.28, 0.12, -0.20, 0.05], dtype=torch.float64)))


@dataclass(frozen=True)
class AtLevels(PairRandom):
    """Keyed draws, but for the timesteps."""

    levels: tuple[int, ...] = ()

    def integers(self, purpose: str, high: int) -> Tensor:
        assert purpose == "timestep"
        return torch.tensor(self.levels)


@pytest.fixture(scope="session")
def at_levels() -> Callable[..., AtLevels]:
    """at_levels(batch, *t) -> draws of the batch's pairs with these timesteps."""
    return lambda batch, *levels: AtLevels(0, batch.pair_ids, batch.visits, levels=levels)


@pytest.fixture(scope="session")
def pair() -> Callable[[float], PreferenceBatch]:
    """pair(conditioning) -> the pair of the worked examples."""

    def make(conditioning: float) -> PreferenceBatch:
        latents = torch.tensor([[0.8, -0.3, 0.1, 0.5], [-0.6, 0.4, 0.9, -0.2]], dtype=torch.float64).reshape(1, 2, 1, 2, 2)
        cond = Conditioning(torch.full((1, 2, 1, 1), conditioning, dtype=torch.float64))
        return PreferenceBatch(latents, cond, torch.tensor([[1.0, 0.0]], dtype=torch.float64), ("a",), (0,))

    return make


@pytest.fixture(scope="session")
def pairs() -> Callable[..., PreferenceBatch]:
    """pairs(groups, dtype) -> random pairs, each with its own conditioning."""

    def make(groups: int, dtype: torch.dtype = torch.float64) -> PreferenceBatch:
        maker = torch.Generator().manual_seed(3)
        latents = torch.randn(groups, 2, 2, 3, 3, generator=maker, dtype=torch.float64).to(dtype)
        words = torch.randn(groups, 1, 2, 3, generator=maker, dtype=torch.float64).to(dtype).expand(-1, 2, -1, -1)
        relevance = torch.tensor([[1.0, 0.0]], dtype=dtype).expand(groups, 2)
        return PreferenceBatch(latents, Conditioning(words), relevance, tuple(f"pair-{i}" for i in range(groups)), (0,) * groups)

    return make
