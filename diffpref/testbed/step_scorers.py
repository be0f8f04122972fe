"""Judges of sampled steps on the testbed: its step-aware model, its reward model, and the true reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffpref.locations import asset
from diffpref.scorers.step_aware import load_step_aware
from diffpref.sources.stepwise import StepScorer
from diffpref.testbed.reward import reward
from diffpref.training.objective import Objective


def shipped_step_aware() -> StepScorer:
    """The step-aware model that comes with the testbed."""
    return load_step_aware(f"spm={asset('testbed', 'step_aware_scorer')}")


@torch.no_grad()
def score_with_proxy() -> StepScorer:
    """The testbed's reward model, which does not know the timestep."""
    from diffpref.testbed.scorer import shipped_scorer

    scorer = shipped_scorer()
    return lambda pixels, prompts, timestep: scorer.score_pixels(pixels, prompts)


def score_estimates(pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
    """The primary reward of estimated pictures (N, 3, 64, 64) in about [0, 1], as a judge of sampled steps: (N,) in [0, 6]."""
    rounded = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(reward(rounded, list(prompts)))


STEP_SCORERS: dict[str, Callable[[], StepScorer]] = {
    "testbed": lambda: score_estimates,
    "testbed_pickscore": score_with_proxy,
    "testbed_spm": shipped_step_aware,
}


def testbed_step_scorer(objective: Objective) -> StepScorer | None:
    """The judge of sampled steps if it is one of the testbed's, which the library does not know; None for any other.

    Raises ValueError for a name that begins as theirs do.
    """
    name = str(objective.source.step_scorer) if objective.source else ""
    if not name.startswith("testbed"):
        return None
    if name not in STEP_SCORERS:
        raise ValueError(f"step_scorer is {name!r}; of the testbed there are {', '.join(STEP_SCORERS)}")
    return STEP_SCORERS[name]()
