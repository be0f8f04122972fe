"""Which captions belong to which purpose. Some scenes never occur in pairs, to measure what carries over to unseen ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffpref.core.random import uniform
from diffpref.testbed.world import sample_scenes

Purpose = Literal["pairs", "validation", "test"]
_SEEDS = {"pairs": 11, "validation": 22, "test": 33}
UNSEEN_SHARE = 0.2
_CHUNK = 64  # scenes are drawn in chunks, so that more prompts begin with the same ones


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
    texts: list[str] = []
    ids: list[int] = []
    for chunk in itertools.count():
        scenes = sample_scenes(np.random.default_rng([_SEEDS[purpose], chunk]), _CHUNK)
        for text, scene in zip(scenes.captions(), scenes.scene_ids().tolist(), strict=True):
            if purpose != "pairs" or not is_unseen(scene):
                texts.append(text)
                ids.append(scene)
        if len(texts) >= num_prompts:
            break
    return Prompts(texts[:num_prompts], np.array(ids[:num_prompts]))
