"""Policy and reference: adapters off and on again, and the order of the forwards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffpref.core.policy import adapter_off, adapters_off, blend, evaluate, frozen, guided, stored, two_pass_backward
from diffpref.core.types import Conditioning, Evaluation, LossOutput, PathStep, Predict
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


def test_guidance_is_the_formula_in_one_forward(sd_unet: UNet2DConditionModel) -> None:
    policy, calls = predictor(sd_unet), []

    def counted(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        calls.append(x_t.shape)
        return policy(x_t, timesteps, cond)

    null = Conditioning(torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(3)))
    everywhere = null.map(lambda x: x.expand(2, 2, -1, -1))
    found = guided(counted, null, 2.5)(X_T, LEVELS, COND)
    conditional, unconditional = policy(X_T, LEVELS, COND), policy(X_T, LEVELS, everywhere)
    torch.testing.assert_close(found, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert [tuple(shape) for shape in calls] == [(4, 2, 4, 8, 8)]
    assert guided(counted, None, 1.0) is counted
    with pytest.raises(ValueError, match=r"guidance_scale is 3\.0, but there is no null conditioning"):
        guided(policy, None, 3.0)


def test_the_null_half_takes_over_what_it_lacks() -> None:
    seen: list[Conditioning] = []

    def network(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        seen.append(cond)
        return x_t

    times = torch.arange(24.0).reshape(2, 2, 6)
    full = Conditioning(torch.ones(2, 2, 3, 4), torch.ones(2, 2, 5), times)
    guided(network, Conditioning(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 5)), 2.0)(X_T, LEVELS, full)
    (both,) = seen
    assert both.time_ids is not None
    assert both.pooled_prompt_embeds is not None
    assert torch.equal(both.time_ids, torch.cat([times, times]))
    assert torch.equal(both.prompt_embeds, torch.cat([torch.zeros(2, 2, 3, 4), torch.ones(2, 2, 3, 4)]))
    assert torch.equal(both.pooled_prompt_embeds, torch.cat([torch.zeros(2, 2, 5), torch.ones(2, 2, 5)]))


def test_known_errors_and_known_predictions_spare_the_reference() -> None:
    def forbidden(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        raise AssertionError("asked")

    def policy(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return x_t

    step = PathStep(X_T, LEVELS, X_T, torch.ones(2, 2))
    errors = torch.rand(2, 2)
    (e,) = evaluate([step], COND, policy, forbidden, reference_error=errors)
    assert e.reference is None
    assert e.reference_error is errors
    (e,) = evaluate([replace(step, reference=2 * X_T)], COND, policy, forbidden)
    assert torch.equal(e.reference, 2 * X_T)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="one step"):
        evaluate([step, step], COND, policy, None, reference_error=errors)


def test_two_passes_on_a_real_unet_with_and_without_autocast(adapted: tuple[UNet2DConditionModel, Tensor]) -> None:
    unet, _ = adapted
    policy = predictor(unet)
    reference, weights = adapter_off(unet, policy), trainable_state(unet)
    steps = [PathStep(X_T * (1 + i), LEVELS, X_T.flip(0), torch.full((2, 2), 0.5 + i)) for i in range(3)]

    def loss(evals: list[Evaluation]) -> LossOutput:
        gap = torch.stack([e.step.weight * (e.policy.float() - e.step.target).square().flatten(2).mean(2) for e in evals]).sum(0)
        return LossOutput(torch.nn.functional.softplus(gap[:, 0] - gap[:, 1]), {})

    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            evals = evaluate(steps, COND, policy, reference)
            loss(evals).per_group.mean().backward()
            expected = {name: p.grad for name, p in weights.items()}
            for p in weights.values():
                p.grad = None
            two_pass_backward(steps, COND, policy, reference, loss)
        for name, p in weights.items():
            assert p.grad is not None
            wanted = expected[name]
            assert wanted is not None
            scale = float(wanted.abs().max())
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=(2e-2 if autocast else 1e-5) * scale)
            p.grad = None
        assert max(float(g.abs().max()) for g in expected.values() if g is not None) > 0


def test_stored_weights_as_the_reference(adapted: tuple[UNet2DConditionModel, Tensor]) -> None:
    unet, before_adapter = adapted
    policy, weights = predictor(unet), trainable_state(unet)
    earlier = {name: p.detach().clone() for name, p in weights.items()}
    reference = stored(policy, weights, earlier)
    with torch.no_grad():
        was = policy(X_T, LEVELS, COND)
        for p in weights.values():
            p.add_(0.2)
        moved = policy(X_T, LEVELS, COND)
    assert torch.equal(reference(X_T, LEVELS, COND), was)
    assert torch.equal(policy(X_T, LEVELS, COND).detach(), moved)
    assert not torch.allclose(moved, was, atol=1e-3)
    assert not torch.allclose(before_adapter, was, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whose cache must not keep the other weights
        now, then, again = policy(X_T, LEVELS, COND), reference(X_T, LEVELS, COND), policy(X_T, LEVELS, COND)
    assert torch.equal(now, again)
    assert not torch.allclose(now.float(), then.float(), atol=1e-2)
    now.sum().backward()
    assert all(p.grad is not None for p in weights.values())
    with pytest.raises(AssertionError, match="exactly the trainable tensors"):
        stored(policy, weights, {})


def test_blend() -> None:
    weights, policy = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 2.0], requires_grad=True), "b": torch.zeros(1)}
    blend(weights, policy, 1.0)
    assert weights["a"].tolist() == [1, 2]
    blend(weights, policy, 0.75)
    assert weights["a"].tolist() == [1.5, 2]
    blend(weights, policy, 0.0)
    assert weights["a"].tolist() == [3, 2]
    assert not weights["a"].requires_grad
    with pytest.raises(ValueError, match=r"decay is 1\.1"):
        blend(weights, policy, 1.1)
