"""What holds for every method and every form of it; a new one must be named here, with an instance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.links import reverse_kl
from diffpref.core.lists import ranks
from diffpref.core.rewards import policy_error
from diffpref.core.types import Evaluation, PreferenceBatch
from diffpref.methods import METHODS, Method

Case = tuple[PreferenceBatch, list[Evaluation]]
LOG_TWO = math.log(2)

pytestmark = pytest.mark.filterwarnings("ignore:method dro", "ignore:sign is official")


def constant(value: float) -> Callable[[PreferenceBatch, Evaluation], Tensor]:
    """The same loss for every group."""
    return lambda batch, _: torch.full((len(batch.relevance),), value, dtype=torch.float64)


def own_error(batch: PreferenceBatch, e: Evaluation) -> Tensor:
    """The plain error of the chosen image."""
    return policy_error([e])[:, 0]


def error_gap(batch: PreferenceBatch, e: Evaluation) -> Tensor:
    """Error of the chosen minus that of the rejected image."""
    return own_error(batch, e) - policy_error([e])[:, 1]


def margin_asked(batch: PreferenceBatch, e: Evaluation) -> Tensor:
    """Softplus of the score gap."""
    return torch.log1p(torch.exp(batch.scores["score"][:, 0] - batch.scores["score"][:, 1]))


def rank_weights(batch: PreferenceBatch, e: Evaluation) -> Tensor:
    """log 2 times the sum of the weights of all pairs."""
    gain, discount = 2**batch.relevance - 1, 1 / torch.log1p(ranks(batch.relevance).double())
    pairs = [(i, j) for i in range(gain.shape[1]) for j in range(i)]
    return LOG_TWO * sum((gain[:, i] - gain[:, j]).abs() * (discount[:, i] - discount[:, j]).abs() for i, j in pairs)


@dataclass(frozen=True)
class Form:
    """A method with hyper-parameters under which a random policy has a gradient worth looking at."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    images: int = 2
    at_reference: Callable[[PreferenceBatch, Evaluation], Tensor] | None = None  # loss where policy = reference, if it has one
    of_batch: bool = False


DMPO_AT_ZERO = float(reverse_kl(torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.99, dtype=torch.float64)))
FORMS = {
    "dense_reward": Form("dense_reward", {"beta": 2.0, "log_ratio_range": 9.0}, 3, constant(math.log(6))),
    "diffusion_dpo": Form("diffusion_dpo", {"beta": 2.0}, at_reference=constant(LOG_TWO)),
    "smoothed": Form("diffusion_dpo", {"beta": 2.0, "label_smoothing": 0.1}, at_reference=constant(LOG_TWO)),
    "hinge": Form("diffusion_dpo", {"beta": 0.5, "loss_type": "hinge"}, at_reference=constant(1.0)),
    "ipo": Form("diffusion_dpo", {"beta": 2.0, "loss_type": "ipo"}, at_reference=constant(1 / 16)),
    "ipo_diffusers": Form("diffusion_dpo", {"beta": 2.0, "loss_type": "ipo_diffusers"}, at_reference=constant(1 / 4)),
    "robust": Form("diffusion_dpo", {"beta": 2.0, "label_smoothing": 0.2, "loss_type": "robust"}, at_reference=constant(LOG_TWO)),
    "diffusion_kto": Form("diffusion_kto", {"beta": 2.0}, at_reference=constant(0.5), of_batch=True),
    "kto_averse": Form("diffusion_kto", {"beta": 2.0, "value_function": "loss_averse"}, 1, constant(1 + LOG_TWO), of_batch=True),
    "kto_seeking": Form("diffusion_kto", {"beta": 2.0, "value_function": "risk_seeking"}, 3, constant(1 - LOG_TWO), of_batch=True),
    "kto_classes": Form("diffusion_kto", {"beta": 2.0, "reference_point": "class_means"}, 2, constant(0.5), of_batch=True),
    "dmpo": Form("dmpo", {"beta": 2.0}, at_reference=constant(DMPO_AT_ZERO)),
    "dpop": Form("dpop", {"beta": 2.0, "penalty": 0.7}, at_reference=constant(LOG_TWO)),
    "dro": Form("dro", at_reference=error_gap),
    "dspo": Form("dspo", {"beta": 0.5}, at_reference=own_error),
    "dspo_sdxl": Form("dspo", {"beta": 0.5, "form": "sdxl_release"}, at_reference=constant(0.25)),
    "inversion_dpo": Form("inversion_dpo", {"beta": 2.0}, at_reference=constant(LOG_TWO)),
    "inversion_dpo_official": Form("inversion_dpo", {"beta": 2.0, "sign": "official"}, at_reference=constant(LOG_TWO)),
    "lcpo": Form("lcpo", {"beta": 2.0}, at_reference=constant(LOG_TWO)),
    "lipo": Form("lipo", {"beta": 2.0}, 3, rank_weights),  # at equal rewards the images rank as they stand, best first
    "list_mle": Form("lipo", {"beta": 2.0, "list_loss": "list_mle"}, 4, constant(math.log(24))),
    "list_softmax": Form("lipo", {"beta": 2.0, "list_loss": "softmax"}, 3, constant(math.log(3))),
    "list_logistic": Form("lipo", {"beta": 2.0, "list_loss": "logistic"}, 3, constant(3 * LOG_TWO)),
    "list_hinge": Form("lipo", {"beta": 0.1, "list_loss": "hinge"}, 4, constant(6.0)),
    "mapo": Form("mapo", {"snr": 2e-3}),
    "mapo_per_timestep": Form("mapo", {"snr": 2e-3, "snr_mode": "per_timestep"}),
    "odpo": Form("odpo", {"beta": 2.0}, at_reference=margin_asked),
    "rank_dpo": Form("rank_dpo", {"beta": 2.0}, 3, rank_weights),
    "dpop_hinge": Form("dpop", {"beta": 0.5, "loss_type": "hinge"}, at_reference=constant(1.0)),
    "inversion_hinge": Form("inversion_dpo", {"beta": 0.5, "loss_type": "hinge"}, at_reference=constant(1.0)),
    "lcpo_ipo": Form("lcpo", {"beta": 2.0, "loss_type": "ipo"}, at_reference=constant(1 / 16)),
    "odpo_ipo": Form("odpo", {"beta": 2.0, "alpha": 0.0, "loss_type": "ipo"}, at_reference=constant(1 / 16)),
    "smpo_hinge": Form("smpo", {"beta": 0.5, "gamma": 1.0, "score": None, "loss_type": "hinge"}, at_reference=constant(1.0)),
    "sft": Form("sft", images=1, at_reference=own_error),
    "spo": Form("spo", {"beta": 2.0, "clip_range": 0.0}, at_reference=constant(LOG_TWO)),  # the clip has tests of its own
    "smpo": Form("smpo", {"beta": 2.0, "gamma": 1.0, "score": None}, at_reference=constant(LOG_TWO)),
    "smpo_scores": Form(
        "smpo", {"beta": 2.0, "gamma": 5.0, "score": "score", "score_min": 0.0, "score_max": 1.0}, at_reference=constant(LOG_TWO)
    ),
}

each_form = pytest.mark.parametrize("name", list(FORMS))


def instance(name: str) -> Method:
    """A method that can be differentiated without saturating."""
    return METHODS[FORMS[name].method](**FORMS[name].settings)


def leaf(case: Case) -> Tensor:
    """The policy's prediction."""
    return case[1][0].policy


def mean_loss(method: Method, case: Case, policy: Tensor | None = None) -> Tensor:
    """The loss that training minimises."""
    batch, (evaluation,) = case
    return method.loss(batch, [evaluation if policy is None else replace(evaluation, policy=policy)]).per_group.mean()


def some(case: Case, rows: list[int]) -> Case:
    """Some groups of a case."""
    batch, (e,) = case
    step = replace(e.step, **{n: getattr(e.step, n)[rows] for n in ("x_t", "timesteps", "target", "weight", "log_snr")})
    part = replace(
        batch,
        latents=batch.latents[rows],
        relevance=batch.relevance[rows],
        cond=batch.cond.map(lambda x: x[rows]),
        scores={n: x[rows] for n, x in batch.scores.items()},
    )
    return part, [Evaluation(step, e.policy[rows], None if e.reference is None else e.reference[rows])]


def test_the_registry_holds_exactly_these() -> None:
    assert set(METHODS) == {form.method for form in FORMS.values()}
    assert len(METHODS) == 16


@pytest.mark.parametrize("name", list(METHODS))
def test_images_per_group_is_what_the_form_has(name: str) -> None:
    wanted = METHODS[name].images_per_group
    assert all(wanted in (None, form.images) for form in FORMS.values() if form.method == name)
    assert METHODS[name].needs_reference or not METHODS[name].needs_reference_prediction


@pytest.mark.parametrize("name", list(METHODS))
def test_every_hyper_parameter_can_be_a_flag(name: str) -> None:
    for f in fields(METHODS[name]):  # type: ignore[arg-type]
        assert f.kw_only
        assert f.default is None or isinstance(f.default, bool | int | float | str)


@each_form
def test_one_loss_per_group_and_detached_scalar_metrics(name: str, random_case: Callable[..., Case]) -> None:
    out = instance(name).loss(*random_case(3, FORMS[name].images))
    assert out.per_group.shape == (3,)
    assert out.per_group.requires_grad
    assert out.metrics
    assert all(x.ndim == 0 and not x.requires_grad and torch.isfinite(x) for x in out.metrics.values())


@each_form
def test_gradient_reaches_the_policy_and_not_the_reference(name: str, random_case: Callable[..., Case]) -> None:
    case = random_case(3, FORMS[name].images)
    mean_loss(instance(name), case).backward()
    gradient, reference = leaf(case).grad, case[1][0].reference
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(2).norm(dim=2) > 0).all()
    assert reference is not None
    assert reference.requires_grad
    assert reference.grad is None


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if not form.of_batch and form.method != "lcpo"])
def test_a_small_step_against_the_gradient_lowers_the_loss(name: str, random_case: Callable[..., Case]) -> None:
    # Left out are losses of which a part follows the policy without gradient.
    method, case = instance(name), random_case(3, FORMS[name].images)
    before = mean_loss(method, case)
    before.backward()
    policy = leaf(case)
    assert policy.grad is not None
    after = mean_loss(method, case, policy.detach() - 1e-3 * policy.grad)
    assert after < before
    expected = 1e-3 * policy.grad.pow(2).sum()
    torch.testing.assert_close(before.detach() - after, expected, rtol=2e-2, atol=0)


@each_form
def test_a_batch_is_its_groups_one_by_one_in_any_order(name: str, random_case: Callable[..., Case]) -> None:
    method, case = instance(name), random_case(4, FORMS[name].images)
    whole = method.loss(*case).per_group
    torch.testing.assert_close(method.loss(*some(case, [2, 0, 3, 1])).per_group, whole[[2, 0, 3, 1]], rtol=1e-12, atol=1e-12)
    if not FORMS[name].of_batch:
        singles = torch.cat([method.loss(*some(case, [g])).per_group for g in range(4)])
        torch.testing.assert_close(whole, singles, rtol=1e-12, atol=1e-12)


@each_form
def test_the_documented_value_where_policy_equals_reference(name: str, random_case: Callable[..., Case]) -> None:
    batch, (e,) = random_case(3, FORMS[name].images)
    expected = FORMS[name].at_reference
    assert (expected is None) == (FORMS[name].method == "mapo"), "only MaPO neither has a reference nor a fixed value"
    if expected is None:
        return
    assert e.reference is not None
    same = replace(e, policy=e.reference.detach())
    torch.testing.assert_close(instance(name).loss(batch, [same]).per_group, expected(batch, same), rtol=1e-12, atol=1e-12)


@each_form
def test_float32_is_close_to_float64(name: str, random_case: Callable[..., Case]) -> None:
    images = FORMS[name].images
    exact = instance(name).loss(*random_case(4, images)).per_group
    single = instance(name).loss(*random_case(4, images, torch.float32)).per_group
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=2e-5)


@each_form
def test_half_precision_predictions_give_a_float32_loss(name: str, random_case: Callable[..., Case]) -> None:
    out = instance(name).loss(*random_case(2, FORMS[name].images, torch.bfloat16))
    assert out.per_group.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in out.metrics.values())


@each_form
def test_what_a_method_declares_is_what_it_uses(name: str, random_case: Callable[..., Case]) -> None:
    method, (batch, (e,)) = instance(name), random_case(2, FORMS[name].images)
    bare = [replace(e, reference=None)]
    if not method.needs_reference:
        torch.testing.assert_close(method.loss(batch, bare).per_group, method.loss(batch, [e]).per_group, rtol=0, atol=0)
        return
    with pytest.raises(AssertionError, match="reference"):
        method.loss(batch, bare)
    if not method.needs_reference_prediction:
        assert e.reference is not None
        known = (e.reference - e.step.target).detach().square().flatten(2).mean(-1)
        stored = [replace(e, reference=None, reference_error=known)]
        torch.testing.assert_close(method.loss(batch, stored).per_group, method.loss(batch, [e]).per_group, rtol=1e-12, atol=1e-12)


OF_DIFFERENCES = ("diffusion_dpo", "smoothed", "hinge", "ipo", "robust", "dmpo", "inversion_dpo", "lcpo", "odpo", "smpo", "smpo_scores")


@pytest.mark.parametrize("name", [*OF_DIFFERENCES, "dense_reward", "lipo", "list_mle", "list_softmax", "list_hinge", "rank_dpo"])
def test_rewards_of_all_images_may_be_shifted(name: str, random_case: Callable[..., Case]) -> None:
    method, (batch, (e,)) = instance(name), random_case(3, FORMS[name].images)
    assert e.reference is not None
    known = (e.reference - e.step.target).detach().square().flatten(2).mean(-1)
    there, shifted = (method.loss(batch, [replace(e, reference=None, reference_error=known + by)]).per_group for by in (0.0, 0.7))
    torch.testing.assert_close(shifted, there, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_margins_of_half_precision_predictions_are_close(name: str, random_case: Callable[..., Case]) -> None:
    def margin(dtype: torch.dtype) -> float:
        return float(instance(name).loss(*random_case(32, 2, dtype)).metrics["rewards/margins"])

    assert margin(torch.bfloat16) == pytest.approx(margin(torch.float32), rel=0.01)


MIXING = ("diffusion_dpo", "hinge", "ipo", "ipo_diffusers", "diffusion_kto", "dpop", "dro", "inversion_dpo", "lcpo", "mapo", "odpo")


@pytest.mark.parametrize("name", MIXING)
def test_two_orders_of_a_pair_mix_by_the_label(name: str, random_case: Callable[..., Case]) -> None:
    method, (batch, evals) = instance(name), random_case(2, 2)

    def labelled(probability: float) -> Tensor:
        relevance = torch.tensor([[probability, 1 - probability]], dtype=torch.float64).expand(2, 2)
        return method.loss(replace(batch, relevance=relevance), evals).per_group

    torch.testing.assert_close(labelled(0.3), 0.3 * labelled(1.0) + 0.7 * labelled(0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*MIXING, "smoothed", "robust", "dmpo", "smpo", "smpo_scores", "kto_classes"])
def test_a_turned_pair_with_the_opposite_label_is_the_same(name: str, random_case: Callable[..., Case]) -> None:
    method, (batch, (e,)) = instance(name), random_case(3, 2)
    relevance = torch.tensor([[0.8, 0.2], [0.35, 0.65], [1.0, 0.0]], dtype=torch.float64)
    assert e.reference is not None
    step = replace(e.step, target=e.step.target.flip(1), x_t=e.step.x_t.flip(1))
    turned = Evaluation(step, e.policy.flip(1), e.reference.flip(1))
    there = method.loss(replace(batch, relevance=relevance), [e]).per_group
    scores = {n: x.flip(1) for n, x in batch.scores.items()}
    back = method.loss(replace(batch, relevance=relevance.flip(1), scores=scores), [turned]).per_group
    torch.testing.assert_close(back, there, rtol=1e-12, atol=1e-14)
