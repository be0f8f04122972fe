"""Pictures from prompts and seeds: the same seed starts from the same latents in every model, batch and process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffpref.core.random import generator, normal

Images = np.ndarray
"""uint8 (N, H, W, 3)."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and how."""

    prompts: list[str]
    pictures_per_prompt: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    size: tuple[int, int] | None = None  # (height, width)

    @property
    def seeds(self) -> np.ndarray:
        """(P, S): every picture has a seed of its own, the same for all models."""
        grid = np.arange(len(self.prompts) * self.pictures_per_prompt, dtype=np.int64)
        return self.seed + grid.reshape(len(self.prompts), self.pictures_per_prompt)


def starting_latents(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal latents (N, *shape), each a function of its seed only."""
    return torch.stack([normal(shape, seed, "latents") for seed in seeds])


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 8,
    size: tuple[int, int] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> Images:
    """Sample one picture per (prompt, seed) with any SD or SDXL pipeline and its own scheduler.

    size: (height, width) in pixels, the model's own if None. on_batch: called with the number of finished pictures of each
    batch. Raises ValueError when prompts and seeds differ in number, or sides are not divisible by the VAE factor.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt")
    factor = pipeline.vae_scale_factor
    side = pipeline.unet.config.sample_size * factor
    height, width = size or (side, side)
    if height % factor or width % factor:
        raise ValueError(
            f"size {height}x{width} is not divisible by the VAE factor {factor}; "
            f"use e.g. {height // factor * factor}x{width // factor * factor}"
        )
    shape = (pipeline.unet.config.in_channels, height // factor, width // factor)
    chunks = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        latents = starting_latents(seeds[rows], shape).to(pipeline.device, pipeline.unet.dtype)
        generators = [generator(seed, "sampler") for seed in seeds[rows]]  # for samplers that add noise on the way
        with torch.inference_mode():
            out = pipeline(
                prompt=list(prompts[rows]),
                latents=latents,
                generator=generators,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="np",
            )
        chunks.append((out.images * 255).round().astype(np.uint8))
        if on_batch:
            on_batch(len(chunks[-1]))
    return np.concatenate(chunks)


def contact_sheet(rows: Sequence[Images], enlarge: int = 1, gap: int = 4) -> Image.Image:
    """Rows of equally sized pictures on white, each picture enlarged by a whole factor."""
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    cell_h, cell_w = height * enlarge + gap, width * enlarge + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, len(rows) * cell_h + gap), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + c * cell_w, gap + r * cell_h))
    return sheet


def as_rows(images: Images, columns: int | None = None) -> list[Images]:
    """Split N pictures into rows, by default about square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    return [images[i : i + columns] for i in range(0, len(images), columns)]
