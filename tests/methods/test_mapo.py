"""MaPO against golden numbers of the authors' loss lines, and phi against its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods.mapo import MaPO, phi
from diffpref.methods.sft import SFT

Case = tuple[PreferenceBatch, list[Evaluation]]
MakeCase = Callable[..., Case]


def rows(*values: list[float]) -> Tensor:
    """Images of two elements as one pair (1, 2, 1, 1, 2)."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None]


ZERO = torch.zeros(1, 2, 1, 1, 2, dtype=torch.float64)
POLICY = rows([0.3, -0.1], [0.2, 0.26])


def run(method: MaPO, make_case: MakeCase, policy: Tensor = POLICY, target: Tensor = ZERO) -> LossOutput:
    """The loss of a single pair."""
    return method.loss(*make_case(policy, policy, target))


@pytest.mark.parametrize(
    ("beta", "loss", "gradient"),
    [
        (0.1, 0.0829254889, [2.38651951, -0.795506503, -1.390124689, -1.807162096]),
        (1.0, 0.3792548894, [21.165195105, -7.055065035, -13.901246889, -18.071620956]),
    ],
)
def test_golden(beta: float, loss: float, gradient: list[float], make_case: MakeCase) -> None:
    policy = POLICY.clone().requires_grad_()
    out = run(MaPO(beta=beta), make_case, policy)
    assert float(out.metrics["rewards/margins"]) == pytest.approx(0.9417826847, rel=1e-9)
    assert float(out.per_group.detach()) == pytest.approx(loss, rel=1e-9)
    out.per_group.sum().backward()
    assert policy.grad is not None
    assert policy.grad.flatten().tolist() == pytest.approx(gradient, rel=1e-8)


def test_swapping_the_pair(make_case: MakeCase) -> None:
    plain, swapped = run(MaPO(), make_case), run(MaPO(), make_case, POLICY.flip(1))
    assert float(swapped.per_group) == pytest.approx(0.1809037574, rel=1e-9)
    q = float(plain.metrics["rewards/margins"])
    assert float(swapped.metrics["rewards/margins"]) == pytest.approx(-q, rel=1e-12)
    assert float(swapped.per_group - plain.per_group) == pytest.approx((0.0538 - 0.05) + 0.1 * q, rel=1e-9)


def test_saturated_and_equal_pairs(make_case: MakeCase) -> None:
    target = rows([0.5, -1.0], [0.5, -1.0])
    case_a = rows([0.4, -0.9], [0.3, -1.4])
    assert float(run(MaPO(), make_case, case_a, target).per_group) == pytest.approx(0.0100000000208, rel=1e-9)
    equal = case_a[:, :1].expand(-1, 2, -1, -1, -1)
    assert float(run(MaPO(), make_case, equal, target).per_group) == pytest.approx(0.01 + 0.1 * math.log(2), rel=1e-12)


def test_limits_in_snr_and_beta(make_case: MakeCase) -> None:
    policy = POLICY.clone().requires_grad_()
    out = run(MaPO(snr=1e-10), make_case, policy)
    assert float(out.per_group.detach()) == pytest.approx(0.05 + 0.1 * math.log(2), abs=1e-9)
    out.per_group.sum().backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad[0, 0, 0, 0], torch.tensor([0.3, -0.1], dtype=torch.float64), rtol=1e-6, atol=0)
    assert policy.grad[0, 1].abs().max() < 1e-7
    plain = SFT().loss(*make_case(POLICY, POLICY, ZERO)).per_group
    torch.testing.assert_close(run(MaPO(beta=0), make_case).per_group, plain, rtol=1e-15, atol=0)


def test_phi_values() -> None:
    y = torch.tensor([0, 0.005, 0.1, 1, 5], dtype=torch.float64)
    expected = torch.tensor([1, 0.9975020833, 0.9508331945, 0.5819767069, 0.0339182745], dtype=torch.float64)
    torch.testing.assert_close(phi(y), expected, rtol=0, atol=5e-11)


def test_phi_slope() -> None:
    y = torch.tensor([0, 0.025, 0.05], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phi(y).sum(), y)
    torch.testing.assert_close(slope, torch.tensor([-0.5, -0.4958334201, -0.4916673610], dtype=torch.float64), rtol=0, atol=5e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi_is_smooth_where_its_two_forms_meet_and_finite_everywhere(dtype: torch.dtype) -> None:
    y = torch.tensor([0.0999999, 0.1, 0.1000001], dtype=torch.float64).to(dtype)
    exact = y.double() / torch.expm1(y.double())
    torch.testing.assert_close(phi(y).double(), exact, rtol=0, atol=4e-8 if dtype == torch.float32 else 1e-13)
    far = torch.tensor([0, 1e-30, 80, 200, 1e4, 1e30], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(phi(far).sum(), far)
    assert phi(far).isfinite().all()
    assert slope.isfinite().all()
    assert float(phi(far.detach())[-3:].max()) < 1e-30


def test_an_error_of_zero_has_a_finite_loss_and_gradient(make_case: MakeCase) -> None:
    policy = torch.zeros(1, 2, 1, 1, 2, requires_grad=True)
    out = run(MaPO(), make_case, policy, ZERO.float())
    out.per_group.sum().backward()
    assert float(out.per_group.detach()) == pytest.approx(0.1 * math.log(2), rel=1e-6)
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_per_timestep_multiplies_with_the_signal_to_noise_ratio(make_case: MakeCase) -> None:
    batch, (e,) = make_case(POLICY, POLICY, ZERO)
    step = replace(e.step, log_snr=torch.full((1, 2), math.log(3.0), dtype=torch.float64))
    scaled = MaPO(snr=0.2, snr_mode="per_timestep").loss(batch, [replace(e, step=step)]).per_group
    torch.testing.assert_close(scaled, run(MaPO(snr=0.6), make_case).per_group, rtol=1e-12, atol=0)


def test_steps_add_up_inside_phi(make_case: MakeCase) -> None:
    batch, (e,) = make_case(POLICY, POLICY, ZERO)
    halves = [replace(e, step=replace(e.step, weight=0.5 * e.step.weight))] * 2
    torch.testing.assert_close(MaPO().loss(batch, halves).per_group, MaPO().loss(batch, [e]).per_group, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "value"), [("beta", -0.1), ("snr", 0.0)])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        MaPO(**{name: value})
