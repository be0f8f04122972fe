"""Policy and reference: adapters off and on again, and the order of the forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffpref.core.policy import adapter_off, adapters_off, evaluate, frozen
from diffpref.core.types import Conditioning, PathStep, Predict
from diffpref.models.lora import add_lora, trainable_state
from diffpref.models.sd import predictor

COND = Conditioning(torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1, -1))
X_T = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LEVELS = torch.tensor([[3, 3], [700, 700]])


@pytest.fixture
def adapted(sd_unet: UNet2DConditionModel) -> tuple[UNet2DConditionModel, Tensor]:
    """(a UNet with a LoRA that acts, what the UNet predicted before it)."""
    with torch.no_grad():
        before = predictor(sd_unet)(X_T, LEVELS, COND)
    add_lora(sd_unet, rank=2, alpha=2, targets="attention", seed=0)
    for name, p in trainable_state(sd_unet).items():
        nn.init.constant_(p, 0.3) if "lora_B" in name else None
    return sd_unet, before


def switches(module: nn.Module) -> list[bool]:
    """The state of every layer that has an adapter."""
    return [m._disable_adapters for m in module.modules() if hasattr(m, "_disable_adapters")]  # type: ignore[misc]


def test_reference_is_the_model_before_the_adapter(adapted: tuple[UNet2DConditionModel, Tensor]) -> None:
    unet, before = adapted
    policy = predictor(unet)
    reference = adapter_off(unet, policy)
    assert torch.equal(reference(X_T, LEVELS, COND), before)
    moved = policy(X_T, LEVELS, COND)
    assert not torch.allclose(moved, before, atol=1e-3)
    assert moved.requires_grad
    assert not reference(X_T, LEVELS, COND).requires_grad


def test_switches_come_back_after_an_exception_and_leave_requires_grad(adapted: tuple[UNet2DConditionModel, Tensor]) -> None:
    unet, _ = adapted
    adapters = [p for name, p in unet.named_parameters() if "lora_" in name]
    adapters[0].requires_grad_(False)  # a frozen adapter weight must stay frozen
    gradients = [p.requires_grad for p in unet.parameters()]

    def fail_inside() -> None:
        with adapters_off(unet):
            assert all(switches(unet))
            assert [p.requires_grad for p in unet.parameters()] == gradients
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert switches(unet)
    assert not any(switches(unet))
    assert [p.requires_grad for p in unet.parameters()] == gradients


def test_blocks_nest_and_a_layer_that_was_off_stays_off(adapted: tuple[UNet2DConditionModel, Tensor]) -> None:
    unet, _ = adapted
    first = next(m for m in unet.modules() if hasattr(m, "_disable_adapters"))
    first._disable_adapters = True  # type: ignore[assignment]
    before = switches(unet)
    with adapters_off(unet):
        with adapters_off(unet):
            pass
        assert all(switches(unet))
    assert switches(unet) == before


def test_a_module_without_adapters_passes_through() -> None:
    with adapters_off(nn.Linear(1, 1)):
        pass


def test_frozen_copy_does_not_follow_the_policy(sd_unet: UNet2DConditionModel) -> None:
    sd_unet.train().requires_grad_(True)
    reference = frozen(predictor, copy.deepcopy(sd_unet))
    before = reference(X_T, LEVELS, COND)
    with torch.no_grad():
        for p in sd_unet.parameters():
            p.add_(0.1)
    assert torch.equal(reference(X_T, LEVELS, COND), before)
    assert not before.requires_grad
    assert all(p.requires_grad for p in sd_unet.parameters())


def test_reference_is_asked_first_and_both_see_the_same_tensors() -> None:
    calls: list[tuple[str, Tensor, Tensor]] = []

    def recorder(name: str) -> Predict:
        def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
            assert cond is COND
            calls.append((name, x_t, timesteps))
            return x_t + len(calls)

        return predict

    steps = [PathStep(X_T + i, LEVELS, X_T, torch.ones(2, 2)) for i in range(2)]
    evals = evaluate(steps, COND, recorder("policy"), recorder("reference"))
    assert [name for name, _, _ in calls] == ["reference", "policy", "reference", "policy"]
    for (_, x_ref, t_ref), (_, x_pol, t_pol) in zip(calls[::2], calls[1::2], strict=True):
        assert x_ref is x_pol
        assert t_ref is t_pol
    assert [e.step for e in evals] == steps
    assert evals[0].reference is not None
    assert torch.equal(evals[0].reference, X_T + 1)
    assert torch.equal(evals[0].policy, X_T + 2)
    assert evaluate(steps[:1], COND, recorder("policy"), None)[0].reference is None
