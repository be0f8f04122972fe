"""SD1.x and SD2.x: one CLIP text encoder, its last hidden state conditions the UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpref.core.types import Conditioning, Predict


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The frozen text encoders of the pipeline."""
    return [pipeline.text_encoder]


def predictor(denoiser: nn.Module) -> Predict:
    """The UNet as a function over (G, K, ...)."""

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        out = denoiser(x_t.flatten(0, 1), timesteps.flatten(), cond.prompt_embeds.flatten(0, 1)).sample
        return out.unflatten(0, x_t.shape[:2])

    return predict


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """N prompts to prompt_embeds (N, 1, L, D): the encoder's last hidden state."""
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return Conditioning(encoder(ids.to(encoder.device))[0][:, None])


def null_prompt(pipeline: DiffusionPipeline) -> Conditioning:
    """The encoded empty string (1, 1, L, D)."""
    return encode_prompts(pipeline, [""])
