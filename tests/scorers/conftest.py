"""Folders with the files of every scorer, and pictures of odd shapes and modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scorers.released import write_released


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """released(name of a scorer) -> the folder with its files; one for the whole session, not to be changed."""

    @cache
    def folder(name: str) -> Path:
        return write_released(name, tmp_path_factory.mktemp("released") / name)

    return folder


@pytest.fixture(scope="session")
def pictures() -> tuple[Image.Image, ...]:
    """Square, portrait with an odd margin, panorama, RGBA, greyscale, palette, 1 pixel wide, and smaller than the model's input."""

    def noise(seed: int, width: int, height: int) -> Image.Image:
        small = np.random.default_rng(seed).integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)

    transparent = noise(3, 40, 33)
    transparent.putalpha(Image.linear_gradient("L").resize((40, 33)))
    return (
        *(noise(0, 64, 64), noise(1, 30, 51), noise(2, 160, 20)),
        *(transparent, noise(4, 45, 60).convert("L"), noise(5, 50, 41).convert("P")),
        *(noise(6, 1, 90), noise(7, 9, 11), noise(8, 28, 28)),
    )
