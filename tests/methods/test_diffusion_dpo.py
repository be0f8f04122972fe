"""Diffusion-DPO against golden numbers of the authors' loss lines, and its invariants in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.sft import SFT

Case = tuple[PreferenceBatch, list[Evaluation]]
MakeCase = Callable[..., Case]
LOG_TWO = math.log(2)


def rows(*values: list[float]) -> Tensor:
    """Images of two elements as one pair (1, 2, 1, 1, 2)."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None]


TARGET = rows([0.5, -1.0], [0.5, -1.0])
POLICY = rows([0.4, -0.9], [0.3, -1.4])
REFERENCE = rows([0.35, -0.85], [0.35, -1.3])


def margin(out: LossOutput) -> float:
    """The logit of a single pair."""
    return float(out.metrics["rewards/margins"])


@pytest.mark.parametrize(
    ("beta", "logit", "loss"), [(50.0, 1.40625, 0.219184154634), (2000.0, 56.25, 3.723363e-25)], ids=["beta 50", "beta 2000"]
)
def test_case_a(beta: float, logit: float, loss: float, make_case: MakeCase) -> None:
    out = DiffusionDPO(beta=beta).loss(*make_case(POLICY, REFERENCE, TARGET))
    assert margin(out) == pytest.approx(logit, rel=1e-9)
    assert float(out.per_group) == pytest.approx(loss, rel=1e-6 if beta == 2000 else 1e-9)
    named = {
        name: float(out.metrics[f"error/{name}"]) for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    }
    expected = {"policy_chosen": 0.01, "policy_rejected": 0.1, "reference_chosen": 0.0225, "reference_rejected": 0.05625}
    assert named == pytest.approx(expected, rel=1e-9)


def test_case_a_swapped(make_case: MakeCase) -> None:
    out = DiffusionDPO(beta=50).loss(*make_case(POLICY.flip(1), REFERENCE.flip(1), TARGET))
    assert margin(out) == pytest.approx(-1.40625, rel=1e-9)
    assert float(out.per_group) == pytest.approx(1.625434154634, rel=1e-9)


@pytest.mark.parametrize("beta", [50.0, 2000.0, 5000.0])
def test_case_a_with_policy_equal_to_reference(beta: float, make_case: MakeCase) -> None:
    policy = REFERENCE.clone().requires_grad_()
    out = DiffusionDPO(beta=beta).loss(*make_case(policy, REFERENCE, TARGET))
    assert float(out.per_group.detach()) == pytest.approx(0.693147180560, rel=1e-12)
    assert margin(out) == 0
    assert float(out.metrics["rewards/accuracies"]) == 0.5
    out.per_group.sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().min() > 0


def test_case_a_gradients(make_case: MakeCase) -> None:
    policy = POLICY.clone().requires_grad_()
    DiffusionDPO(beta=50).loss(*make_case(policy, REFERENCE, TARGET)).per_group.sum().backward()
    expected = rows([-0.492065509, 0.492065509], [0.984131018, 1.968262036])
    torch.testing.assert_close(policy.grad, expected, rtol=1e-8, atol=0)


def test_case_a_in_float32(make_case: MakeCase) -> None:
    out = DiffusionDPO(beta=50).loss(*make_case(POLICY.float(), REFERENCE.float(), TARGET.float()))
    assert float(out.per_group) == pytest.approx(0.219184154634, rel=2e-5)


def test_case_a2(make_case: MakeCase) -> None:
    # Listed with both chosen images first, then both rejected ones.
    listed = (torch.arange(16, dtype=torch.float64) / 10 - 0.7).reshape(2, 2, 2, 1, 2).transpose(0, 1)
    target = torch.tensor([0.3, -0.1, 0.2, -0.6], dtype=torch.float64).reshape(1, 1, 2, 1, 2).expand(2, 2, -1, -1, -1)
    out = DiffusionDPO(beta=40).loss(*make_case(listed, 0.9 * listed + 0.02, target))
    assert float(out.per_group.mean()) == pytest.approx(0.924707658890, rel=1e-9)
    assert margin(out) == pytest.approx((-1.328 + 1.104) / 2, rel=1e-9)
    assert float(out.metrics["rewards/accuracies"]) == 0.5
    for name, pair in {"policy_chosen": (0.445, 0.205), "reference_rejected": (0.27365, 0.61565)}.items():
        assert float(out.metrics[f"error/{name}"]) == pytest.approx(sum(pair) / 2, rel=1e-9)


def test_sft_on_the_chosen_image_of_case_a(make_case: MakeCase) -> None:
    out = SFT().loss(*make_case(POLICY[:, :1], REFERENCE[:, :1], TARGET[:, :1]))
    assert out.per_group.tolist() == pytest.approx([0.01], rel=1e-9)
    assert float(out.metrics["error/policy_chosen"]) == pytest.approx(0.01, rel=1e-9)


def test_swapping_adds_the_logit(random_case: Callable[..., Case]) -> None:
    method = DiffusionDPO(beta=3)
    batch, (e,) = random_case(1, 2)
    step = replace(e.step, target=e.step.target.flip(1))
    assert e.reference is not None
    swapped = method.loss(batch, [Evaluation(step, e.policy.flip(1), e.reference.flip(1))])
    plain = method.loss(batch, [e])
    assert float(swapped.per_group.detach()) == pytest.approx(float(plain.per_group.detach()) + margin(plain), rel=1e-12)


def test_identical_images_teach_nothing(make_case: MakeCase) -> None:
    image = torch.randn(1, 1, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = DiffusionDPO(beta=500).loss(*make_case(image.expand(1, 2, -1, -1, -1), REFERENCE[:, :1].expand(1, 2, -1, -1, -1), TARGET))
    assert margin(out) == 0
    assert float(out.per_group.detach()) == pytest.approx(LOG_TWO, rel=1e-15)
    out.per_group.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().max() < 1e-12


def test_the_logit_is_linear_in_beta_and_vanishes_with_it(random_case: Callable[..., Case]) -> None:
    case = random_case(1, 2)
    at_one = margin(DiffusionDPO(beta=1).loss(*case))
    assert margin(DiffusionDPO(beta=7).loss(*case)) == pytest.approx(7 * at_one, rel=1e-12)
    out = DiffusionDPO(beta=1e-12).loss(*case)
    assert float(out.per_group.detach()) == pytest.approx(LOG_TWO, rel=1e-10)
    out.per_group.sum().backward()
    gradient = case[1][0].policy.grad
    assert gradient is not None
    assert gradient.abs().max() < 1e-11


def test_descent_widens_the_gap_between_the_errors(random_case: Callable[..., Case]) -> None:
    batch, (e,) = random_case(1, 2)
    method = DiffusionDPO(beta=2)
    before = method.loss(batch, [e])
    before.per_group.sum().backward()
    assert e.policy.grad is not None
    after = method.loss(batch, [replace(e, policy=e.policy.detach() - 1e-3 * e.policy.grad)]).metrics
    assert after["error/policy_chosen"] < before.metrics["error/policy_chosen"]
    assert after["error/policy_rejected"] > before.metrics["error/policy_rejected"]
    assert after["rewards/margins"] > before.metrics["rewards/margins"]


def test_soft_labels_are_a_mixture_of_both_orders(make_case: MakeCase) -> None:
    soft = DiffusionDPO(beta=50).loss(*make_case(POLICY, REFERENCE, TARGET, [0.7])).per_group
    assert float(soft) == pytest.approx(0.7 * 0.219184154634 + 0.3 * 1.625434154634, rel=1e-9)


def test_label_smoothing_is_a_softer_label(make_case: MakeCase) -> None:
    smoothed = DiffusionDPO(beta=50, label_smoothing=0.1)
    certain = smoothed.loss(*make_case(POLICY, REFERENCE, TARGET)).per_group
    soft = DiffusionDPO(beta=50).loss(*make_case(POLICY, REFERENCE, TARGET, [0.9])).per_group
    torch.testing.assert_close(certain, soft, rtol=1e-12, atol=0)
    tie = smoothed.loss(*make_case(POLICY, REFERENCE, TARGET, [0.5])).per_group
    torch.testing.assert_close(tie, DiffusionDPO(beta=50).loss(*make_case(POLICY, REFERENCE, TARGET, [0.5])).per_group, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta is {beta}"):
        DiffusionDPO(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5])
def test_label_smoothing_stays_below_one_half(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}"):
        DiffusionDPO(label_smoothing=smoothing)


def test_the_default_is_bit_for_bit_the_expression_of_the_paper(random_case: Callable[..., Case]) -> None:
    batch, (e,) = random_case(5, 2, torch.float32)
    assert e.reference is not None
    errors = [(x - e.step.target).pow(2).flatten(2).mean(-1) for x in (e.policy, e.reference.detach())]
    reward = 0.5 * 5000.0 * (errors[1] - errors[0])
    p = batch.relevance[:, 0]
    logit = reward[:, 0] - reward[:, 1]
    expected = -p * torch.nn.functional.logsigmoid(logit) - (1 - p) * torch.nn.functional.logsigmoid(-logit)
    assert torch.equal(DiffusionDPO().loss(batch, [e]).per_group, expected)
