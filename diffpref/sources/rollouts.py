"""Batches from sampled pairs: rollouts in the order of the prompts, spread over processes, resumable in their middle.

A rollout is complete before its first pair is trained on. Its pairs are gathered from all processes, ordered by prompt and step and
then shuffled by a keyed permutation, so that every process knows all of them: two processes take the steps that one takes with twice
the accumulation. Pairs that do not fill a whole update are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpref.core.distributed import all_rows, all_sum
from diffpref.core.process import DdpmProcess
from diffpref.core.random import generator, permutation
from diffpref.core.types import Conditioning, PathStep, PreferenceBatch
from diffpref.paths.recorded import transition_step
from diffpref.sources.dataset import join
from diffpref.sources.stepwise import Place, SampledPairs, StepwiseSampling

MAX_EMPTY = 20
"""Rollouts in a row that give less than one update, after which a run stops."""


@dataclass
class RolloutState:
    """Where a run stands: part of its checkpoint."""

    number: int = 0  # rollouts made so far
    position: int = 0  # groups of the current rollout that are trained on, all processes together
    skipped: int = 0  # rollouts that gave less than one update
    pairs: SampledPairs | None = None  # of the current rollout, of all processes, on the CPU

    def numbers(self) -> dict[str, int]:
        """For a checkpoint, as JSON."""
        return {"number": self.number, "position": self.position, "skipped": self.skipped}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self.pairs.tensors() if self.pairs else {}

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.number, self.position, self.skipped = (int(numbers[name]) for name in ("number", "position", "skipped"))
        self.pairs = SampledPairs(**tensors) if tensors else None


@dataclass(frozen=True)
class Share:
    """How an update is spread."""

    batch_size: int  # groups per process and forward pass
    accumulation: int
    rank: int
    world_size: int

    @property
    def per_update(self) -> int:
        """Groups of one update."""
        return self.batch_size * self.accumulation * self.world_size


Sample = Callable[[Sequence[Place], Sequence[str], Conditioning], tuple[SampledPairs, dict[str, float]]]
"""sources.stepwise.sample_pairs with everything but the prompts."""


class Rollouts(Iterator[PreferenceBatch]):
    """This process's micro-batches, without end."""

    def __init__(
        self,
        settings: StepwiseSampling,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], list[Conditioning]],
        sample: Sample,
        process: DdpmProcess,
        share: Share,
        seed: int,
        device: torch.device,
        state: RolloutState,
        report: Callable[[dict[str, float]], None] = lambda facts: None,
    ) -> None:
        """encode: N prompts to N pieces (1, 1, ...), complete with sizes. report: called with the means of every rollout."""
        self.settings, self.prompts, self.encode, self.sample = settings, prompts, encode, sample
        self.process, self.share, self.seed, self.device, self.state, self.report = process, share, seed, device, state, report
        self.levels = settings.levels(process.num_timesteps)
        self._cond: dict[int, Conditioning] = {}

    def __next__(self) -> PreferenceBatch:
        """The next micro-batch; samples a rollout where an update begins and none of the pairs is left. Every process must call it.

        Raises ValueError when MAX_EMPTY rollouts in a row gave less than one update.
        """
        state, share = self.state, self.share
        empty = 0
        while state.position % share.per_update == 0 and self.num_groups() - state.position < share.per_update:
            if empty == MAX_EMPTY:
                raise ValueError(
                    f"threshold is {self.settings.threshold}: {MAX_EMPTY} rollouts in a row gave fewer than the {share.per_update} pairs "
                    "of one update; lower it, or raise prompts_per_rollout"
                )
            self._roll()
            if self.num_groups() < share.per_update:
                empty += 1
                state.skipped += 1
        start = state.position + share.rank * share.batch_size
        state.position += share.world_size * share.batch_size
        return self._batch(self._order()[start : start + share.batch_size].tolist())

    def num_groups(self) -> int:
        """Groups of the current rollout."""
        pairs = self.state.pairs
        if pairs is None:
            return 0
        each = 1 if self.settings.sampled_steps else self.settings.transitions
        return len(pairs.prompt) * each * self.settings.visits_per_rollout

    def _order(self) -> Tensor:
        """Groups in the order in which they are trained on; every pair once before any of them comes again."""
        visits = self.settings.visits_per_rollout
        once = self.num_groups() // visits
        return torch.cat([v * once + permutation(once, self.seed, "rollout_order", self.state.number, v) for v in range(visits)])

    def _roll(self) -> None:
        """Sample the next prompts with the policy as it is now."""
        state, share = self.state, self.share
        first = state.number * self.settings.prompts_per_rollout
        places = [Place(*divmod(i, len(self.prompts))) for i in range(first, first + self.settings.prompts_per_rollout)]
        shuffled = {e: permutation(len(self.prompts), self.seed, "prompt_order", e) for e in {place.epoch for place in places}}
        places = [Place(place.epoch, int(shuffled[place.epoch][place.index])) for place in places]
        own = places[share.rank :: share.world_size]
        self._cond = {}
        pairs, facts = self._sampled(own) if own else (None, {})
        names = ("decisions", "pairs", "score", "gap", "final_score", "final_pictures")
        sums = all_sum(torch.tensor([facts.get(name, 0.0) for name in names], dtype=torch.float32, device=self.device)).tolist()
        state.pairs = self._gathered(pairs)
        state.number, state.position = state.number + 1, 0
        self.report(_means(dict(zip(names, sums, strict=True))) | {"rollout/number": state.number, "rollout/skipped": state.skipped})

    def _sampled(self, places: Sequence[Place]) -> tuple[SampledPairs, dict[str, float]]:
        texts = [self.prompts[place.index] for place in places]
        return self.sample(places, texts, self._conditioning([place.index for place in places]))

    def _gathered(self, pairs: SampledPairs | None) -> SampledPairs:
        """The pairs of all processes in the order of epoch, prompt and step."""
        assert pairs is not None or self.share.world_size > 1
        if self.share.world_size > 1:
            assert pairs is not None, "prompts_per_rollout is checked to be at least the number of processes"
            pairs = pairs.map(lambda x: all_rows(x.to(self.device)).cpu())
        assert pairs is not None
        keys = list(zip(pairs.epoch.tolist(), pairs.prompt.tolist(), pairs.first.tolist(), strict=True))
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
        return pairs.map(lambda x: x[order])

    def _conditioning(self, indices: Sequence[int]) -> Conditioning:
        """(G, 1, ...); the prompts of the current rollout are kept."""
        new = [i for i in dict.fromkeys(indices) if i not in self._cond]
        self._cond |= dict(zip(new, self.encode([self.prompts[i] for i in new]), strict=True)) if new else {}
        return join([self._cond[i] for i in indices])

    def _batch(self, groups: Sequence[int]) -> PreferenceBatch:
        pairs, settings = self.state.pairs, self.settings
        assert pairs is not None
        each = 1 if settings.sampled_steps else settings.transitions
        rows, parts = [g // each % len(pairs.prompt) for g in groups], [g % each for g in groups]
        visits = [g // (each * len(pairs.prompt)) for g in groups]
        ids = tuple(
            f"{int(pairs.epoch[r])}/{int(pairs.prompt[r])}/{int(pairs.first[r]) + part}" for r, part in zip(rows, parts, strict=True)
        )
        drawn = [self._drawn(i, v) for i, v in zip(ids, visits, strict=True)] if settings.sampled_steps else [[part] for part in parts]
        steps = tuple(self._step(pairs, rows, list(nth)) for nth in zip(*drawn, strict=True))
        cond = self._conditioning(pairs.prompt[rows].tolist()).map(lambda x: x.expand(-1, 2, *x.shape[2:]))
        relevance = torch.tensor([[1.0, 0.0]], device=self.device).expand(len(groups), 2)
        score = pairs.score[rows].float().to(self.device)
        last = pairs.path[rows][:, :, -1].to(self.device)
        return PreferenceBatch(last, cond, relevance, ids, tuple(visits), {"step_scorer": score}, steps=steps)

    def _step(self, pairs: SampledPairs, rows: Sequence[int], parts: Sequence[int]) -> PathStep:
        """One transition of each group: number `parts` of the pairs `rows`."""
        index, part = torch.tensor(rows), torch.tensor(parts)
        path = pairs.path[index].to(self.device)  # (G, 2, L + 1, C, h, w)
        group = torch.arange(len(rows), device=self.device)
        x_t, x_p = (path[group, :, (part + k).to(self.device)] for k in (0, 1))
        begin = (pairs.first[index] + part).tolist()
        t, p = (torch.tensor([self.levels[i + k] for i in begin], device=self.device)[:, None].expand(-1, 2) for k in (0, 1))
        own = self.settings
        shared = tuple(k == 0 for k in parts)  # candidates part at the first transition
        return transition_step(self.process, x_t, x_p, t, p, eta=own.eta, guidance_scale=own.guidance_scale, shared_input=shared)

    def _drawn(self, pair_id: str, visit: int) -> list[int]:
        """The transitions of a pair that are trained on at a visit, in rising order."""
        weights = torch.tensor([self.settings.discount**i for i in range(self.settings.transitions)])
        key = generator(self.seed, "transitions", self.state.number, pair_id, visit)
        return sorted(torch.multinomial(weights, int(self.settings.sampled_steps or 1), generator=key).tolist())


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """What is logged of a rollout: the share of decisions that gave a pair, mean scores and gaps of the candidates."""
    decisions, final = max(sums["decisions"], 1), max(sums["final_pictures"], 1)
    found = {"pairs": sums["pairs"], "valid": sums["pairs"] / decisions, "score": sums["score"] / decisions, "gap": sums["gap"] / decisions}
    return {f"rollout/{name}": value for name, value in (found | {"final_score": sums["final_score"] / final}).items()}
