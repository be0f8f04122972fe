"""Diffusion-KTO against worked numbers; the reference point over two processes is in tests/core/test_distributed.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods.diffusion_kto import DiffusionKTO

MakeCase = Callable[..., tuple[PreferenceBatch, list[Evaluation]]]
POLICY, REFERENCE, LABELS = [0.050, 0.104, 0.062], [0.060, 0.100, 0.060], [1.0, 0.0, 1.0]


def run(make_case: MakeCase, policy: list[float] = POLICY, **settings: Any) -> tuple[LossOutput, Tensor]:
    """(loss of three single images with these errors, their errors as leaves); beta 200 is the authors' 100."""
    errors = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    prediction, reference = (e.sqrt().reshape(3, 1, 1, 1, 1) for e in (errors, torch.tensor(REFERENCE, dtype=torch.float64)))
    relevance = torch.tensor(LABELS, dtype=torch.float64)[:, None]
    case = make_case(prediction, reference, torch.zeros_like(reference), relevance=relevance)
    return DiffusionKTO(**({"beta": 200.0} | settings)).loss(*case), errors


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, 0.416086),
        ({"value_function": "loss_averse"}, 1.562055),
        ({"value_function": "risk_seeking"}, 0.082389),
        ({"reference_point": "class_means"}, 0.406696),
    ],
)
def test_golden(settings: dict[str, Any], loss: float, make_case: MakeCase) -> None:
    out, _ = run(make_case, **settings)
    assert float(out.per_group.mean().detach()) == pytest.approx(loss, abs=1e-6)
    assert float(out.metrics["diffusion_kto/reference_point"]) == pytest.approx(0 if "reference_point" in settings else 0.004 / 3, abs=1e-9)


def test_gradient_leaves_the_reference_point_out(make_case: MakeCase) -> None:
    out, errors = run(make_case)
    out.per_group.mean().backward()
    assert errors.grad is not None
    assert errors.grad.tolist() == pytest.approx([6.945431, -7.767742, 8.106072], abs=5.1e-7)  # six decimals are given
    z_0 = max(0.0, sum(r - p for p, r in zip(POLICY, REFERENCE, strict=True)) / 3)
    signs = [2 * y - 1 for y in LABELS]
    h = [1 / (1 + math.exp(-100 * y * (r - p - z_0))) for y, p, r in zip(signs, POLICY, REFERENCE, strict=True)]
    assert errors.grad.tolist() == pytest.approx([100 * y * x * (1 - x) / 3 for y, x in zip(signs, h, strict=True)], rel=1e-12)


def test_reference_point_is_not_below_zero(make_case: MakeCase) -> None:
    out, _ = run(make_case, [e + 0.02 for e in POLICY])
    assert float(out.metrics["diffusion_kto/reference_point"]) == 0
    assert float(out.per_group.mean().detach()) == pytest.approx(0.571494, abs=1e-6)


@pytest.mark.parametrize("value_function", ["sigmoid", "loss_averse", "risk_seeking"])
def test_gradient_agrees_with_finite_differences(value_function: str, make_case: MakeCase) -> None:
    policy = [e + 0.02 for e in POLICY]  # where the reference point is 0, and stays there

    def loss(errors: list[float]) -> tuple[Tensor, Tensor]:
        out, leaf = run(make_case, errors, value_function=value_function)
        return out.per_group.mean(), leaf

    value, leaf = loss(policy)
    value.backward()
    assert leaf.grad is not None
    for i in range(3):
        up, down = (float(loss([e + s * 1e-6 * (k == i) for k, e in enumerate(policy)])[0].detach()) for s in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(float(leaf.grad[i]), rel=1e-6)


def test_the_opposite_label_turns_the_sign(make_case: MakeCase) -> None:
    values = torch.tensor([e + 0.02 for e in POLICY], dtype=torch.float64).sqrt().reshape(3, 1, 1, 1, 1)
    reference = torch.tensor(REFERENCE, dtype=torch.float64).sqrt().reshape(3, 1, 1, 1, 1)
    labels = torch.tensor(LABELS, dtype=torch.float64)[:, None]
    there, back = (
        DiffusionKTO(beta=200.0).loss(*make_case(values, reference, 0 * reference, relevance=x)).per_group for x in (labels, 1 - labels)
    )
    assert torch.logit(there).abs().min() > 0.1
    torch.testing.assert_close(torch.logit(back), -torch.logit(there), rtol=1e-12, atol=0)  # of 1 - sigmoid(v), which is sigmoid(-v)


def test_weights_scale_their_label(make_case: MakeCase) -> None:
    plain, weighted = run(make_case)[0].per_group, run(make_case, desirable_weight=2.0, undesirable_weight=0.5)[0].per_group
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 0.5, 2.0]), rtol=1e-12, atol=0)


def test_a_label_that_is_absent_does_not_enter_the_class_means(make_case: MakeCase) -> None:
    x = torch.ones(2, 1, 1, 1, 1, dtype=torch.float64)
    case = make_case(0.5 * x, x, 0 * x, relevance=torch.ones(2, 1, dtype=torch.float64))
    out = DiffusionKTO(reference_point="class_means").loss(*case)
    assert float(out.metrics["diffusion_kto/reference_point"]) == pytest.approx(0.75)
    assert out.per_group.tolist() == [0.5, 0.5]


def test_a_pair_is_one_good_and_one_bad_image(make_case: MakeCase) -> None:
    maker = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 3, 2, 1, 2, 2, dtype=torch.float64, generator=maker)
    target = torch.zeros_like(policy)
    method = DiffusionKTO(beta=2)
    pairs = method.loss(*make_case(policy, reference, target)).per_group.mean()
    singles = (x.reshape(6, 1, 1, 2, 2) for x in (policy, reference, target))
    relevance = torch.tensor([1.0, 0.0] * 3, dtype=torch.float64)[:, None]
    torch.testing.assert_close(method.loss(*make_case(*singles, relevance=relevance)).per_group.mean(), pairs, rtol=1e-12, atol=0)


def test_a_batch_is_not_the_mean_of_its_images(make_case: MakeCase) -> None:
    # With its own mean as reference point every improved image would sit at v = 0; the batch tells them apart.
    out, _ = run(make_case)
    assert float(out.per_group[0].detach()) != pytest.approx(0.5, abs=1e-3)
    assert float(out.per_group[0].detach()) == pytest.approx(1 - 1 / (1 + math.exp(-0.866667)), abs=1e-6)


def test_a_single_image_is_refused(make_case: MakeCase) -> None:
    x = torch.ones(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="holds one image; raise train_batch_size"):
        DiffusionKTO().loss(*make_case(x, x, x))
