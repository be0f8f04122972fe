"""The testbed's ground truth: a structural reward that no pixel filter can raise, and the tastes of simulated users.

    reward = 3 place + 1 upright + 1 beside + 1 form              range [0, 6]

    place    1 - distance(object centre, PREFERRED_POINT) / 24 px, at least 0
    upright  1 - tilt / 30 degrees, at least 0; 1 for circle and ring, which have no posture
    beside   (1 + cos(direction of the companion from the object)) / 2: 1 right of it, 0 left of it or absent
    form     share of the stated shape and size that the picture shows

Colours are in no part of it: the stated ones are checked apart (checker.follows), the unstated appear in tastes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffpref.testbed.checker import Reading, follows, read
from diffpref.testbed.world import IMAGE_SIZE

PREFERRED_POINT = (22.0, 22.0)
"""Pixels from the left and the top; the base model's objects centre around (32, 32)."""
REACH = 24.0
"""Distance in pixels at which the place part reaches 0."""
WEIGHTS: Mapping[str, float] = {"place": 3.0, "upright": 1.0, "beside": 1.0, "form": 1.0}

TASTES: Mapping[str, Mapping[str, float]] = {
    "left": {"left": 3.0, "follow": 2.0},
    "right": {"right": 3.0, "follow": 2.0},
    "upright": {"upright": 3.0, "follow": 2.0},
    "leaning": {"leaning": 3.0, "follow": 2.0},
    "alone": {"alone": 2.0, "follow": 2.0},
    "accompanied": {"accompanied": 2.0, "follow": 2.0},
    "vivid": {"vivid": 3.0, "follow": 2.0},
    "muted": {"muted": 3.0, "follow": 2.0},
}
"""Weights over named qualities for simulated users; neighbours in the list contradict each other."""


def qualities(reading: Reading, prompts: list[str]) -> dict[str, np.ndarray]:
    """Every named quality of N pictures, each float64 (N,) in [0, 1]."""
    distance = np.hypot(reading.x - PREFERRED_POINT[0], reading.y - PREFERRED_POINT[1])
    lean = np.clip(np.nan_to_num(reading.tilt, nan=0.0) / 30.0, 0, 1)
    direction = np.radians(np.nan_to_num(reading.companion_angle))
    followed = follows(reading, prompts)
    left, high = (np.clip((44.0 - centre) / 24.0, 0, 1) for centre in (reading.x, reading.y))
    vivid = reading.saturation * (0.5 + 0.5 * reading.value)
    return {
        "place": np.clip(1 - distance / REACH, 0, 1),
        "upright": 1 - lean,
        "beside": np.where(reading.companion, 0.5 + 0.5 * np.cos(direction), 0.0),
        "form": np.mean([followed["shape"], followed["size"]], axis=0),
        "follow": np.mean(list(followed.values()), axis=0),
        "left": left,
        "right": 1 - left,
        "high": high,
        "low": 1 - high,
        "leaning": lean,
        "alone": 1.0 - reading.companion,
        "accompanied": 1.0 * reading.companion,
        "vivid": vivid,
        "muted": 1 - vivid,
    }


def reward_parts(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """The unweighted parts of the primary reward of uint8 images (N, 64, 64, 3), each (N,) in [0, 1]."""
    found = qualities(read(images), prompts)
    return {name: found[name] for name in WEIGHTS}


def reward(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The primary reward, float64 (N,) in [0, 6]."""
    return total(reward_parts(images, prompts))


@dataclass(frozen=True)
class TrueReward:
    """The primary reward as a scorer."""

    name: str = "testbed"
    version: str = "true reward"
    convention: str = " + ".join(f"{weight:g} {part}" for part, weight in WEIGHTS.items()) + ", read from the pixels; 0 to 6"

    def __call__(self, images: Sequence[Image.Image] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float64 (N,) of arrays or of pictures as they were decoded. Raises ValueError for another size and for unknown prompts."""
        sizes = {np.asarray(image).shape for image in images}
        if sizes - {(IMAGE_SIZE, IMAGE_SIZE, 3)}:
            raise ValueError(
                f"scorer testbed reads RGB pictures of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, not {sorted(sizes)[0]}; use another scorer"
            )
        return reward(np.stack([np.asarray(image) for image in images]), list(prompts))


def total(parts: Mapping[str, np.ndarray], weights: Mapping[str, float] = WEIGHTS) -> np.ndarray:
    """Weighted sum of named parts (N,)."""
    return sum((w * parts[name] for name, w in weights.items()), np.zeros(len(next(iter(parts.values())))))


def user_score(taste: str, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """What a simulated user of TASTES thinks of pictures, float64 (N,). Raises ValueError for an unknown taste."""
    if taste not in TASTES:
        raise ValueError(f"taste {taste!r} is not one of {', '.join(TASTES)}")
    return total(qualities(read(images), prompts), TASTES[taste])


def unrewarded(reading: Reading) -> dict[str, np.ndarray]:
    """Attributes that neither caption nor reward mentions, whose spread measures diversity. (N,) each."""
    return {
        "object_saturation": reading.saturation,
        "object_value": reading.value,
        "background_saturation": reading.background_saturation,
        "background_value": reading.background_value,
        "shading": reading.shading,
    }
