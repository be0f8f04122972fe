"""Pairs that the policy samples itself: the step-wise resampler of SPO (arXiv:2406.04314, Alg. 1), also for TailorPO and Dense Reward.

    x at level t_i, one network call -> K candidates x_p ~ N(a x + b eps, std^2)      stochastic DDIM, guided
    each goes on num_inner_step further steps; at its level t the scorer judges the decoded estimate of the clean picture
    (after the last step the picture itself, at timestep 0); best and worst make a pair if their scores differ enough
    one candidate, at random, is where the next one branches; its prediction is used again

All prompts of a rollout and all candidates advance together, in parts of rollout_batch_size. Noise is keyed by (seed, epoch, prompt,
step, candidate): neither the parts nor the number of processes change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffpref.core.policy import guided
from diffpref.core.process import DdpmProcess, like
from diffpref.core.random import generator, normal, permutation
from diffpref.core.types import Conditioning, Predict

StepScorer = Callable[[Tensor, Sequence[str], int], Tensor]
"""(pixels (N, 3, H, W) in about [0, 1], N prompts, timestep at which they were estimated) -> (N,), higher is better."""


@dataclass(frozen=True, kw_only=True)
class StepwiseSampling:
    """How pairs are sampled and judged. Defaults are SPO's for SD1.5."""

    prompt_set: str | None = None
    """Prompts to sample: a file (.txt with one per line, .json, .jsonl, .csv, .tsv, .parquet), or a set's name."""
    max_prompts: int | None = None
    """Use only the first prompts."""
    step_scorer: str | None = None
    """Judge of the estimates: spm_sd15, spm_sdxl, spm=FOLDER, or any scorer of pictures as name or name=weights."""
    shuffle_scores: bool = False
    """Control: exchange the scores of a prompt's candidates at random before the best and the worst are chosen."""
    prompts_per_rollout: int = 40
    """Prompts that all processes together sample before they train on the pairs."""
    rollout_batch_size: int = 32
    """Latents that pass through the UNet, the autoencoder and the scorer at once; bounds the memory of sampling."""
    decode_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which estimates are decoded; the authors use fp16, with an autoencoder mended for it on SDXL."""
    num_steps: int = 20
    """Denoising steps of a trajectory."""
    eta: float = 1.0
    """Share of DDIM's noise in a step, in (0, 1]."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of sampling, and of policy and reference in the loss."""
    first_branch: int = 4
    """Step, counted from 0, at which candidates begin; pairs come from it on (4 of 20 steps: t <= 751)."""
    num_candidates: int = 4
    """Candidates per prompt and branch."""
    num_inner_step: int = 0
    """Further steps of every candidate before it is judged; 3 for SPO on SDXL, all that are left for whole trajectories."""
    threshold: float = 0.3
    """Least difference of the two preference probabilities, softmax of the scores, of best and worst; in [0, 1)."""
    continuation: Literal["random", "winner", "loser"] = "random"
    """The candidate from which sampling goes on."""
    sampled_steps: int | None = None
    """Train each pair on this many of its transitions at once, drawn; each transition is a pair of its own when not given."""
    discount: float = 1.0
    """With sampled_steps: a transition is drawn with probability proportional to discount^i, i = 0 the noisiest."""
    visits_per_rollout: int = 1
    """Times that each pair is trained on before new ones are sampled."""

    def __post_init__(self) -> None:
        least = {"num_candidates": 2, "prompts_per_rollout": 1, "rollout_batch_size": 1, "num_inner_step": 0, "visits_per_rollout": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it is a difference of probabilities in [0, 1), 0.3 for SPO on SD1.5")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; sampled steps have a density only for eta in (0, 1]: use 1, as the authors do")
        if not 0 <= self.first_branch < self.num_steps:
            raise ValueError(f"first_branch is {self.first_branch}; it must be a step of 0 to num_steps - 1 ({self.num_steps - 1})")
        if (self.num_steps - self.first_branch) % (self.num_inner_step + 1):
            raise ValueError(
                f"num_inner_step is {self.num_inner_step}, but segments of {self.transitions} steps do not divide the "
                f"{self.num_steps - self.first_branch} steps from first_branch ({self.first_branch}) to num_steps ({self.num_steps})"
            )
        if self.sampled_steps is not None and not 1 <= self.sampled_steps <= self.transitions:
            raise ValueError(f"sampled_steps is {self.sampled_steps}; a pair has {self.transitions} transitions (num_inner_step + 1)")
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount is {self.discount}; it lies in (0, 1], and 1 draws all steps alike")
        if self.discount != 1 and self.sampled_steps is None:
            raise ValueError(f"discount is {self.discount}, which only sampled_steps uses; add that or leave it out")

    @property
    def transitions(self) -> int:
        """Transitions of a pair."""
        return self.num_inner_step + 1

    def levels(self, num_timesteps: int) -> list[int]:
        """Timesteps from noise to picture, and 0 behind them: 951, 901, ..., 1, 0 for 20 of 1000. Raises ValueError for too many."""
        stride = num_timesteps // self.num_steps
        if stride < 1:
            raise ValueError(f"num_steps is {self.num_steps}, but the schedule has {num_timesteps} timesteps; use at most that many")
        return [*(1 + stride * i for i in reversed(range(self.num_steps))), 0]


@dataclass(frozen=True)
class Place:
    """A prompt in an epoch."""

    epoch: int
    index: int  # in the prompt set


@dataclass(frozen=True)
class SampledPairs:
    """N pairs and the transitions they are made of."""

    path: Tensor  # (N, 2, L + 1, C, h, w), better candidate first: where the segment starts, and where each transition ends
    first: Tensor  # (N,) int64, index of the first transition on the grid
    prompt: Tensor  # (N,) int64, index in the prompt set
    epoch: Tensor  # (N,) int64
    score: Tensor  # (N, 2)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint."""
        return dict(vars(self))

    def map(self, fn: Callable[[Tensor], Tensor]) -> SampledPairs:
        """Apply `fn` to every tensor."""
        return SampledPairs(**{name: fn(x) for name, x in self.tensors().items()})


@dataclass(frozen=True)
class Asked:
    """What sampling asks: networks as functions of (P, K, ...), asked in parts of at most `batch_size` latents."""

    process: DdpmProcess
    predict: Predict  # guided
    decode: Callable[[Tensor], Tensor]  # latents (N, C, h, w) to pixels
    scorer: StepScorer
    batch_size: int
    device: torch.device

    def prediction(self, x: Tensor, t: int, cond: Conditioning) -> Tensor:
        """At x (P, K, C, h, w), all at level t; cond is (P, 1, ...)."""
        images, flat = x.shape[1], x.flatten(0, 1)[:, None]
        wide = cond.map(lambda c: c.expand(-1, images, *c.shape[2:]).flatten(0, 1)[:, None])
        levels = torch.full((len(flat), 1), t, device=x.device)
        parts = []
        for start in range(0, len(flat), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self.predict(flat[rows], levels[rows], _rows(wide, rows)).to(x.dtype))
        return torch.cat(parts).view_as(x)

    def scores(self, latents: Tensor, prompts: Sequence[str], t: int) -> Tensor:
        """Of estimates (P, K, C, h, w) at level t, (P, K) float64 on the CPU."""
        flat, texts = latents.flatten(0, 1), [prompt for prompt in prompts for _ in range(latents.shape[1])]
        parts = []
        for start in range(0, len(flat), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts.append(self.scorer(self.decode(flat[part]), texts[part], t).double().cpu())
        return torch.cat(parts).view(latents.shape[:2])


@torch.no_grad()
def sample_pairs(
    settings: StepwiseSampling,
    ask: Asked,
    places: Sequence[Place],
    prompts: Sequence[str],
    cond: Conditioning,
    shape: Sequence[int],
    seed: int,
) -> tuple[SampledPairs, dict[str, float]]:
    """Sample P prompts from noise to picture and pair the candidates on the way.

    places, prompts: P each; cond: (P, 1, ...); shape: (C, h, w) of a latent. Returns the pairs on the CPU, ordered by branch and then
    by prompt, and sums over all branches: decisions, pairs, score and gap of the candidates, and the scores and number of final pictures.
    """
    levels = settings.levels(ask.process.num_timesteps)
    noise = _Noise(seed, places, tuple(shape), ask.device)
    x = noise.start()
    for i in range(settings.first_branch):
        x = _move(settings, ask.process, x, ask.prediction(x, levels[i], cond), levels[i : i + 2], noise.of(i, 1))
    prediction, i, found = ask.prediction(x, levels[settings.first_branch], cond), settings.first_branch, []
    facts = dict.fromkeys(("decisions", "pairs", "score", "gap", "final_score", "final_pictures"), 0.0)
    while i < settings.num_steps:
        segment, end = [x.expand(-1, settings.num_candidates, *x.shape[2:])], i + settings.transitions
        guesses = prediction.expand_as(segment[0])
        for k in range(i, end):
            guesses = ask.prediction(segment[-1], levels[k], cond) if k > i else guesses
            fresh = noise.of(k, settings.num_candidates)
            segment.append(_move(settings, ask.process, segment[-1], guesses, levels[k : k + 2], fresh))
        estimates = last = segment[-1]
        if end < settings.num_steps:
            guesses = ask.prediction(last, levels[end], cond)
            estimates = ask.process.x_0(last, guesses, torch.full(last.shape[:2], levels[end], device=last.device))
        scores = ask.scores(estimates, prompts, levels[end])
        if settings.shuffle_scores:
            scores = _shuffled(scores, seed, places, i)
        found.append(_paired(torch.stack(segment, 2), scores, settings.threshold, i, places))
        _count(facts, scores, found[-1], is_final=end == settings.num_steps)
        chosen = _chosen(scores, settings.continuation, seed, places, i).to(last.device)
        rows = torch.arange(len(places), device=last.device)
        x, prediction, i = last[rows, chosen][:, None], guesses[rows, chosen][:, None], end
    return SampledPairs(**{name: torch.cat([vars(part)[name] for part in found]) for name in vars(found[0])}), facts


def _move(settings: StepwiseSampling, process: DdpmProcess, x: Tensor, prediction: Tensor, levels: Sequence[int], noise: Tensor) -> Tensor:
    """A stochastic DDIM step of x (P, K, C, h, w) between two levels."""
    t, p = (torch.full(x.shape[:2], level, device=x.device) for level in levels)
    a, b, std = (like(c.to(x.dtype), x) for c in process.transition(t, p, settings.eta))
    return a * x + b * prediction + std * noise


@dataclass(frozen=True)
class _Noise:
    """Every latent's own noise, (P, K, C, h, w)."""

    seed: int
    places: Sequence[Place]
    shape: tuple[int, ...]
    device: torch.device

    def start(self) -> Tensor:
        """Where trajectories begin, K = 1."""
        rows = [normal(self.shape, self.seed, "rollout_start", place.epoch, place.index) for place in self.places]
        return torch.stack(rows)[:, None].to(self.device)

    def of(self, step: int, candidates: int) -> Tensor:
        """Of the transition that begins at `step`."""
        rows = [
            normal(self.shape, self.seed, "rollout", place.epoch, place.index, step, candidate)
            for place in self.places
            for candidate in range(candidates)
        ]
        return torch.stack(rows).unflatten(0, (len(self.places), candidates)).to(self.device)


def _rows(cond: Conditioning, rows: slice) -> Conditioning:
    return cond.map(lambda x: x[rows])


def best_and_worst(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the best and the worst of scores (P, K), and whether softmax over the two differs by more than `threshold`, (P,) each."""
    best, worst = scores.argmax(1), scores.argmin(1)
    gap = scores.gather(1, best[:, None]) - scores.gather(1, worst[:, None])
    return best, worst, (torch.tanh(gap / 2) > threshold)[:, 0]


def _paired(segment: Tensor, scores: Tensor, threshold: float, first: int, places: Sequence[Place]) -> SampledPairs:
    """The valid pairs of one branch. segment: (P, K, L + 1, C, h, w)."""
    best, worst, is_valid = best_and_worst(scores, threshold)
    both, rows = torch.stack([best, worst], 1)[is_valid], is_valid.nonzero()
    return SampledPairs(
        path=segment[rows.to(segment.device), both.to(segment.device)].cpu(),
        first=torch.full((len(rows),), first),
        prompt=torch.tensor([place.index for place in places])[is_valid],
        epoch=torch.tensor([place.epoch for place in places])[is_valid],
        score=scores.gather(1, torch.stack([best, worst], 1))[is_valid],
    )


def _shuffled(scores: Tensor, seed: int, places: Sequence[Place], step: int) -> Tensor:
    """The scores of each prompt's candidates (P, K) in random order."""
    orders = [permutation(scores.shape[1], seed, "shuffled_scores", place.epoch, place.index, step) for place in places]
    return scores.gather(1, torch.stack(orders))


def _chosen(scores: Tensor, continuation: str, seed: int, places: Sequence[Place], step: int) -> Tensor:
    """The candidate of each prompt that is gone on from, (P,)."""
    if continuation != "random":
        return scores.argmax(1) if continuation == "winner" else scores.argmin(1)
    keys = [generator(seed, "continuation", place.epoch, place.index, step) for place in places]
    return torch.stack([torch.randint(scores.shape[1], (), generator=key) for key in keys])


def _count(facts: dict[str, float], scores: Tensor, pairs: SampledPairs, is_final: bool) -> None:
    facts["decisions"] += len(scores)
    facts["pairs"] += len(pairs.prompt)
    facts["score"] += float(scores.mean(1).sum())
    facts["gap"] += float((scores.max(1).values - scores.min(1).values).sum())
    if is_final:
        facts["final_score"] += float(scores.mean(1).sum())
        facts["final_pictures"] += len(scores)


def new_asked(
    settings: StepwiseSampling,
    process: DdpmProcess,
    policy: Predict,
    null: Conditioning,
    decode: Callable[[Tensor], Tensor],
    scorer: StepScorer,
    device: torch.device,
) -> Asked:
    """The functions of sampling. Raises ValueError when the model is not trained at every level that it passes through."""
    process.check_passage("of sampled steps", settings.levels(process.num_timesteps)[0])
    return Asked(process, guided(policy, null, settings.guidance_scale), decode, scorer, settings.rollout_batch_size, device)
