"""Anchors, the clip on rejected images, and how guards and group weights are put around a loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffpref.core.rewards import policy_error, reference_error
from diffpref.core.types import Evaluation, PreferenceBatch
from diffpref.guards import GUARDS, guarded
from diffpref.guards.anchors import WinnerAnchor, WinnerFloor
from diffpref.guards.rejected_clip import RejectedClip
from diffpref.guards.sdpo import SDPO
from diffpref.methods import DiffusionDPO, MaPO

Case = tuple[PreferenceBatch, list[Evaluation]]
DPO = DiffusionDPO(beta=20)


def test_the_registry_holds_exactly_these() -> None:
    assert {"sdpo": SDPO, "winner_anchor": WinnerAnchor, "winner_floor": WinnerFloor, "rejected_clip": RejectedClip} == GUARDS


@pytest.mark.parametrize("name", list(GUARDS))
def test_every_guard_keeps_the_shape_and_adds_a_metric(name: str, many: Case) -> None:
    plain, out = DPO.loss(*many), GUARDS[name]()(DPO.loss)(*many)
    assert out.per_group.shape == (6,)
    (own,) = out.metrics.keys() - plain.metrics.keys()
    assert own.startswith(f"{name}/")
    assert not out.metrics[own].requires_grad
    (g,) = torch.autograd.grad(out.per_group.mean(), many[1][0].policy)
    assert g.isfinite().all()


@pytest.mark.parametrize(("weight", "loss"), [(0.0, 0.275081), (0.1, 0.280081), (1.0, 0.325081)])
def test_winner_anchor(weight: float, loss: float, worked: Case) -> None:
    assert float(WinnerAnchor(anchor_weight=weight)(DPO.loss)(*worked).per_group.detach()) == pytest.approx(loss, abs=1e-6)


def test_winner_floor(worked: Case) -> None:
    # The chosen image is 0.01 worse than under the reference.
    assert float(WinnerFloor(floor_weight=3)(DPO.loss)(*worked).per_group.detach()) == pytest.approx(0.275081 + 0.03, abs=1e-6)
    batch, (e,) = worked
    assert e.reference is not None
    better = [replace(e, policy=e.reference, reference=e.policy.detach())]
    assert torch.equal(WinnerFloor()(DPO.loss)(batch, better).per_group, DPO.loss(batch, better).per_group)
    with pytest.raises(ValueError, match="guard winner_floor compares with the reference, but the method has none"):
        WinnerFloor()(MaPO().loss)(batch, [replace(e, reference=None)])


def test_rejected_clip(many: Case) -> None:
    batch, (e,) = many
    ratio = 1.05
    m, r = policy_error([e]).detach(), reference_error([e])
    beyond = m[:, 1] > ratio * r[:, 1]
    single = [replace(e, policy=e.policy[:, :1])]
    with pytest.raises(ValueError, match="guard rejected_clip needs pairs, but groups have 1 images; leave the guard out"):
        RejectedClip()(DPO.loss)(batch, single)
    assert beyond.any()
    assert not beyond.all()
    method = DiffusionDPO(beta=3)
    out = RejectedClip(clip_ratio=ratio)(method.loss)(batch, [e])
    clipped = torch.minimum(m[:, 1], ratio * r[:, 1])
    expected = torch.log1p(torch.exp(-1.5 * ((r[:, 0] - m[:, 0]) - (r[:, 1] - clipped))))
    torch.testing.assert_close(out.per_group.detach(), expected, rtol=1e-12, atol=0)
    assert float(out.metrics["rejected_clip/share"]) == pytest.approx(float(beyond.float().mean()))
    (g,) = torch.autograd.grad(out.per_group.sum(), e.policy)
    assert float(g[beyond, 1].abs().max()) == 0
    assert (g[~beyond, 1].flatten(1).norm(dim=1) > 0).all()
    assert (g[:, 0].flatten(1).norm(dim=1) > 0).all()


def test_rejected_clip_needs_a_reference_or_its_error(many: Case) -> None:
    batch, (e,) = many
    stored = replace(e, reference=None, reference_error=reference_error([e]))
    guard, method = RejectedClip(clip_ratio=1.05), DiffusionDPO(beta=3)
    torch.testing.assert_close(guard(method.loss)(batch, [stored]).per_group, guard(method.loss)(batch, [e]).per_group, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="guard rejected_clip compares with the reference, but the method has none"):
        guard(MaPO().loss)(batch, [replace(e, reference=None)])


def test_group_weights_multiply_the_loss(worked: Case) -> None:
    batch, evals = worked
    assert torch.equal(guarded(DPO.loss)(batch, evals).per_group, DPO.loss(batch, evals).per_group)
    weighted = replace(batch, weight=torch.tensor([2.0]))
    assert float(guarded(DPO.loss)(weighted, evals).per_group.detach()) == pytest.approx(0.550161, abs=1e-6)


def test_guards_are_worn_in_their_order_and_weights_come_last(worked: Case) -> None:
    batch, evals = worked
    out = guarded(DPO.loss, [SDPO(mu=0.4), WinnerAnchor(anchor_weight=1)])(replace(batch, weight=torch.tensor([0.5])), evals)
    assert float(out.per_group.detach()) == pytest.approx(0.5 * 0.325081, abs=1e-6)
    assert {"sdpo/factor", "winner_anchor/term"} <= out.metrics.keys()
    (g,) = torch.autograd.grad(out.per_group.sum(), evals[0].policy)
    assert g[0, 1].flatten().tolist() == pytest.approx([0.5 * 0.288587, -0.5 * 0.577174], abs=1e-6)
    assert g[0, 0].flatten().tolist() == pytest.approx([0.5 * (0.240489 + 0.1), 0.5 * (0.721467 + 0.3)], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("winner_anchor", "anchor_weight", -1.0), ("winner_floor", "floor_weight", math.nan), ("rejected_clip", "clip_ratio", 0.9)],
)
def test_settings_are_checked(name: str, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        GUARDS[name](**{key: value})
