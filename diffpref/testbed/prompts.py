"""Which captions belong to which purpose. Some scenes never occur in pairs, to measure what carries over to unseen ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffpref.core.random import uniform
from diffpref.testbed.world import sample_scenes

Purpose = Literal["pairs", "validation", "test"]
_SEEDS = {"pairs": 11, "validation": 22, "test": 33}
UNSEEN_SHARE = 0.2


@dataclass(frozen=True)
class Prompts:
    """N captions with the number of their scene; `unseen` marks scenes that occur in no pair."""

    texts: list[str]
    scene_ids: np.ndarray  # (N,)

    @property
    def unseen(self) -> np.ndarray:
        """bool (N,)."""
        return np.array([is_unseen(int(s)) for s in self.scene_ids])


def is_unseen(scene_id: int) -> bool:
    """Whether a scene is kept out of all preference pairs."""
    return uniform(0, "unseen_scene", scene_id) < UNSEEN_SHARE


def draw_prompts(purpose: Purpose, num_prompts: int) -> Prompts:
    """The first `num_prompts` captions of a purpose: independent draws, always the same; pairs avoid unseen scenes."""
    scenes = sample_scenes(np.random.default_rng(_SEEDS[purpose]), num_prompts * (2 if purpose == "pairs" else 1))
    texts, ids = scenes.captions(), scenes.scene_ids()
    keep = [i for i in range(len(texts)) if purpose != "pairs" or not is_unseen(int(ids[i]))][:num_prompts]
    return Prompts([texts[i] for i in keep], ids[keep])
