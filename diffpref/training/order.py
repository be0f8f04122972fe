"""Which pairs are drawn when, and how much each counts: curriculum and rarity weight, made of the scores of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from diffpref.core.curriculum import admitted, rank_thresholds, score_thresholds
from diffpref.core.scores import histogram_share, rarity_weight
from diffpref.data.groups import ranked_gaps
from diffpref.data.loader import PairPixels
from diffpref.data.sampler import PairSampler, Stages

if TYPE_CHECKING:  # which imports this file
    from diffpref.training.config import TrainConfig


def check_order(config: TrainConfig) -> None:
    """Raises ValueError for settings of the order that contradict each other."""
    if config.reference_update_steps is not None and config.start_lora_as == "adapter":
        raise ValueError("reference_update_steps is given together with start_lora_as adapter, whose reference is without it; use base")
    if config.curriculum_stages is None:
        return
    for name in ("aspect_ratio_buckets", "desirable_share", "streaming", "num_train_epochs"):
        if getattr(config, name):
            raise ValueError(
                f"curriculum_stages is {config.curriculum_stages} together with {name} {getattr(config, name)}: a curriculum has an order "
                "and a length of its own; drop one of them"
            )


def new_sampler(config: TrainConfig, pixels: PairPixels) -> PairSampler:
    """The order of the training groups. Raises ValueError for one that these groups cannot have."""
    buckets = pixels.buckets.of_pair if pixels.buckets else None
    if config.curriculum_stages is not None:
        return PairSampler(len(pixels), config.seed, stages=_stages(config, pixels))
    if config.desirable_share is None:
        return PairSampler(len(pixels), config.seed, buckets)
    if pixels.groups is None or pixels.slots != (0,):
        raise ValueError(f"desirable_share is {config.desirable_share}, but method {config.method} draws no single pictures; leave it out")
    if buckets is not None:
        raise ValueError("desirable_share is given together with aspect_ratio_buckets, which have orders of their own; drop one of them")
    return PairSampler(len(pixels), config.seed, balance=(pixels.groups.relevance[:, 0] >= 0.5, config.desirable_share))


def _stages(config: TrainConfig, pixels: PairPixels) -> Stages:
    assert config.curriculum_stages is not None
    name = config.curriculum_score
    if pixels.slots != (0, 1):
        raise ValueError(f"curriculum_stages orders pairs, but method {config.method} is trained on groups of another kind; leave it out")
    if name is not None:
        gaps = torch.from_numpy(score_gaps(pixels, name, "curriculum_score"))
        thresholds = score_thresholds(gaps, config.curriculum_stages)
    else:
        found = ranked_gaps(pixels.pairs)
        if found is None:
            raise ValueError("curriculum_stages is given, but the data has no ranked lists to take gaps from; add curriculum_score")
        gaps = torch.from_numpy(found)
        thresholds = rank_thresholds(int(gaps.max()) + 1, config.curriculum_stages)
    members = [np.flatnonzero(admitted(gaps, thresholds, stage).numpy()) for stage in range(1, config.curriculum_stages + 1)]
    if not len(members[0]):
        raise ValueError(
            f"curriculum_stages is {config.curriculum_stages}, but no pair has the gap of {float(thresholds[0]):g} that stage 1 asks "
            "for; use fewer stages"
        )
    return Stages(members, config.curriculum_steps)


def score_gaps(pixels: PairPixels, name: str, setting: str) -> np.ndarray:
    """|score of one picture minus that of the other| of every pair, (N,). Raises ValueError when the data has no such score."""
    scores = pixels.scores(range(len(pixels)))
    if name not in scores:
        raise ValueError(f"{setting} is {name!r}, but the data has {', '.join(scores) or 'no score columns'}; add {name}_0 and {name}_1")
    if not np.isfinite(scores[name]).all():
        raise ValueError(f"{setting} is {name!r}, but some of its scores are missing; score the pictures again")
    return np.abs(scores[name][:, 0] - scores[name][:, 1])


def group_weights(config: TrainConfig, pixels: PairPixels) -> np.ndarray | None:
    """What multiplies the loss of each group, float32 (N,); None for all alike. Raises ValueError when the data lacks the score."""
    if config.rarity_score is None:
        return None
    if pixels.slots != (0, 1):
        raise ValueError(f"rarity_score weighs pairs, but method {config.method} is trained on groups of another kind; leave it out")
    gaps = torch.from_numpy(score_gaps(pixels, config.rarity_score, "rarity_score"))
    return rarity_weight(histogram_share(gaps, config.rarity_bins), config.rarity_exponent).float().numpy()
