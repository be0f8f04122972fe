"""SD1.x and SD2.x: one CLIP text encoder, its last hidden state conditions the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpref.core.random import moved
from diffpref.core.types import Conditioning, Predict
from diffpref.models.user_attention import user_kwargs

TIMESTEPS: tuple[int, ...] | None = None
"""What the family was trained at: every timestep."""


def text_encoders(pipeline: DiffusionPipeline) -> list[Any]:
    """The text encoders of the pipeline, modules of transformers."""
    return [pipeline.text_encoder]


def text_depths(pipeline: DiffusionPipeline) -> list[int]:
    """How many layers of each text encoder the UNet's input depends on: all."""
    return [pipeline.text_encoder.config.num_hidden_layers]


def predictor(denoiser: nn.Module) -> Predict:
    """The UNet as a function over (G, K, ...); user_embeds are tokens of its user branch, if it has one."""

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        flat = cond.map(lambda x: x.flatten(0, 1))
        out = denoiser(x_t.flatten(0, 1), timesteps.flatten(), flat.prompt_embeds, **user_kwargs(flat.user_embeds)).sample
        return out.unflatten(0, x_t.shape[:2])

    return predict


def tokenize(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, 1, L) of N prompts."""
    tokenizer = pipeline.tokenizer
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids[:, None]


def encode(encoders: Sequence[Any], token_ids: Tensor) -> Conditioning:
    """Token ids (N, 1, L) to prompt_embeds (N, 1, L, D): the encoder's last hidden state."""
    (encoder,) = encoders
    return Conditioning(encoder(moved(token_ids[:, 0], encoder.device))[0][:, None])


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """N prompts to prompt_embeds (N, 1, L, D)."""
    return encode(text_encoders(pipeline), tokenize(pipeline, prompts))


def null_prompt(pipeline: DiffusionPipeline) -> Conditioning:
    """The encoded empty string (1, 1, L, D)."""
    return encode_prompts(pipeline, [""])


def null_ids(pipeline: DiffusionPipeline) -> Tensor:
    """Token ids (1, 1, L) of the empty string."""
    return tokenize(pipeline, [""])
