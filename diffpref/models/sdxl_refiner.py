"""SDXL's refiner: the second text encoder alone, an aesthetic score in place of the target size, and the least noisy fifth of levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpref.core.types import Conditioning, Predict
from diffpref.models import sdxl

TIMESTEPS: tuple[int, ...] = tuple(range(200))
"""What it was trained at (arXiv:2307.01952, section 2.5); the authors' Diffusion-DPO script takes t mod 200."""
AESTHETIC_SCORE = 6.0
"""What the pipeline asks for; the authors' Diffusion-DPO script has it too."""


def text_encoders(pipeline: DiffusionPipeline) -> list[Any]:
    """The text encoder of the pipeline, a module of transformers."""
    return [pipeline.text_encoder_2]


def text_depths(pipeline: DiffusionPipeline) -> list[int]:
    """How many layers of the text encoder the UNet's input depends on: all, through the pooled vector."""
    return [pipeline.text_encoder_2.config.num_hidden_layers]


def predictor(denoiser: nn.Module) -> Predict:
    """The UNet as a function over (G, K, ...); cond.time_ids has SDXL's six numbers, or already the refiner's five.

    The five are height, width, top, left of the original picture, and the aesthetic score.
    """
    base = sdxl.predictor(denoiser)

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        times = cond.time_ids
        if times is not None and times.shape[-1] == 6:
            times = torch.cat([times[..., :4], torch.full_like(times[..., :1], AESTHETIC_SCORE)], -1)
        return base(x_t, timesteps, replace(cond, time_ids=times))

    return predict


def tokenize(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, 1, L) of N prompts."""
    tokenizer = pipeline.tokenizer_2
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids[:, None]


encode = sdxl.encode
"""Token ids (N, 1, L) to prompt_embeds (N, 1, L, D), the penultimate state, and pooled_prompt_embeds (N, 1, P)."""


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """N prompts to prompt_embeds (N, 1, L, D) and pooled_prompt_embeds (N, 1, P)."""
    return encode(text_encoders(pipeline), tokenize(pipeline, prompts))


def null_prompt(pipeline: DiffusionPipeline) -> Conditioning:
    """The encoded empty string, or zeros if the pipeline's config says so."""
    empty = encode_prompts(pipeline, [""])
    return empty.map(torch.zeros_like) if pipeline.config.force_zeros_for_empty_prompt else empty


def null_ids(pipeline: DiffusionPipeline) -> Tensor:
    """Token ids (1, 1, L) of the empty string, or -1 where the pipeline's empty prompt is zeros."""
    ids = tokenize(pipeline, [""])
    return torch.full_like(ids, -1) if pipeline.config.force_zeros_for_empty_prompt else ids
