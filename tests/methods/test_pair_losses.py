"""The other pair losses on one worked pair, in float64, with the invariants of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods import DMPO, DPOP, DRO, DSPO, LCPO, METHODS, ODPO, DiffusionDPO
from diffpref.methods.sft import SFT

Case = tuple[PreferenceBatch, list[Evaluation]]
MakeCase = Callable[..., Case]
Pair = tuple[Tensor, Tensor, Tensor]
LOG_TWO = math.log(2)

pytestmark = pytest.mark.filterwarnings("ignore:method dro")


def on_pair(method: object, make_case: MakeCase, pair: Pair, **options: object) -> float:
    """The loss of a single pair."""
    out: LossOutput = method.loss(*make_case(*pair, **options))  # type: ignore[attr-defined]
    return float(out.per_group)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, 0.275081),
        ({"loss_type": "hinge"}, 0.0),
        ({"loss_type": "ipo"}, 0.001056),
        ({"loss_type": "ipo_diffusers"}, 4 * 0.00105625),
        ({"label_smoothing": 0.1}, 0.390081),
        ({"label_smoothing": 0.1, "loss_type": "robust"}, 0.131331),
    ],
)
def test_loss_types(settings: dict[str, object], loss: float, make_case: MakeCase, fixture_p: Pair) -> None:
    assert on_pair(DiffusionDPO(beta=20, **settings), make_case, fixture_p) == pytest.approx(loss, abs=1e-6)  # type: ignore[arg-type]


def test_hinge_below_its_corner(make_case: MakeCase, fixture_p: Pair) -> None:
    assert on_pair(DiffusionDPO(beta=20 * 0.4 / 1.15, loss_type="hinge"), make_case, fixture_p) == pytest.approx(0.6, abs=1e-6)


def test_ipo_of_the_diffusers_script(make_case: MakeCase) -> None:
    def pair(*values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[None, :, None, None]

    case = pair([0.4, -0.9], [0.3, -1.4]), pair([0.35, -0.85], [0.35, -1.3]), pair([0.5, -1.0], [0.5, -1.0])
    assert on_pair(DiffusionDPO(beta=50, loss_type="ipo_diffusers"), make_case, case) == pytest.approx(0.0013140625, abs=1e-12)
    assert on_pair(DiffusionDPO(beta=50, loss_type="ipo"), make_case, case) == pytest.approx(0.0013140625 / 4, abs=1e-12)
    assert on_pair(DiffusionDPO(beta=50, loss_type="hinge"), make_case, case) == 0
    assert on_pair(DiffusionDPO(beta=50), make_case, case) == pytest.approx(0.219184154634, abs=1e-12)


def test_gradients_of_the_plain_loss(make_case: MakeCase, fixture_p: Pair) -> None:
    policy, reference, target = fixture_p
    policy = policy.clone().requires_grad_()
    DiffusionDPO(beta=20).loss(*make_case(policy, reference, target)).per_group.sum().backward()
    assert policy.grad is not None
    assert policy.grad.flatten().tolist() == pytest.approx([0.240489, 0.721467, 0.721467, -1.442934], abs=1e-6)


def test_dmpo(make_case: MakeCase, fixture_p: Pair) -> None:
    assert on_pair(DMPO(beta=20, alpha=0.01), make_case, fixture_p) == pytest.approx(0.563483, abs=1e-6)
    at_optimum = 20 * math.log(99) / 1.15
    assert on_pair(DMPO(beta=at_optimum), make_case, fixture_p) == pytest.approx(0, abs=1e-12)
    assert on_pair(DMPO(beta=20), make_case, fixture_p, probability=[0.0]) > on_pair(DMPO(beta=20), make_case, fixture_p)
    with pytest.raises(ValueError, match="alpha is 0"):
        DMPO(alpha=0.0)


@pytest.mark.parametrize(("beta", "loss"), [(0.0, 0.05), (0.001, 0.049990), (0.05, 0.049507), (20.0, 0.185144)])
def test_dspo(beta: float, loss: float, make_case: MakeCase, fixture_p: Pair) -> None:
    assert on_pair(DSPO(beta=beta), make_case, fixture_p) == pytest.approx(loss, abs=1e-6)


def test_dspo_gradients_and_its_neighbours(make_case: MakeCase, fixture_p: Pair) -> None:
    policy, reference, target = fixture_p
    leaf = policy.clone().requires_grad_()
    DSPO(beta=0.05).loss(*make_case(leaf, reference, target)).per_group.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.flatten().tolist() == pytest.approx([0.099937, 0.290075, -0.000002, 0.000004], abs=1e-6)
    plain = float(SFT().loss(*make_case(policy, reference, target)).per_group)
    assert on_pair(DSPO(beta=0), make_case, fixture_p) == pytest.approx(plain, rel=1e-12)
    assert on_pair(DSPO(beta=7), make_case, (reference, reference, target)) == pytest.approx(0.04, rel=1e-12)


def test_dspo_as_released_for_sdxl(make_case: MakeCase, fixture_p: Pair) -> None:
    policy, reference, target = fixture_p
    assert on_pair(DSPO(beta=20, form="sdxl_release"), make_case, fixture_p) == pytest.approx(0.057835, abs=1e-6)
    far = reference.clone()
    far[0, 0] = torch.tensor([1.2, -0.8], dtype=torch.float64)
    assert on_pair(DSPO(beta=2, form="sdxl_release"), make_case, (policy, far, target)) == pytest.approx(0.031986, abs=1e-6)


def test_dro(make_case: MakeCase, fixture_p: Pair, random_case: Callable[..., Case]) -> None:
    assert on_pair(DRO(), make_case, fixture_p) == pytest.approx(-0.175, abs=1e-12)
    batch, (e,) = random_case(3, 1)
    labels = replace(batch, relevance=torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64))
    error = SFT().loss(batch, [e]).per_group
    torch.testing.assert_close(DRO().loss(labels, [e]).per_group, error * torch.tensor([1.0, -1.0, -1.0]), rtol=1e-12, atol=0)
    with pytest.warns(UserWarning, match="no lower bound"):
        DRO()


def test_odpo_asks_clear_pairs_for_a_larger_margin(make_case: MakeCase, fixture_p: Pair) -> None:
    scores = {"quality": torch.tensor([[0.9, 0.4]], dtype=torch.float64)}
    offset = on_pair(ODPO(beta=20, alpha=2, score="quality"), make_case, fixture_p, scores=scores)
    assert offset == pytest.approx(math.log1p(math.exp(-(1.15 - 1.0))), rel=1e-12)
    assert on_pair(ODPO(beta=20, alpha=0, score="quality"), make_case, fixture_p, scores=scores) == pytest.approx(0.275081, abs=1e-6)
    with pytest.raises(ValueError, match="needs the score 'quality'"):
        on_pair(ODPO(score="quality"), make_case, fixture_p)


def test_dpop_holds_the_chosen_image(make_case: MakeCase, fixture_p: Pair) -> None:
    # The chosen image is 0.01 worse than under the reference.
    loss = on_pair(DPOP(beta=20, penalty=3), make_case, fixture_p)
    assert loss == pytest.approx(math.log1p(math.exp(-10 * (0.115 - 3 * 0.01))), rel=1e-12)
    assert on_pair(DPOP(beta=20, penalty=0), make_case, fixture_p) == pytest.approx(0.275081, abs=1e-6)
    policy, reference, target = fixture_p
    better = reference, policy, target  # the chosen image improved: no penalty
    plain = on_pair(DiffusionDPO(beta=20), make_case, better)
    assert on_pair(DPOP(beta=20, penalty=3), make_case, better) == pytest.approx(plain, rel=1e-12)


def test_lcpo(make_case: MakeCase, fixture_p: Pair) -> None:
    policy, reference, target = fixture_p
    assert on_pair(LCPO(beta=20), make_case, fixture_p) == pytest.approx(0.314165, abs=1e-6)
    swapped = policy.flip(1), reference.flip(1), target
    assert on_pair(LCPO(beta=20), make_case, swapped) == pytest.approx(1.126358, abs=1e-6)
    out = LCPO(beta=20).loss(*make_case(*fixture_p))
    assert float(out.metrics["lcpo/confidence"]) == pytest.approx(0.966014, abs=1e-6)
    column = {"reliability": torch.full((1, 2), 0.5, dtype=torch.float64)}
    leaf = policy.clone().requires_grad_()
    nothing = LCPO(beta=20).loss(*make_case(leaf, reference, target, scores=column))
    assert float(nothing.metrics["lcpo/confidence"]) == pytest.approx(0.759511, abs=1e-6)
    nothing.per_group.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-15


SETTINGS = {
    "diffusion_dpo": [("beta", -1.0)],
    "dmpo": [("beta", 0.0), ("alpha", 0.5)],
    "dpop": [("beta", 0.0), ("penalty", -1.0)],
    "dspo": [("beta", -1.0)],
    "inversion_dpo": [("beta", 0.0)],
    "lcpo": [("beta", 0.0), ("reliability", 0.5), ("reliability", 1.0)],
    "lipo": [("beta", 0.0)],
    "odpo": [("beta", 0.0), ("alpha", -1.0)],
    "rank_dpo": [("beta", 0.0)],
    "diffusion_kto": [("beta", 0.0), ("desirable_weight", 0.0), ("undesirable_weight", -1.0)],
}


@pytest.mark.parametrize(("name", "key", "value"), [(m, k, v) for m, pairs in SETTINGS.items() for k, v in pairs])
def test_settings_are_checked(name: str, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        METHODS[name](**{key: value})


def test_pair_methods_refuse_lists(random_case: Callable[..., Case]) -> None:
    with pytest.raises(ValueError, match="groups have 3 images, but this method compares pairs"):
        DiffusionDPO().loss(*random_case(2, 3))
