"""Easy pairs first: which pairs a sampler may draw at a stage, by the gap between their images.

Curry-DPO (arXiv:2403.07230) and Curriculum-DPO (arXiv:2405.13637). Stages are numbered from 1; the admitted sets are nested,
and the last one holds every pair with a gap.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_thresholds(num_images: int, num_stages: int) -> Tensor:
    """The paper's: smallest admitted gap in ranks per stage, (num_stages,) falling to 0, for lists of `num_images`.

    Stage k alone adds the gaps in [(M-1)(B-k)/B, (M-1)(B-k+1)/B].
    """
    _check_stages(num_stages)
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; a gap needs at least two images per prompt")
    stages = torch.arange(num_stages - 1, -1, -1, dtype=torch.float64)
    return (num_images - 1) * stages / num_stages


def score_thresholds(gaps: Tensor, num_stages: int) -> Tensor:
    """The authors' code: smallest admitted score gap per stage, equally spaced from the largest to the smallest gap (N,) of the data."""
    _check_stages(num_stages)
    low, high = gaps.min().double(), gaps.max().double()
    return torch.linspace(1, 0, num_stages + 1, dtype=torch.float64)[1:] * (high - low) + low


def stage_of(step: int, steps_per_stage: int, num_stages: int) -> int:
    """The stage in [1, num_stages] at an optimizer step counted from 0."""
    _check_stages(num_stages)
    if steps_per_stage < 1:
        raise ValueError(f"steps_per_stage is {steps_per_stage}; a stage lasts at least 1 step, usually 400 to 500")
    return min(1 + step // steps_per_stage, num_stages)


def admitted(gaps: Tensor, thresholds: Tensor, stage: int) -> Tensor:
    """Which pairs (N,) a sampler may draw at a stage; a gap of 0 never."""
    return (gaps >= thresholds[stage - 1]) & (gaps > 0)


def _check_stages(num_stages: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}; a curriculum has at least 1 stage, usually 5")
