"""The two steps of expectation-maximisation over label noise."""

from __future__ import annotations

import math

import pytest
import torch

from diffpref.core.links import hinge, logistic
from diffpref.core.noisy_labels import label_confidence, updated_reliability


def plain(z: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a certain label."""
    return logistic(z, torch.ones_like(z))


@pytest.mark.parametrize(("logit", "eta", "expected"), [(1.15, 0.9, 0.966014), (-1.15, 0.9, 0.740242), (1.15, 0.5, 0.759511)])
def test_confidence(logit: float, eta: float, expected: float) -> None:
    z = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    c = label_confidence(plain, z, eta)
    assert not c.requires_grad
    assert float(c) == pytest.approx(expected, abs=1e-6)
    p = 1 / (1 + math.exp(-logit))
    assert float(c) == pytest.approx(eta * p / (eta * p + (1 - eta) * (1 - p)), rel=1e-12)


@pytest.mark.parametrize(("logit", "loss"), [(1.15, 0.314165), (-1.15, 1.126358)])
def test_loss_and_gradient(logit: float, loss: float) -> None:
    z = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    c = label_confidence(plain, z, 0.9)
    value = logistic(z, c)
    assert float(value.detach()) == pytest.approx(loss, abs=1e-6)
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(slope, z.detach().sigmoid() - c, rtol=1e-12, atol=0)


def test_confidence_rises_with_logit_and_reliability_for_any_link() -> None:
    z = torch.linspace(-5, 5, 21, dtype=torch.float64)
    for link in (plain, hinge):
        table = torch.stack([label_confidence(link, z, eta) for eta in (0.5, 0.7, 0.9, 0.99)])
        assert (table.diff(dim=0) > 0).all()
        assert (table.diff(dim=1) >= 0).all()
        assert table.isfinite().all()
    per_pair = label_confidence(plain, z[:2], torch.tensor([0.5, 0.9], dtype=torch.float64))
    assert float(per_pair[1]) == pytest.approx(float(label_confidence(plain, z[1:2], 0.9)), rel=1e-12)


def test_every_annotator_has_its_own_average() -> None:
    before = torch.tensor([0.9, 0.9, 0.6], dtype=torch.float64)
    confidence = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    after = updated_reliability(before, confidence, torch.tensor([0, 0, 2]), decay=0.8)
    assert after.tolist() == pytest.approx([0.8 * 0.9 + 0.2 * 0.75, 0.9, 0.8 * 0.6 + 0.2 * 0.2], rel=1e-12)
    floored = updated_reliability(before, confidence, torch.tensor([0, 0, 2]), decay=0.1)
    assert floored.tolist() == pytest.approx([0.765, 0.9, 0.5], rel=1e-12)
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        updated_reliability(before, confidence, torch.tensor([0, 0, 2]), decay=1.5)
