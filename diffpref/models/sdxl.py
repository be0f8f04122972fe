"""SDXL: two CLIP text encoders, a pooled vector and the picture's size and crop condition the UNet."""

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
TURBO_TIMESTEPS = (249, 499, 749)
"""SDXL Turbo's noise levels without its last one, 999, which is pure noise: both pictures of a pair are the same input there and
a network that predicts noise has nothing to learn from them."""


def text_encoders(pipeline: DiffusionPipeline) -> list[Any]:
    """The text encoders of the pipeline, modules of transformers."""
    return [pipeline.text_encoder, pipeline.text_encoder_2]


def text_depths(pipeline: DiffusionPipeline) -> list[int]:
    """How many layers of each text encoder the UNet's input depends on: the first one's last layer is never used."""
    first, second = text_encoders(pipeline)
    return [first.config.num_hidden_layers - 1, second.config.num_hidden_layers]


def predictor(denoiser: nn.Module) -> Predict:
    """The UNet as a function over (G, K, ...); cond needs pooled_prompt_embeds and time_ids, user_embeds are tokens of its user branch."""

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        flat = cond.map(lambda x: x.flatten(0, 1))
        added = {"text_embeds": flat.pooled_prompt_embeds, "time_ids": flat.time_ids}
        user = user_kwargs(flat.user_embeds)
        out = denoiser(x_t.flatten(0, 1), timesteps.flatten(), flat.prompt_embeds, added_cond_kwargs=added, **user).sample
        return out.unflatten(0, x_t.shape[:2])

    return predict


def tokenize(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, 2, L) of N prompts for both encoders."""
    ids = [
        tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    return torch.stack(ids, 1)


def encode(encoders: Sequence[Any], token_ids: Tensor) -> Conditioning:
    """Token ids (N, 2, L) to prompt_embeds (N, 1, L, D1 + D2), the penultimate states, and the second encoder's pooled (N, 1, P)."""
    outs = [
        encoder(moved(ids, encoder.device), output_hidden_states=True) for encoder, ids in zip(encoders, token_ids.unbind(1), strict=True)
    ]
    states = torch.cat([out.hidden_states[-2] for out in outs], -1)
    return Conditioning(states[:, None], outs[-1][0][:, None])


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """N prompts to prompt_embeds (N, 1, L, D1 + D2) and pooled_prompt_embeds (N, 1, P)."""
    return encode(text_encoders(pipeline), tokenize(pipeline, prompts))


def null_prompt(pipeline: DiffusionPipeline) -> Conditioning:
    """What the pipeline uses for an empty prompt: zeros if its config says so (SDXL base), else the encoded empty string."""
    empty = encode_prompts(pipeline, [""])
    return empty.map(torch.zeros_like) if pipeline.config.force_zeros_for_empty_prompt else empty


def null_ids(pipeline: DiffusionPipeline) -> Tensor:
    """Token ids (1, 2, L) of the empty string, or -1 where the pipeline's empty prompt is zeros."""
    ids = tokenize(pipeline, [""])
    return torch.full_like(ids, -1) if pipeline.config.force_zeros_for_empty_prompt else ids
