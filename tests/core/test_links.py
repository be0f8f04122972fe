"""Every link on a pair: its worked values, symmetries, slopes and extremes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpref.core.links import Link, hinge, ipo, logistic, mixed, reverse_kl, robust

BETA = 20.0
LINKS: dict[str, Link] = {
    "logistic": lambda z: logistic(z, torch.ones_like(z)),
    "conservative": lambda z: logistic(z, torch.full_like(z, 0.9)),
    "hinge": hinge,
    "ipo": lambda z: ipo(z, BETA),
    "robust": lambda z: robust(z, 0.1),
    "reverse_kl": lambda z: reverse_kl(z, torch.full_like(z, 0.99)),
}
OPTIMUM = {"conservative": math.log(9), "ipo": 0.5, "reverse_kl": math.log(99), "hinge": 1.0}
each_link = pytest.mark.parametrize("name", list(LINKS))


def at(link: Link, z: float) -> tuple[float, float]:
    """Value and slope in float64."""
    leaf = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    value = link(leaf).sum()
    (slope,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), float(slope)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logistic", 0.275081), ("hinge", 0.0), ("ipo", 0.001056), ("conservative", 0.390081), ("robust", 0.131331), ("reverse_kl", 0.563483)],
)
def test_worked_pair(name: str, value: float) -> None:
    assert at(LINKS[name], 1.15)[0] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("z", "value", "slope"), [(0.0, 1.614463, -1.148780), (1.15, 0.563483, -0.629265), (math.log(99), 0.0, 0.0), (6.0, 0.004101, 0.003465)]
)
def test_reverse_kl(z: float, value: float, slope: float) -> None:
    assert at(LINKS["reverse_kl"], z) == pytest.approx((value, slope), abs=1e-6)
    p = torch.sigmoid(torch.tensor(z, dtype=torch.float64))
    assert at(LINKS["reverse_kl"], z)[1] == pytest.approx(float(p * (1 - p) * (z - math.log(99))), abs=1e-12)


def test_reverse_kl_in_its_tails_and_at_the_clamp() -> None:
    assert at(LINKS["reverse_kl"], 60.0)[0] == pytest.approx(-math.log(0.99), abs=1e-12)
    assert at(LINKS["reverse_kl"], -60.0)[0] == pytest.approx(-math.log(0.01), abs=1e-12)
    assert at(lambda z: reverse_kl(z, torch.ones_like(z)), 1.15)[0] == pytest.approx(2.770837, abs=1e-6)


def test_values_without_a_margin() -> None:
    expected = {"logistic": math.log(2), "conservative": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * BETA**2), "robust": math.log(2)}
    for name, value in expected.items():
        assert at(LINKS[name], 0.0)[0] == pytest.approx(value, rel=1e-12)
    assert at(hinge, 0.4)[0] == pytest.approx(0.6, rel=1e-12)
    assert at(lambda z: robust(z, 0.0), 1.3)[0] == pytest.approx(at(LINKS["logistic"], 1.3)[0], rel=1e-12)


@each_link
def test_slope_is_the_derivative_and_falls_until_the_optimum(name: str) -> None:
    for z in torch.linspace(-8, 8, 33, dtype=torch.float64).add(0.013).tolist():
        numeric = (at(LINKS[name], z + 1e-5)[0] - at(LINKS[name], z - 1e-5)[0]) / 2e-5
        slope = at(LINKS[name], z)[1]
        assert slope == pytest.approx(numeric, abs=1e-8)
        assert slope <= 1e-15 if z < OPTIMUM.get(name, math.inf) else slope >= -1e-15


@pytest.mark.parametrize("name", ["conservative", "ipo", "reverse_kl"])
def test_finite_optimum(name: str) -> None:
    assert at(LINKS[name], OPTIMUM[name])[1] == pytest.approx(0, abs=1e-12)


@each_link
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([-1e4, -100, 0, 100, 1e4], dtype=dtype, requires_grad=True)
    value = LINKS[name](z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_robust_is_unbounded_and_unbiased() -> None:
    assert at(LINKS["robust"], 1e3)[0] < -100
    flipped: Callable[[Tensor], Tensor] = lambda z: 0.9 * robust(z, 0.1) + 0.1 * robust(-z, 0.1)  # noqa: E731
    for z in (-2.0, 0.3, 4.0):
        assert at(flipped, z)[0] == pytest.approx(at(LINKS["logistic"], z)[0], rel=1e-12)


@each_link
def test_an_uncertain_label_mixes_both_orders(name: str) -> None:
    z = torch.tensor([-1.0, 0.2, 3.0], dtype=torch.float64)
    p = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(mixed(LINKS[name], z, p), p * LINKS[name](z) + (1 - p) * LINKS[name](-z), rtol=1e-15, atol=0)
    swapped = mixed(LINKS[name], -z, 1 - p)
    torch.testing.assert_close(mixed(LINKS[name], z, p), swapped, rtol=1e-12, atol=1e-15)
