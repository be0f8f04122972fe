"""Policy and reference as plain functions (x_t, t, cond) -> prediction over (G, K, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffpref.core.types import Conditioning, Evaluation, PathStep, Predict


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Switch LoRA layers off inside the block.

    The switch of the layers themselves is used, because enabling adapters through the model would also make frozen
    adapter weights trainable. It is restored before the backward pass, or recomputed activations would miss the adapter.
    """
    layers = [m for m in denoiser.modules() if hasattr(m, "_disable_adapters")]
    before = [m._disable_adapters for m in layers]
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def adapter_off(denoiser: nn.Module, policy: Predict) -> Predict:
    """LoRA: the reference is the policy with its adapters switched off; no second copy in memory."""

    @torch.no_grad()
    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        with adapters_off(denoiser):
            return policy(x_t, timesteps, cond)

    return predict


def frozen(predictor: Callable[[nn.Module], Predict], copy: nn.Module) -> Predict:
    """Full fine-tuning: the reference is `copy`, taken before the first step, in evaluation mode and without gradients."""
    return torch.no_grad()(predictor(copy.eval().requires_grad_(False)))


def evaluate(steps: Sequence[PathStep], cond: Conditioning, policy: Predict, reference: Predict | None) -> list[Evaluation]:
    """Ask reference and policy for a prediction at every step; the reference first, while no graph is alive."""
    evals = []
    for step in steps:
        expected = None if reference is None else reference(step.x_t, step.timesteps, cond)
        evals.append(Evaluation(step, policy(step.x_t, step.timesteps, cond), expected))
    return evals
