"""The step-wise resampler on toy networks: the sampler itself, what becomes a pair, what it costs, and how batches are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffpref.core.policy import evaluate
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, Predict, PreferenceBatch
from diffpref.methods.spo import SPO
from diffpref.paths import PATHS
from diffpref.sources.rollouts import Rollouts, RolloutState, Share
from diffpref.sources.stepwise import Place, SampledPairs, StepwiseSampling, best_and_worst, new_asked, sample_pairs

PROCESS = DdpmProcess.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
NULL = Conditioning(torch.zeros(1, 1, 1, 1))
SHAPE = (2, 3, 3)
PLACES = [Place(0, 5), Place(0, 2), Place(1, 5)]
PROMPTS = ["five", "two", "five"]
CPU = torch.device("cpu")


def toy(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """A network that depends on everything."""
    assert cond.prompt_embeds is not None
    shift = cond.prompt_embeds.flatten(2).mean(-1) - timesteps / 2000
    return 0.8 * x_t.tanh() + 0.3 * shift[..., None, None, None]


@dataclass
class Toy:
    """Counts what is asked, and judges by the mean pixel."""

    latents: list[int] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)

    def predict(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """As `toy`."""
        self.latents.append(timesteps.numel())
        return toy(x_t, timesteps, cond)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents are the pixels."""
        self.decoded.append(len(latents))
        return latents

    def score(self, pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
        """Bright is good."""
        assert len(prompts) == len(pixels)
        self.levels.append(timestep)
        return 3 * pixels.mean((1, 2, 3))


def sampled(toy: Toy, **settings: Any) -> tuple[SampledPairs, dict[str, float]]:
    """Pairs of PLACES."""
    own = StepwiseSampling(**settings)
    ask = new_asked(own, PROCESS, toy.predict, NULL, toy.decode, toy.score, CPU)
    return sample_pairs(own, ask, PLACES, PROMPTS, conditioning(PLACES), SHAPE, seed=7)


def conditioning(places: Sequence[Place]) -> Conditioning:
    """(P, 1, 1, 1): the number of the prompt."""
    return Conditioning(torch.tensor([float(place.index) for place in places])[:, None, None, None])


def test_a_whole_trajectory_is_ddim_with_eta_one() -> None:
    """With one segment over all steps candidates are plain samples; diffusers' scheduler must agree, given the same noise."""
    toy_ = Toy()
    own = StepwiseSampling(first_branch=0, num_inner_step=19, num_candidates=2, threshold=0.0, guidance_scale=3.0)
    pairs, _ = sampled(toy_, **vars(own))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == own.levels(1000)[:-1]
    path = pairs.path[0]  # (2, 21, C, h, w) of the first place
    cond = torch.tensor([5.0])[None, None, None]
    for k in range(2):
        x = path[k, 0][None]
        for i, t in enumerate(scheduler.timesteps):
            both = [toy(x[None], torch.full((1, 1), int(t)), Conditioning(c))[0] for c in (0 * cond, cond)]
            guess = both[0] + 3 * (both[1] - both[0])
            mean = scheduler.step(guess, int(t), x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
            a, b, std = PROCESS.transition(t[None], torch.tensor([own.levels(1000)[i + 1]]), 1.0)
            torch.testing.assert_close(mean, (a * x + b * guess).float(), rtol=1e-3, atol=1e-4)
            noise = (path[k, i + 1] - mean[0]) / std.float()
            assert abs(float(noise.mean())) < 1.2  # what is left is unit noise
            assert 0.4 < float(noise.std()) < 1.8
            x = path[k, i + 1][None]
    assert torch.equal(path[0, 0], path[1, 0])
    assert not torch.equal(path[0, 1], path[1, 1])


def test_the_cost_is_what_the_algorithm_needs() -> None:
    toy_ = Toy()
    sampled(toy_)
    per_prompt = 4 + 1 + 15 * 4  # ordinary steps, one call for all first candidates, then one per candidate
    assert sum(toy_.latents) == 2 * len(PLACES) * per_prompt  # guidance asks twice
    assert sum(toy_.decoded) == len(PLACES) * 16 * 4
    sdxl = Toy()
    sampled(sdxl, num_candidates=2, num_inner_step=3)
    assert sum(sdxl.latents) == 2 * len(PLACES) * (4 + 1 + 2 * 15)
    assert sum(sdxl.decoded) == len(PLACES) * 4 * 2
    assert sdxl.levels == [551, 351, 151, 0]


def test_what_becomes_a_pair() -> None:
    toy_ = Toy()
    pairs, facts = sampled(toy_, threshold=0.2)
    assert toy_.levels == [*range(701, 0, -50), 0]
    gap = pairs.score[:, 0] - pairs.score[:, 1]
    assert float(gap.min()) > 2 * float(torch.atanh(torch.tensor(0.2)))
    assert 0 < len(gap) < facts["decisions"] == 16 * 3
    assert facts["pairs"] == len(gap)
    assert facts["final_pictures"] == 3
    assert len(set(sampled(Toy(), threshold=0.0)[0].first.tolist())) == 16
    assert torch.equal(pairs.path[:, 0, 0], pairs.path[:, 1, 0])
    long, _ = sampled(Toy(), threshold=0.0, num_candidates=2, num_inner_step=3)
    assert long.path.shape == (3 * 4, 2, 5, *SHAPE)
    assert sorted(set(long.first.tolist())) == [4, 8, 12, 16]
    assert torch.equal(long.path[:, 0, 0], long.path[:, 1, 0])
    assert not torch.equal(long.path[:, 0, 1], long.path[:, 1, 1])


def test_scores_are_of_the_estimate_at_the_candidates_own_level() -> None:
    seen: list[Tensor] = []
    own = StepwiseSampling(threshold=0.0, num_candidates=2, guidance_scale=1.0, first_branch=18)

    def score(pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
        seen.append(pixels)
        return pixels.mean((1, 2, 3))

    ask = new_asked(own, PROCESS, toy, NULL, lambda x: x, score, CPU)
    pairs, _ = sample_pairs(own, ask, PLACES[:1], PROMPTS[:1], conditioning(PLACES[:1]), SHAPE, seed=7)
    candidates = pairs.path[0, :, 1][None]  # (1, 2, C, h, w) at t = 1, best first
    t = torch.ones(1, 2, dtype=torch.int64)
    cond = conditioning(PLACES[:1]).map(lambda x: x.expand(-1, 2, -1, -1))
    estimates = PROCESS.x_0(candidates, toy(candidates, t, cond), t)[0]
    expected = torch.stack(sorted(seen[0], key=lambda x: -float(x.mean())))
    torch.testing.assert_close(estimates, expected, rtol=1e-5, atol=1e-5)
    final = torch.stack(sorted(seen[1], key=lambda x: -float(x.mean())))
    torch.testing.assert_close(pairs.path[1, :, 1], final, rtol=0, atol=0)  # the picture itself, without a prediction


def test_parts_and_neighbours_do_not_matter() -> None:
    whole, _ = sampled(Toy(), threshold=0.0)
    parts, _ = sampled(Toy(), threshold=0.0, rollout_batch_size=5)
    torch.testing.assert_close(parts.path, whole.path, rtol=1e-5, atol=1e-5)
    own = StepwiseSampling(threshold=0.0)
    ask = new_asked(own, PROCESS, toy, NULL, lambda x: x, Toy().score, CPU)
    alone, _ = sample_pairs(own, ask, PLACES[2:], PROMPTS[2:], conditioning(PLACES[2:]), SHAPE, seed=7)
    rows = whole.epoch == 1
    torch.testing.assert_close(alone.path, whole.path[rows], rtol=1e-5, atol=1e-5)


def test_the_authors_selection() -> None:
    scores = torch.tensor([[20.1, 21.0, 20.5, 19.9], [19.0, 19.2, 19.1, 19.3]], dtype=torch.float64)
    best, worst, is_valid = best_and_worst(scores, 0.3)
    assert (best.tolist(), worst.tolist(), is_valid.tolist()) == ([1, 3], [3, 0], [True, False])
    gaps = torch.tanh((scores.max(1).values - scores.min(1).values) / 2)
    torch.testing.assert_close(gaps, torch.tensor([0.500520, 0.148885], dtype=torch.float64), rtol=0, atol=1e-6)
    assert not best_and_worst(torch.zeros(2, 3), 0.0)[2].any()


@pytest.mark.parametrize(("continuation", "column"), [("winner", 0), ("loser", 1)])
def test_continuation(continuation: str, column: int) -> None:
    pairs, _ = sampled(Toy(), threshold=0.0, continuation=continuation)
    for k in range(3, len(pairs.first)):
        assert torch.equal(pairs.path[k, 0, 0], pairs.path[k - 3, column, 1])  # the same prompt, one branch earlier
    shuffled, _ = sampled(Toy(), threshold=0.0, shuffle_scores=True, num_candidates=2)
    plain, _ = sampled(Toy(), threshold=0.0, num_candidates=2)
    turned = [not torch.equal(a[0, 1], b[0, 1]) for a, b in zip(shuffled.path, plain.path, strict=True)]
    assert 0.25 < sum(turned) / len(turned) < 0.75
    assert torch.equal(shuffled.score, plain.score)


def rollouts(state: RolloutState | None = None, share: Share | None = None, predict: Predict = toy, **settings: Any) -> Rollouts:
    """Batches for six prompts."""
    own = StepwiseSampling(**{"prompts_per_rollout": 4, "threshold": 0.05, **settings})
    ask = new_asked(own, PROCESS, predict, NULL, lambda x: x, Toy().score, CPU)
    prompts = [f"prompt {i}" for i in range(6)]

    def encode(texts: Sequence[str]) -> list[Conditioning]:
        return [conditioning([Place(0, prompts.index(text))]) for text in texts]

    def sample(places: Sequence[Place], texts: Sequence[str], cond: Conditioning) -> tuple[SampledPairs, dict[str, float]]:
        assert texts == [prompts[place.index] for place in places]
        return sample_pairs(own, ask, places, texts, cond, SHAPE, seed=3)

    made = partial(Rollouts, own, prompts, encode, sample, PROCESS)
    return made(share or Share(4, 2, 0, 1), 3, CPU, state or RolloutState())


def same(a: PreferenceBatch, b: PreferenceBatch) -> bool:
    """Bit for bit."""
    steps = all(torch.equal(x.x_t, y.x_t) and torch.equal(x.target, y.target) for x, y in zip(a.steps, b.steps, strict=True))
    return a.pair_ids == b.pair_ids and torch.equal(a.latents, b.latents) and steps


def test_batches_hold_every_pair_of_a_rollout_once() -> None:
    source = rollouts()
    batches = [next(source)]
    total = source.num_groups()
    batches += [next(source) for _ in range(total // 8 * 2 - 1)]
    ids = [name for batch in batches for name in batch.pair_ids]
    assert len(ids) == len(set(ids)) == total // 8 * 8
    assert source.state.number == 1
    step = batches[0].steps[0]
    assert step.shared_input == (True,) * 4
    assert step.guidance_scale == 5
    assert batches[0].cond.prompt_embeds is not None
    assert batches[0].cond.prompt_embeds[:, 0, 0, 0].tolist() == [float(name.split("/")[1]) for name in batches[0].pair_ids]
    next(source)
    assert source.state.number == 2  # a rollout begins where the pairs of the last one are used up
    assert PATHS["recorded"]()(batches[0], PROCESS, batches[0].random(0)) == batches[0].steps


def test_resuming_within_a_rollout_is_bit_exact() -> None:
    whole = rollouts()
    expected = [next(whole) for _ in range(24)]
    for stop in (2, 10):
        first = rollouts()
        for _ in range(stop):
            next(first)
        state = RolloutState()
        state.restore(first.state.numbers(), {name: x.clone() for name, x in first.state.tensors().items()})
        again = rollouts(state)
        assert all(same(next(again), batch) for batch in expected[stop:])


def test_half_the_accumulation_on_two_ranks_is_the_same_update(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rollouts()
    expected = [next(whole) for _ in range(2)]
    for rank in (0, 1):
        state = RolloutState(1, 0, 0, whole.state.pairs)
        own = rollouts(state, Share(4, 1, rank, 2))
        assert same(next(own), expected[rank])


def test_segments_and_drawn_transitions() -> None:
    long = rollouts(num_candidates=2, num_inner_step=3, threshold=0.0)
    batch = next(long)
    assert long.num_groups() == 4 * 4 * 4
    parts = [int(name.split("/")[2]) % 4 for name in batch.pair_ids]  # a segment begins at every fourth transition
    assert batch.steps[0].shared_input == tuple(part == 0 for part in parts)
    batches = [batch, *(next(long) for _ in range(7))]
    for seen in batches:
        for group, shared in enumerate(seen.steps[0].shared_input):
            assert torch.equal(*seen.steps[0].x_t[group]) == shared
    assert sum(sum(seen.steps[0].shared_input) for seen in batches) > 0
    drawn = rollouts(
        num_candidates=2, first_branch=0, num_inner_step=19, threshold=0.0, sampled_steps=3, discount=0.5, visits_per_rollout=4
    )
    batches = [next(drawn) for _ in range(2)]
    assert drawn.num_groups() == 4 * 4
    times = torch.stack([step.timesteps[:, 0] for batch in batches for step in batch.steps])
    assert len(batches[0].steps) == 3
    assert (times[0] > times[1]).all()
    assert (times[1] > times[2]).all()
    assert float((times >= 801).float().mean()) > 0.6  # noisy steps are drawn more often
    assert len({tuple(column) for column in times[:3].T.tolist()}) > 1


def test_no_pairs_ends_the_run_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"threshold is 0\.99.*lower it"):
        next(rollouts(threshold=0.99))


def test_training_on_such_batches_raises_the_score() -> None:
    """A network with a free offset, judged by brightness: SPO moves the offset so that pictures become brighter."""
    offset = torch.zeros(1, requires_grad=True)

    def policy(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return toy(x_t, t, cond) + offset

    source = rollouts(predict=policy, guidance_scale=1.0, num_steps=5, first_branch=1, share=Share(8, 1, 0, 1), threshold=0.0)
    optimizer, before = torch.optim.Adam([offset], lr=0.02), None
    for _ in range(20):
        batch = next(source)
        before = before if before is not None else float(batch.scores["step_scorer"].mean())
        evals = evaluate(batch.steps, batch.cond, policy, torch.no_grad()(toy))
        SPO().loss(batch, evals).per_group.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(offset.detach()) < -0.1  # less noise is predicted away downwards: brighter
    assert float(batch.scores["step_scorer"].mean()) > float(before or 0) + 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 1}, "num_candidates is 1; it must be at least 2"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"eta": 0.0}, "eta is 0.0"),
        ({"first_branch": 20}, "first_branch is 20"),
        ({"num_inner_step": 2}, "num_inner_step is 2"),
        ({"sampled_steps": 2}, "sampled_steps is 2"),
        ({"discount": 0.9}, "discount is 0.9"),
        ({"discount": 0.0, "sampled_steps": 1}, "discount is 0.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepwiseSampling(**settings)


def test_a_grid_that_the_model_does_not_have() -> None:
    with pytest.raises(ValueError, match="num_steps is 2000"):
        StepwiseSampling(num_steps=2000).levels(1000)
    turbo = replace(PROCESS, trained_at=(249, 499, 749))
    with pytest.raises(ValueError, match="passes through timesteps"):
        new_asked(StepwiseSampling(), turbo, toy, NULL, lambda x: x, Toy().score, CPU)
