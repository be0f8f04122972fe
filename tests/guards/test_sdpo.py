"""The SDPO guard against worked numbers, its invariants, and the precision at which the released arithmetic switches itself off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, PathStep, PreferenceBatch
from diffpref.guards.sdpo import SDPO
from diffpref.methods import DMPO, DPOP, DRO, DSPO, LCPO, DiffusionDPO, InversionDPO, MaPO, Method, SmPO

Case = tuple[PreferenceBatch, list[Evaluation]]


def gradient(loss: object, case: Case) -> tuple[Tensor, Tensor]:
    """(loss per group, gradient of its sum with respect to the policy's predictions)."""
    batch, evals = case
    out = loss(batch, evals)  # type: ignore[operator]
    (g,) = torch.autograd.grad(out.per_group.sum(), evals[0].policy)
    return out.per_group.detach(), g


@pytest.mark.parametrize(("mu", "factor"), [(0.0, 0.666667), (0.2, 0.533333), (0.4, 0.4), (0.6, 0.266667), (0.9, 0.066667), (1.0, 0.0)])
def test_factor(mu: float, factor: float, worked: Case) -> None:
    assert SDPO(mu=mu).factor(worked[1]).tolist() == pytest.approx([factor], abs=1e-6)


def test_value_stays_and_the_rejected_gradient_shrinks(worked: Case) -> None:
    guard, method = SDPO(mu=0.4), DiffusionDPO(beta=20)
    value, g = gradient(guard(method.loss), worked)
    assert value.tolist() == pytest.approx([0.275081], abs=1e-6)
    assert g.flatten().tolist() == pytest.approx([0.240489, 0.721467, 0.288587, -0.577174], abs=1e-6)
    assert float(guard(method.loss)(*worked).metrics["sdpo/factor"]) == pytest.approx(0.4, abs=1e-12)


def test_scope(two_pairs: Case) -> None:
    assert SDPO(mu=0.4).factor(two_pairs[1]).tolist() == pytest.approx([0.4, 1.0], abs=1e-12)
    assert SDPO(mu=0.4, scope="microbatch").factor(two_pairs[1]).tolist() == pytest.approx([0.57, 0.57], abs=1e-12)


PAIR_METHODS: list[Method] = [
    *(DiffusionDPO(beta=3, loss_type=link) for link in ("sigmoid", "hinge", "ipo", "ipo_diffusers")),
    DiffusionDPO(beta=3, label_smoothing=0.1),
    DiffusionDPO(beta=3, label_smoothing=0.1, loss_type="robust"),
    *(SmPO(beta=3, score=None), LCPO(beta=3), DPOP(beta=3), InversionDPO(beta=3), DMPO(beta=3), DSPO(beta=0.5), DRO(), MaPO(snr=0.01)),
]


@pytest.mark.parametrize("method", PAIR_METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'loss_type', 'own')}")
@pytest.mark.parametrize("scope", ["sample", "microbatch"])
def test_any_pair_method_can_wear_it(method: Method, scope: str, many: Case) -> None:
    guard = SDPO(mu=0.5, scope=scope)  # type: ignore[arg-type]
    value, plain = gradient(method.loss, many)
    guarded_value, guarded = gradient(guard(method.loss), many)
    factor = guard.factor(many[1])
    assert torch.equal(guarded_value, value)
    assert torch.equal(guarded[:, 0], plain[:, 0])
    torch.testing.assert_close(guarded[:, 1], factor[:, None, None, None] * plain[:, 1], rtol=1e-12, atol=0)
    assert 0 < float(factor.min()) <= float(factor.max()) <= 1
    assert not factor.requires_grad


def test_factor_falls_with_mu_and_the_update_keeps_its_promise(many: Case) -> None:
    _batch, (e,) = many
    a, b = (e.policy - e.step.target).detach().flatten(2).unbind(1)
    factors = torch.stack([SDPO(mu=mu).factor([e]) for mu in (0.0, 0.3, 0.6, 1.0)])
    assert (factors.diff(dim=0) <= 0).all()
    opposed = (a * b).sum(-1) <= 0
    assert opposed.any()
    assert not opposed.all()
    assert torch.equal(factors[:, opposed], torch.ones(4, int(opposed.sum()), dtype=torch.float64))
    assert torch.equal(factors[-1, ~opposed], torch.zeros(int((~opposed).sum()), dtype=torch.float64))
    inside = (factors[2] > 0) & (factors[2] < 1)
    change = ((-a + factors[2][:, None] * b) * a).sum(-1)
    torch.testing.assert_close(change[inside], -0.6 * (a * a).sum(-1)[inside], rtol=1e-12, atol=0)
    assert (change <= -0.6 * (a * a).sum(-1) + 1e-12).all()


def test_scale_of_the_errors_and_identical_images(many: Case) -> None:
    _batch, (e,) = many
    larger = replace(e, policy=e.step.target + 7 * (e.policy - e.step.target))
    torch.testing.assert_close(SDPO(mu=0.4).factor([larger]), SDPO(mu=0.4).factor([e]), rtol=1e-12, atol=0)
    same = replace(e, policy=e.policy[:, :1].expand_as(e.policy), step=replace(e.step, target=e.step.target[:, :1].expand_as(e.policy)))
    torch.testing.assert_close(SDPO(mu=0.4).factor([same]), torch.full((6,), 0.6, dtype=torch.float64), rtol=1e-12, atol=0)


def test_steps_of_a_trajectory_share_one_factor(many: Case) -> None:
    _batch, (e,) = many
    heavy = replace(e, step=replace(e.step, weight=3 * e.step.weight))
    torch.testing.assert_close(SDPO(mu=0.4).factor([heavy, heavy]), SDPO(mu=0.4).factor([e]), rtol=1e-12, atol=0)
    error = (e.policy - e.step.target).detach()
    alike = torch.stack([error[:, 0], 2 * error[:, 0] + 0.5 * error[:, 1]], 1)  # so that no factor is at its bounds
    one = replace(e, policy=e.step.target + alike)
    two = replace(e, policy=e.step.target + alike.flip(1), step=replace(e.step, weight=2 * e.step.weight))
    a, b = alike.flatten(2).unbind(1)
    expected = 0.4 * ((a * a).sum(-1) + 4 * (b * b).sum(-1)) / (5 * (a * b).sum(-1))
    assert float(expected.max()) < 1
    torch.testing.assert_close(SDPO(mu=0.6).factor([one, two]), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_does_not_switch_it_off(dtype: torch.dtype) -> None:
    maker = torch.Generator().manual_seed(0)
    common = torch.randn(8, 1, 4, 64, 64, generator=maker, dtype=torch.float64)
    policy = (0.1 * (common + 0.5 * torch.randn(8, 2, 4, 64, 64, generator=maker, dtype=torch.float64))).to(dtype)
    step_shape = torch.ones(8, 2)
    evals = [Evaluation(PathStep(policy, step_shape.long(), torch.zeros_like(policy), step_shape), policy, None)]
    exact = [Evaluation(replace(evals[0].step, target=torch.zeros(policy.shape, dtype=torch.float64)), policy.double(), None)]
    for scope in ("sample", "microbatch"):
        guard = SDPO(mu=0.4, scope=scope)  # type: ignore[arg-type]
        torch.testing.assert_close(guard.factor(evals).double(), guard.factor(exact).double(), rtol=1e-4, atol=0)
        assert float(guard.factor(evals).max()) < 0.9


def test_lists_and_settings_are_refused(many: Case) -> None:
    _batch, (e,) = many
    single = replace(e, policy=e.policy[:, :1])
    with pytest.raises(ValueError, match="guard sdpo needs pairs, but groups have 1 images"):
        SDPO().factor([single])
    with pytest.raises(ValueError, match=r"mu is 1\.1"):
        SDPO(mu=1.1)
