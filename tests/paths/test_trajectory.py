"""The inversion trajectory and Inversion-DPO on it, against worked numbers of the released script and the consistent form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.policy import evaluate, two_pass_backward
from diffpref.core.process import DdpmProcess
from diffpref.core.rewards import policy_error
from diffpref.core.types import Conditioning, Evaluation, LossOutput, PathStep, Predict, PreferenceBatch
from diffpref.guards import SDPO, guarded
from diffpref.methods import DMPO, InversionDPO
from diffpref.paths.trajectory import InversionTrajectory

Pair = Callable[[float], PreferenceBatch]
Pairs = Callable[..., PreferenceBatch]
Toy = Callable[[Tensor], Predict]
LOG_TWO = math.log(2)
NULL = Conditioning(torch.zeros(1, 1, 1, 1, dtype=torch.float64))

pytestmark = pytest.mark.filterwarnings("ignore:eval_point is source", "ignore:sign is official")


def walk(path: InversionTrajectory, batch: PreferenceBatch, process: DdpmProcess, reference: Predict) -> tuple[PathStep, ...]:
    """The steps of a path."""
    return path(batch, process, batch.random(0), None, reference, NULL)


def loss_of(method: InversionDPO, batch: PreferenceBatch, steps: tuple[PathStep, ...], policy: Predict, reference: Predict) -> LossOutput:
    """The loss with the graphs of all steps alive."""
    return method.loss(batch, evaluate(steps, batch.cond, policy, reference, NULL))


GOLDEN = {
    4: (1.639943875e-05, 2.953053446e-05, -3.282773926e-04, 0.693311332727, 0.692983055334),
    8: (2.088490582e-05, 3.725589633e-05, -2.046373814e-04, 0.693249504485, 0.693044867104),
    80: (1.300860996e-04, 2.251223583e-04, -1.187953234e-04, 0.693206579986, 0.693087784662),
}


@pytest.mark.parametrize("num_steps", list(GOLDEN))
def test_released_form(num_steps: int, pair: Pair, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    batch = pair(1.0)
    steps = walk(InversionTrajectory(num_steps=num_steps, eval_point="source"), batch, process, reference)
    assert [int(s.timesteps[0, 0]) for s in steps] == [i * (1000 // num_steps) for i in range(num_steps)]
    d_chosen, d_rejected, logit, official, paper = GOLDEN[num_steps]
    distance = policy_error(evaluate(steps, batch.cond, policy, reference, NULL)) * num_steps
    assert distance[0].tolist() == pytest.approx([d_chosen, d_rejected], rel=1e-8)
    out = loss_of(InversionDPO(beta=200, sign="official"), batch, steps, policy, reference)
    assert float(out.metrics["rewards/margins"]) == pytest.approx(logit, rel=1e-8)
    assert float(out.per_group.detach()) == pytest.approx(official, abs=1e-12)
    plain = loss_of(InversionDPO(beta=200), batch, steps, policy, reference).per_group
    assert float(plain.detach()) == pytest.approx(paper, abs=1e-12)
    assert float((out.per_group - plain).detach()) == pytest.approx(-logit, rel=1e-8)


def test_released_form_weights_and_gradient(
    pair: Pair, process: DdpmProcess, policy: Predict, reference: Predict, policy_weights: Tensor
) -> None:
    batch = pair(1.0)
    steps = walk(InversionTrajectory(num_steps=4, eval_point="source"), batch, process, reference)
    assert [4 * float(s.weight[0, 0]) for s in steps] == pytest.approx([0.500425, 0.742068, 1.809413, 8.901573], abs=1e-6)
    loss_of(InversionDPO(beta=200, sign="official"), batch, steps, policy, reference).per_group.sum().backward()
    assert policy_weights.grad is not None
    assert policy_weights.grad.tolist() == pytest.approx([0.079255747, 0.062839183, -0.015063807, -0.050858308], rel=1e-7)


def test_consistent_form(pair: Pair, process: DdpmProcess, policy: Predict, reference: Predict, toy: Toy) -> None:
    batch = pair(1.0)
    steps = walk(InversionTrajectory(num_steps=4, network_timestep="destination"), batch, process, reference)
    method = InversionDPO(beta=200)
    assert float(loss_of(method, batch, steps, policy, reference).per_group.detach()) == pytest.approx(0.695685861839, abs=1e-12)
    weights = torch.tensor([0.28, 0.12, -0.20, 0.05], dtype=torch.float64, requires_grad=True)
    out = loss_of(method, batch, steps, toy(weights), reference)
    assert float(out.per_group.detach()) == pytest.approx(LOG_TWO, abs=1e-14)
    out.per_group.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == pytest.approx([1.179939828, 1.050245755, -2.912088195, -8.013868057], rel=1e-8)


@pytest.mark.parametrize("sign", ["paper", "official"])
def test_the_released_form_cannot_leave_the_reference(sign: str, pair: Pair, process: DdpmProcess, reference: Predict, toy: Toy) -> None:
    batch = pair(1.0)
    steps = walk(InversionTrajectory(num_steps=8, eval_point="source"), batch, process, reference)
    weights = torch.tensor([0.28, 0.12, -0.20, 0.05], dtype=torch.float64, requires_grad=True)
    out = loss_of(InversionDPO(sign=sign), batch, steps, toy(weights), reference)  # type: ignore[arg-type]
    assert float(out.per_group.detach()) == pytest.approx(LOG_TWO, abs=1e-15)
    out.per_group.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("eval_point", "told"), [("denoise", "destination"), ("source", "destination"), ("denoise", "source")])
def test_every_node_by_hand(eval_point: Any, told: Any, pairs: Pairs, process: DdpmProcess, reference: Predict) -> None:
    batch = pairs(3)
    path = InversionTrajectory(num_steps=5, eval_point=eval_point, network_timestep=told, guidance_scale=1.0)
    steps = walk(path, batch, process, reference)
    x = batch.latents
    for k, step in enumerate(steps):
        t = torch.full((3, 2), 200 * k)
        noise = reference(x, t if told == "destination" else (t - 200).clamp(min=0), batch.cond)
        y = process.ddim_move(x, noise, (t - 200).clamp(min=0), t)
        assert torch.equal(step.x_t, y if eval_point == "denoise" else x)
        torch.testing.assert_close(step.target, noise, rtol=1e-14, atol=0)
        torch.testing.assert_close(step.weight, 1 / (2 * process.alphas_cumprod[t] * 5), rtol=1e-12, atol=0)
        back = process.ddim_move(y, step.target, t, (t - 200).clamp(min=0))
        torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)  # the target maps y back
        x = y
    assert torch.equal(steps[0].x_t, batch.latents)  # the first move is the identity


def test_guidance_holds_for_path_and_loss(pair: Pair, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    path, batch = InversionTrajectory(num_steps=4, guidance_scale=2.0), pair(1.0)
    stronger = pair(2.0)  # the toy is linear in its conditioning and the null is zero
    plain = replace(path, guidance_scale=1.0)
    there = loss_of(InversionDPO(beta=200), batch, walk(path, batch, process, reference), policy, reference).per_group
    here = loss_of(InversionDPO(beta=200), stronger, walk(plain, stronger, process, reference), policy, reference).per_group
    torch.testing.assert_close(there, here, rtol=1e-11, atol=0)
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0, but there is no null conditioning"):
        path(batch, process, batch.random(0), None, reference)
    steps = walk(path, batch, process, reference)
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0, but there is no null conditioning"):
        evaluate(steps, batch.cond, policy, reference)


@pytest.mark.parametrize("eval_point", ["denoise", "source"])
def test_v_prediction_has_the_loss_of_the_equivalent_network(
    eval_point: str, pairs: Pairs, process: DdpmProcess, v_process: DdpmProcess, policy: Predict, reference: Predict
) -> None:
    def as_v(network: Predict) -> Predict:
        return lambda x, t, c: v_process.implied(x, network(x, t, c), t)

    path, batch = InversionTrajectory(num_steps=6, eval_point=eval_point, guidance_scale=1.5), pairs(2)  # type: ignore[arg-type]
    null = Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    losses = []
    for made, p, r in ((process, policy, reference), (v_process, as_v(policy), as_v(reference))):
        steps = path(batch, made, batch.random(0), None, r, null)
        losses.append(InversionDPO(beta=50).loss(batch, evaluate(steps, batch.cond, p, r, null)).per_group)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)


def test_network_evaluations(pair: Pair, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    seen: Counter[str] = Counter()

    def counted(name: str, network: Predict) -> Predict:
        def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
            seen[f"{name} with gradient" if name == "policy" and torch.is_grad_enabled() else name] += timesteps.numel()
            return network(x_t, timesteps, cond)

        return predict

    batch, (p, r) = pair(1.0), (counted("policy", policy), counted("reference", reference))
    method = InversionDPO()
    for eval_point, asked in (("source", 4), ("denoise", 8)):
        steps = walk(InversionTrajectory(num_steps=7, eval_point=eval_point), batch, process, r)  # type: ignore[arg-type]
        loss_of(method, batch, steps, p, r)
        assert seen == {"policy with gradient": 4 * 7, "reference": asked * 7}
        two_pass_backward(steps, batch.cond, p, r, lambda evals: method.loss(batch, evals), null=NULL)
        assert seen["policy"] == 4 * 7  # as it is trained: one more forward pass, for the memory of one step
        seen.clear()


METHODS_OF_MANY_STEPS = [InversionDPO(beta=30), DMPO(beta=30)]


@pytest.mark.parametrize("eval_point", ["denoise", "source"])
@pytest.mark.parametrize("method", METHODS_OF_MANY_STEPS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("guards", [(), (SDPO(mu=0.5),)], ids=["bare", "guarded"])
def test_two_passes_have_the_gradient_of_one_graph(
    eval_point: str,
    method: Any,
    guards: tuple[Any, ...],
    pairs: Pairs,
    process: DdpmProcess,
    policy: Predict,
    reference: Predict,
    policy_weights: Tensor,
) -> None:
    batch, loss = pairs(3), guarded(method.loss, guards)
    null = Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    path = InversionTrajectory(num_steps=6, eval_point=eval_point)  # type: ignore[arg-type]
    steps = path(batch, process, batch.random(0), None, reference, null)
    whole = loss(batch, evaluate(steps, batch.cond, policy, reference, null))
    whole.per_group.mean().backward()
    assert policy_weights.grad is not None
    expected, policy_weights.grad = policy_weights.grad, None
    log: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("exit")

    def backward(x: Tensor) -> None:
        log.append("backward")
        (x / 4).backward()  # as under accumulation over 4 micro-batches

    def on_evals(evals: list[Evaluation]) -> LossOutput:
        return loss(batch, evals)

    out = two_pass_backward(steps, batch.cond, policy, reference, on_evals, null=null, backward=backward, no_sync=no_sync)
    torch.testing.assert_close(out.per_group, whole.per_group.detach(), rtol=1e-12, atol=0)
    assert not out.per_group.requires_grad
    assert policy_weights.grad is not None
    torch.testing.assert_close(4 * policy_weights.grad, expected, rtol=1e-11, atol=1e-14)
    assert float(expected.abs().max()) > 1e-6
    assert log == ["enter", "backward", "exit"] * 5 + ["backward"]


def test_two_passes_hold_one_step_at_a_time(pair: Pair, process: DdpmProcess, reference: Predict, toy: Toy) -> None:
    alive: list[int] = []

    class Watched(torch.autograd.Function):
        """Counts forwards whose backward has not come yet."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            alive.append((alive[-1] if alive else 0) + 1)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            alive.append(alive[-1] - 1)
            return gradient

    network = toy(torch.tensor([0.3, 0.1, -0.2, 0.05], dtype=torch.float64, requires_grad=True))

    def watched(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        prediction = network(x_t, timesteps, cond)
        return Watched.apply(prediction) if torch.is_grad_enabled() else prediction

    batch = pair(1.0)
    steps = walk(InversionTrajectory(num_steps=5), batch, process, reference)
    two_pass_backward(steps, batch.cond, watched, reference, lambda evals: InversionDPO().loss(batch, evals), null=NULL)
    assert alive == [1, 0] * 5


@pytest.mark.parametrize("at_once", [2, 4, 6])
def test_steps_taken_together_have_the_same_gradient(
    at_once: int, pairs: Pairs, process: DdpmProcess, policy: Predict, reference: Predict, policy_weights: Tensor
) -> None:
    batch, null = pairs(3), Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    path = InversionTrajectory(num_steps=6, steps_at_once=at_once)
    steps = path(batch, process, batch.random(0), None, reference, null)
    asked: list[int] = []

    def counted(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        asked.append(len(x_t))
        return policy(x_t, timesteps, cond)

    found = []
    for together in (1, path.steps_at_once):
        asked.clear()
        out = two_pass_backward(
            steps, batch.cond, counted, reference, lambda evals: InversionDPO().loss(batch, evals), null=null, at_once=together
        )
        assert policy_weights.grad is not None
        found.append((out.per_group, policy_weights.grad))
        policy_weights.grad = None
    assert len(asked) == 2 * math.ceil(6 / at_once)
    assert sum(asked) == 2 * 2 * 6 * 3  # two passes with guidance, as before
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_sampled_nodes_are_nodes_of_the_trajectory(pairs: Pairs, process: DdpmProcess, reference: Predict) -> None:
    batch, null = pairs(4), Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    path = InversionTrajectory(num_steps=8)
    every = path(batch, process, batch.random(0), None, reference, null)
    some = replace(path, sampled_steps=3)(batch, process, batch.random(0), None, reference, null)
    assert len(some) == 3
    for g in range(4):
        nodes = [int(s.timesteps[g, 0]) // 125 for s in some]
        assert nodes == sorted(set(nodes))
        for node, step in zip(nodes, some, strict=True):
            for name in ("x_t", "target", "timesteps", "log_snr"):
                assert torch.equal(getattr(step, name)[g], getattr(every[node], name)[g])
            torch.testing.assert_close(step.weight[g], every[node].weight[g] * 8 / 3, rtol=1e-12, atol=0)
    assert len({tuple(int(s.timesteps[g, 0]) for s in some) for g in range(4)}) > 1  # drawn per pair
    source = replace(path, eval_point="source", sampled_steps=2)(batch, process, batch.random(0), None, reference, null)
    assert all(s.reference is s.target for s in source)


@pytest.mark.parametrize("sampled_steps", [None, 3])
def test_the_latents_that_are_kept_are_counted(sampled_steps: int | None, pairs: Pairs, process: DdpmProcess, reference: Predict) -> None:
    batch = pairs(2)
    path = InversionTrajectory(num_steps=8, sampled_steps=sampled_steps)
    every = replace(path, sampled_steps=None)(batch, process, batch.random(0), None, reference, NULL)
    stored = {x.data_ptr(): x.numel() for step in every for x in (step.x_t, step.target) if x is not None}
    compared = len(walk(path, batch, process, reference))
    assert path.kept_latents * batch.latents.numel() == sum(stored.values()) + 3 * compared * batch.latents.numel()


def test_sampled_nodes_keep_the_expected_sum(pair: Pair, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    batch = pair(1.0)
    path = InversionTrajectory(num_steps=4, eval_point="source")
    whole = policy_error(evaluate(walk(path, batch, process, reference), batch.cond, policy, reference, NULL))
    singles = replace(path, sampled_steps=1)
    found = {}
    for visit in range(60):
        seen = replace(batch, visits=(visit,))
        steps = walk(singles, seen, process, reference)
        found[int(steps[0].timesteps[0, 0])] = policy_error(evaluate(steps, batch.cond, policy, reference, NULL)).detach()
    assert len(found) == 4  # every node was drawn; they are equally likely
    torch.testing.assert_close(torch.stack([*found.values()]).mean(0), whole.detach(), rtol=1e-12, atol=0)


def test_a_batch_is_its_pairs_one_by_one(pairs: Pairs, process: DdpmProcess, policy: Predict, reference: Predict) -> None:
    batch, null = pairs(4), Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
    path = InversionTrajectory(num_steps=6, sampled_steps=3)

    def losses(part: PreferenceBatch) -> Tensor:
        steps = path(part, process, part.random(0), None, reference, null)
        return InversionDPO(beta=20).loss(part, evaluate(steps, part.cond, policy, reference, null)).per_group

    def alone(g: int) -> PreferenceBatch:
        rows = slice(g, g + 1)
        cond = batch.cond.map(lambda x: x[rows])
        ids = {"pair_ids": batch.pair_ids[rows], "visits": batch.visits[rows]}
        return replace(batch, latents=batch.latents[rows], cond=cond, relevance=batch.relevance[rows], **ids)

    torch.testing.assert_close(losses(batch), torch.cat([losses(alone(g)) for g in range(4)]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; a trajectory needs at least 1 step"),
        ({"num_steps": 4, "steps_at_once": 5}, "steps_at_once is 5; choose 1 to 4, the nodes that are compared"),
        ({"sampled_steps": 2, "steps_at_once": 0}, "steps_at_once is 0; choose 1 to 2"),
        ({"num_steps": 4, "sampled_steps": 5}, r"sampled_steps is 5; choose 1 to num_steps \(4\)"),
        ({"sampled_steps": 0}, "sampled_steps is 0"),
        ({"eval_point": "source", "network_timestep": "source"}, "network_timestep is source with eval_point source"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InversionTrajectory(**settings)


def test_what_the_run_must_bring(pair: Pair, process: DdpmProcess, reference: Predict) -> None:
    batch = pair(1.0)
    with pytest.raises(ValueError, match="inverts with the reference, but the run has none"):
        InversionTrajectory()(batch, process, batch.random(0))
    with pytest.raises(ValueError, match="num_steps is 1001, but the schedule has 1000"):
        walk(InversionTrajectory(num_steps=1001), batch, process, reference)


def test_the_released_form_says_what_is_wrong_with_it() -> None:
    with pytest.warns(UserWarning, match="its gradient is exactly zero"):
        InversionTrajectory(eval_point="source")
    with pytest.warns(UserWarning, match="the opposite of the paper's figure"):
        InversionDPO(sign="official")


def test_a_model_of_few_levels_has_no_trajectory(pair: Pair, process: DdpmProcess, reference: Predict) -> None:
    refiner = replace(process, trained_at=tuple(range(200)))
    with pytest.raises(ValueError, match="path trajectory passes through timesteps 0 to 750"):
        walk(InversionTrajectory(num_steps=4), pair(0.0), refiner, reference)
