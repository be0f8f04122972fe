"""SPO, TailorPO and Dense Reward on transitions: the authors' numbers, the density itself, and where gradients stop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffpref.core.policy import evaluate, predicted
from diffpref.core.process import DdpmProcess, like
from diffpref.core.rewards import implicit_rewards
from diffpref.core.types import Conditioning, Evaluation, PathStep, Predict, PreferenceBatch
from diffpref.methods import METHODS
from diffpref.methods.dense_reward import DenseReward
from diffpref.methods.spo import SPO
from diffpref.paths.recorded import transition_step

PROCESS = DdpmProcess.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
V_PROCESS = DdpmProcess(PROCESS.alphas_cumprod, "v_prediction")


def row(*values: float) -> Tensor:
    """Numbers as a latent (1, 1, 1, 1, n)."""
    return torch.tensor(values, dtype=torch.float64)[None, None, None, None]


def pair_of(x_t: Tensor, chosen: Tensor, rejected: Tensor, t: int, p: int, process: DdpmProcess = PROCESS) -> PathStep:
    """The step of one pair of samples of x_t."""
    levels = torch.full((len(x_t), 2), t), torch.full((len(x_t), 2), p)
    return transition_step(
        process, x_t.expand(-1, 2, -1, -1, -1), torch.cat([chosen, rejected], 1), *levels, shared_input=(True,) * len(x_t)
    )


def batch_of(step: PathStep) -> PreferenceBatch:
    """A batch that recorded this step."""
    groups = len(step.x_t)
    cond = Conditioning(torch.zeros(groups, 2, 1, 1, dtype=torch.float64))
    relevance = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(groups, 2)
    return PreferenceBatch(step.x_t, cond, relevance, ("",) * groups, (0,) * groups, steps=(step,))


def constant(prediction: Tensor) -> Predict:
    """A network that always says the same."""
    return lambda x_t, t, cond: prediction.expand_as(x_t)


# t, p, log p of policy and reference for chosen and rejected, loss, gradient with respect to the policy's prediction
GOLDEN = [
    (751, 701, (-0.345558471, -0.343163055, -0.360177414, -0.363878021), 0.724091745, (0.495929491, 0.826549152)),
    (501, 451, (-0.089298522, -0.086901006, -0.118977165, -0.123507314), 0.728385292, (0.565857767, 0.943096278)),
    (1, 0, (-4.030645445, -3.939995036, -16.573138413, -16.713264516), 2.004341527, (10.926865886, 20.184080756)),
]


@pytest.mark.parametrize("log_ratio", ["direct", "naive"])
@pytest.mark.parametrize(("t", "p", "log_p", "loss", "gradient"), GOLDEN)
def test_the_authors_numbers(t: int, p: int, log_p: tuple[float, ...], loss: float, gradient: tuple[float, float], log_ratio: str) -> None:
    policy = row(0.10, -0.20).requires_grad_()
    step = pair_of(row(0.2, -0.4), row(0.25, -0.30), row(0.10, -0.55), t, p)
    (seen,) = evaluate([step], batch_of(step).cond, constant(policy), constant(row(0.12, -0.25)))
    ratios, _ = implicit_rewards([seen], 1.0)
    expected = torch.tensor([[log_p[0] - log_p[1], log_p[2] - log_p[3]]], dtype=torch.float64)
    torch.testing.assert_close(ratios.detach(), expected, rtol=0, atol=3e-9)
    out = METHODS["spo"](log_ratio=log_ratio).loss(batch_of(step), [seen])
    assert float(out.per_group.detach()) == pytest.approx(loss, abs=1e-8)
    out.per_group.sum().backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, row(*gradient), rtol=1e-6, atol=0)
    assert float(out.metrics["spo/clipped"]) == (0.5 if t == 1 else 0.0)


def evaluated(log_ratios: list[list[float]]) -> Evaluation:
    """An evaluation with these log ratios."""
    ratios = torch.tensor(log_ratios, dtype=torch.float64)
    one = torch.ones(*ratios.shape, 1, 1, 1, dtype=torch.float64)
    step = PathStep(0 * one, torch.zeros(ratios.shape, dtype=torch.int64), 0 * one, torch.ones_like(ratios))
    policy = (4 - ratios).sqrt().reshape(one.shape).requires_grad_()
    return Evaluation(step, policy, 2 * one)


@pytest.mark.parametrize(
    ("ratios", "beta", "clip_range", "loss"),
    [
        ([0.03, -0.02], 10.0, 0.1, 0.474076984),
        ([0.3, -0.02], 10.0, 0.1, 0.274335513),
        ([0.3, -0.02], 1.0, 0.1, 0.637153),  # D3PO
        ([0.3, -0.02], 10.0, 0.0, math.log1p(math.exp(-3.2))),
        ([3.0, -9.0], 10.0, 0.1, 0.126131),  # the range of the clipped loss
        ([-9.0, 3.0], 10.0, 0.1, 2.132838),
    ],
)
def test_losses_of_given_ratios(ratios: list[float], beta: float, clip_range: float, loss: float) -> None:
    seen = evaluated([ratios])
    method = SPO(beta=beta, clip_range=clip_range)
    found = method.loss(batch_of(seen.step), [seen]).per_group
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
    swapped = evaluated([ratios[::-1]])
    back = method.loss(batch_of(swapped.step), [swapped])
    logit = -float(back.metrics["rewards/margins"])
    assert float(back.per_group.detach()) == pytest.approx(loss + logit, abs=1e-6)


def test_outside_the_band_there_is_no_gradient() -> None:
    for log_ratio in ("direct", "naive"):
        seen = evaluated([[0.2, -0.3]])
        SPO(log_ratio=log_ratio).loss(batch_of(seen.step), [seen]).per_group.sum().backward()  # type: ignore[arg-type]
        assert seen.policy.grad is not None
        assert float(seen.policy.grad.abs().max()) == 0


@pytest.mark.parametrize("process", [PROCESS, V_PROCESS], ids=["epsilon", "v"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_reward_is_the_log_density_of_the_sampler(process: DdpmProcess, eta: float) -> None:
    maker = torch.Generator().manual_seed(3)
    x_t, x_p, policy, reference = torch.randn(4, 3, 2, 2, 3, 4, generator=maker, dtype=torch.float64)
    t, p = torch.tensor([[951, 951], [501, 501], [1, 1]]), torch.tensor([[901, 901], [451, 451], [0, 0]])
    step = transition_step(process, x_t, x_p, t, p, eta=eta)
    found, _ = implicit_rewards([Evaluation(step, policy, reference)], 1.0)
    a, b, std = (like(c, x_t) for c in process.transition(t, p, eta))
    log_p = [Normal(a * x_t + b * e, std.expand_as(x_t)).log_prob(x_p).mean((2, 3, 4)) for e in (policy, reference)]
    torch.testing.assert_close(found, log_p[0] - log_p[1], rtol=1e-9, atol=1e-9)


def test_samples_of_one_input_differ_linearly() -> None:
    maker = torch.Generator().manual_seed(4)
    x_t, chosen, rejected, policy, reference = torch.randn(5, 2, 1, 2, 3, 4, generator=maker, dtype=torch.float64)
    step = pair_of(x_t, chosen, rejected, 301, 251)
    found, _ = implicit_rewards(evaluate([step], batch_of(step).cond, constant(policy), constant(reference)), 1.0)
    _, b, std = PROCESS.transition(torch.tensor(301), torch.tensor(251), 1.0)
    expected = (b * (policy - reference) * (chosen - rejected)).mean((2, 3, 4))[:, 0] / std**2
    torch.testing.assert_close(found[:, 0] - found[:, 1], expected, rtol=1e-10, atol=1e-12)


def test_a_shared_input_is_asked_once_and_means_the_same() -> None:
    maker = torch.Generator().manual_seed(5)
    x_t, chosen, rejected = torch.randn(3, 3, 1, 2, 3, 4, generator=maker, dtype=torch.float64)
    weights = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)
    asked: list[int] = []

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        asked.append(t.numel())
        return weights[0] * x.tanh() + weights[1] * x + cond.prompt_embeds.mean((2, 3))[..., None, None, None]  # type: ignore[union-attr]

    step = pair_of(x_t, chosen, rejected, 301, 251)
    losses, gradients = [], []
    for shared in ((True,) * 3, (), (False,) * 3, (True, False, True)):
        step = PathStep(**{**vars(step), "shared_input": shared, "guidance_scale": 3.0})
        weights.grad = None
        null = Conditioning(torch.ones(1, 1, 1, 1, dtype=torch.float64))
        seen = evaluate([step], batch_of(step).cond, network, torch.no_grad()(lambda x, t, c: 0.9 * network(x, t, c)), null)
        loss = SPO().loss(batch_of(step), seen).per_group
        loss.mean().backward()
        losses.append(loss.detach())
        gradients.append(weights.grad)
    assert asked == [6, 6, 12, 12, 12, 12, 8, 8]  # twice, for guidance
    for other in (1, 2, 3):
        torch.testing.assert_close(losses[0], losses[other], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients[0], gradients[other], rtol=1e-9, atol=0)
    assert predicted(step, batch_of(step).cond, network, null).shape == step.x_t.shape


def test_the_published_example_of_tailor_po() -> None:
    std = 0.5
    x_p = torch.cat([row(0.3, -0.2), row(-0.1, 0.4)], 1)
    step = PathStep(0 * x_p, torch.zeros(1, 2, dtype=torch.int64), x_p, torch.full((1, 2), 1 / (2 * std**2), dtype=torch.float64))
    policy = row(0.1, 0.0).expand(1, 2, 1, 1, 2).clone().requires_grad_()  # a mean, where a network would give a prediction
    out = SPO(beta=10.0, clip_range=0.0).loss(batch_of(step), [Evaluation(step, policy, torch.zeros_like(policy))])
    assert float(out.metrics["rewards/margins"]) == pytest.approx(0.8)
    assert float(out.per_group.detach()) == pytest.approx(0.371101, abs=1e-6)


def test_the_published_example_of_dense_reward() -> None:
    policy = torch.tensor([[-1.0, -1.0002, -0.9999], [-1.0003, -1.0001, -1.0]], dtype=torch.float64).T
    steps = [evaluated([(step + 1.0001).tolist()]) for step in policy]
    out = DenseReward(beta=10.0, log_ratio_range=1e-4).loss(batch_of(steps[0].step), steps)
    assert float(out.per_group.detach()) == pytest.approx(0.692981, abs=1e-6)
    assert float(out.metrics["rewards/margins"]) == pytest.approx(0.000333, abs=1e-6)


def test_dense_reward_clips_every_step_by_itself() -> None:
    steps = [evaluated([[0.2, 0.0001]]), evaluated([[0.0002, 0.0]])]
    DenseReward().loss(batch_of(steps[0].step), steps).per_group.sum().backward()
    gradients = [step.policy.grad.flatten().abs() > 0 for step in steps if step.policy.grad is not None]
    assert [g.tolist() for g in gradients] == [[False, True], [True, True]]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (SPO, {"beta": 0.0}, "beta is 0.0"),
        (SPO, {"clip_range": 1.0}, "clip_range is 1.0"),
        (DenseReward, {"log_ratio_range": 0.0}, "log_ratio_range is 0.0"),
    ],
)
def test_bad_settings_are_named(method: type, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**settings)
