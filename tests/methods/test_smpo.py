"""SmPO's smoothing: values of the authors' formula, its symmetries, and what it needs of the data. Its path: tests/paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from diffpref.core.scores import score_range
from diffpref.core.types import Evaluation, PreferenceBatch
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.recipes import RECIPES
from diffpref.methods.smpo import SmPO

Case = tuple[PreferenceBatch, list[Evaluation]]
LOW, HIGH = 0.11543526500463486, 0.28201571106910706


def scored(random_case: Callable[..., Case], *pairs: tuple[float, float]) -> Case:
    """Random pairs with scores of a scorer named "pickscore"."""
    batch, evals = random_case(len(pairs), 2)
    return replace(batch, scores={"pickscore": torch.tensor(pairs, dtype=torch.float64)}), evals


@pytest.mark.parametrize(
    ("scores", "probability", "coefficient"),
    [
        ((0.22, 0.21), 0.515003258503, 0.300065170063),
        ((0.225, 0.195), 0.544901996241, 0.898039924818),
        ((HIGH, LOW), 0.731058578630, 4.621171572600),
    ],
)
def test_probability_and_coefficient(
    scores: tuple[float, float], probability: float, coefficient: float, random_case: Callable[..., Case]
) -> None:
    method = SmPO(**RECIPES["smpo_pickscore"].settings)  # type: ignore[arg-type]
    batch, evals = scored(random_case, scores)
    assert float(method.probability(batch)) == pytest.approx(probability, abs=1e-12)
    assert float(method.loss(batch, evals).metrics["smpo/coefficient"]) == pytest.approx(coefficient, abs=1e-11)
    assert coefficient == pytest.approx(10 * math.tanh((scores[0] - scores[1]) / (2 * (HIGH - LOW))), abs=1e-11)
    moved = replace(batch, scores={"pickscore": batch.scores["pickscore"] + 3})
    assert float(method.probability(moved)) == pytest.approx(probability, abs=1e-12)
    turned = replace(batch, scores={"pickscore": batch.scores["pickscore"].flip(1)})
    assert float(method.probability(turned)) == pytest.approx(1 - probability, abs=1e-12)


def test_every_pair_has_its_own_probability(random_case: Callable[..., Case]) -> None:
    method = SmPO(beta=2, score="pickscore", score_min=0, score_max=1)
    batch, evals = scored(random_case, (0.9, 0.1), (0.2, 0.8), (0.5, 0.5))
    p = torch.sigmoid(torch.tensor([0.8, -0.6, 0.0], dtype=torch.float64))
    torch.testing.assert_close(method.probability(batch), p, rtol=1e-12, atol=0)
    margin = DiffusionDPO(beta=2)
    logits = 10 * (2 * p - 1)
    (e,) = evals
    assert e.reference is not None
    r = ((e.reference - e.step.target).square() - (e.policy - e.step.target).square()).flatten(2).mean(-1)
    torch.testing.assert_close(method.loss(batch, evals).per_group, torch.log1p(torch.exp(-logits * (r[:, 0] - r[:, 1]))))
    assert float(margin.loss(batch, evals).metrics["rewards/margins"]) == pytest.approx(float((r[:, 0] - r[:, 1]).mean().detach()))


def test_one_half_teaches_nothing(random_case: Callable[..., Case]) -> None:
    batch, (e,) = random_case(2, 2)
    tie = replace(batch, relevance=torch.full((2, 2), 0.5, dtype=torch.float64))
    loss = SmPO(score=None).loss(tie, [e]).per_group
    assert loss.tolist() == [pytest.approx(math.log(2), rel=1e-15)] * 2
    loss.sum().backward()
    assert e.policy.grad is not None
    assert e.policy.grad.abs().max() == 0


def test_certain_labels_and_gamma_one_are_diffusion_dpo(random_case: Callable[..., Case]) -> None:
    case = random_case(3, 2)
    plain = SmPO(beta=3, gamma=1, score=None).loss(*case).per_group
    torch.testing.assert_close(plain, DiffusionDPO(beta=3).loss(*case).per_group, rtol=1e-15, atol=0)


def test_order_of_the_pair_is_no_matter(random_case: Callable[..., Case]) -> None:
    batch, (e,) = random_case(3, 2)
    shares = torch.tensor([[0.8, 0.2], [0.4, 0.6], [1.0, 0.0]], dtype=torch.float64)
    assert e.reference is not None
    step = replace(e.step, target=e.step.target.flip(1), x_t=e.step.x_t.flip(1))
    turned = replace(e, step=step, policy=e.policy.flip(1), reference=e.reference.flip(1))
    there = SmPO(beta=2, score=None).loss(replace(batch, relevance=shares), [e]).per_group
    back = SmPO(beta=2, score=None).loss(replace(batch, relevance=shares.flip(1)), [turned]).per_group
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)


def test_missing_scores_are_named(random_case: Callable[..., Case]) -> None:
    with pytest.raises(ValueError, match="needs the score 'pickscore' of every image, but the data has score;"):
        SmPO(score="pickscore", score_min=0, score_max=1).loss(*random_case(1, 2))
    with pytest.raises(ValueError, match="score_min or score_max is not set"):
        SmPO(score="score").loss(*random_case(1, 2))


def test_a_constant_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'pickscore' are 0\.25 for every image"):
        score_range(torch.full((4, 2), 0.25), "pickscore")
    with pytest.raises(ValueError, match="constant score"):
        SmPO(score="pickscore", score_min=0.25, score_max=0.25)
    with pytest.raises(ValueError, match="name the scorer with score"):
        SmPO(score=None, score_min=0.1)


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        SmPO(**{name: 0.0})
