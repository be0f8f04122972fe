"""RankDPO and LiPO on one worked list, and what they become for pairs. The authors' betas are without the half: ours is twice that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, PreferenceBatch
from diffpref.methods import DiffusionDPO, LiPO, RankDPO

Case = tuple[PreferenceBatch, list[Evaluation]]
MakeCase = Callable[..., Case]
GAINS, RELEVANCE = [0.02, -0.01, 0.01], [0.9, 0.5, 0.1]


def as_list(make_case: MakeCase, gains: list[float] = GAINS, relevance: list[float] = RELEVANCE) -> Case:
    """One list whose images have these reference errors minus policy errors."""
    policy = (1 - torch.tensor(gains, dtype=torch.float64)).sqrt().reshape(1, -1, 1, 1, 1)
    return make_case(policy, torch.ones_like(policy), torch.zeros_like(policy), relevance=torch.tensor([relevance], dtype=torch.float64))


def value(method: RankDPO | LiPO, case: Case) -> float:
    """The loss of one list."""
    return float(method.loss(*case).per_group)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (RankDPO(beta=100), 0.405033),
        (LiPO(beta=100), 0.351096),
        (LiPO(beta=100, list_loss="list_mle"), 1.917392),
        (LiPO(beta=100, list_loss="softmax"), 1.137464),
        (LiPO(beta=100, list_loss="logistic"), 1.988752),
        (LiPO(beta=100, list_loss="hinge"), 2.5),
    ],
    ids=lambda x: getattr(x, "list_loss", "rank_dpo") if not isinstance(x, float) else "",
)
def test_golden(method: RankDPO | LiPO, loss: float, make_case: MakeCase) -> None:
    assert value(method, as_list(make_case)) == pytest.approx(loss, abs=1e-6)


def test_pairs(make_case: MakeCase) -> None:
    pair = as_list(make_case, GAINS[:2], [1.0, 0.0])
    plain = float(DiffusionDPO(beta=100).loss(*pair).per_group)
    assert plain == pytest.approx(0.201413, abs=1e-6)
    factor = 1 / math.log(2) - 1 / math.log(3)
    assert factor == pytest.approx(0.532456, abs=1e-6)
    assert value(RankDPO(beta=100), pair) == pytest.approx(factor * plain, rel=1e-12)
    assert value(RankDPO(beta=100), pair) == pytest.approx(0.107244, abs=1e-6)
    for list_loss in ("list_mle", "logistic", "softmax"):
        assert value(LiPO(beta=100, list_loss=list_loss), pair) == pytest.approx(plain, rel=1e-12)  # type: ignore[arg-type]


FORMS: list[Any] = [RankDPO(beta=4), *(LiPO(beta=4, list_loss=x) for x in ("lambda", "list_mle", "softmax", "logistic", "hinge"))]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", FORMS, ids=lambda m: getattr(m, "list_loss", "rank_dpo"))
def test_order_and_a_common_shift_are_no_matter(method: Any, make_case: MakeCase) -> None:
    gains, relevance = [0.3, -0.2, 0.1, 0.25], [0.9, 0.2, 0.6, 0.0]
    plain = value(method, as_list(make_case, gains, relevance))
    turned = [2, 0, 3, 1]
    assert value(method, as_list(make_case, [gains[i] for i in turned], [relevance[i] for i in turned])) == pytest.approx(plain, rel=1e-12)
    assert value(method, as_list(make_case, [g + 0.2 for g in gains], relevance)) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("method", [m for m in FORMS if getattr(m, "list_loss", "") not in ("list_mle", "softmax")])
def test_ties_count_nothing(method: Any, make_case: MakeCase) -> None:
    assert value(method, as_list(make_case, GAINS, [0.4, 0.4, 0.4])) == 0


def test_tied_labels_rank_alike_in_any_order(make_case: MakeCase) -> None:
    there = value(RankDPO(beta=4), as_list(make_case, [0.3, -0.2, 0.1], [0.9, 0.5, 0.5]))
    back = value(RankDPO(beta=4), as_list(make_case, [0.3, 0.1, -0.2], [0.9, 0.5, 0.5]))
    assert there == pytest.approx(back, rel=1e-12)


def test_an_untouched_policy_has_a_gradient(make_case: MakeCase) -> None:
    reference = torch.ones(1, 3, 1, 1, 1, dtype=torch.float64)
    for method in FORMS:
        policy = reference.clone().requires_grad_()
        case = make_case(policy, reference, 0 * reference, relevance=torch.tensor([RELEVANCE], dtype=torch.float64))
        method.loss(*case).per_group.sum().backward()
        assert policy.grad is not None
        assert float(policy.grad.abs().max()) > 0.1


def test_lists_that_are_none_are_refused(make_case: MakeCase) -> None:
    x: Tensor = torch.ones(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="groups have 1 image, but a ranking needs at least two"):
        RankDPO().loss(*make_case(x, x, x))
    y = torch.ones(2, 3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"relevance is \(2, 2\) for \(2, 3\) images"):
        LiPO().loss(*make_case(y, y, y, relevance=torch.ones(2, 2)))
