"""SDXL: two CLIP text encoders, a pooled vector and the picture's size and crop condition the UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpref.core.types import Conditioning, Predict


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The frozen text encoders of the pipeline."""
    return [pipeline.text_encoder, pipeline.text_encoder_2]


def predictor(denoiser: nn.Module) -> Predict:
    """The UNet as a function over (G, K, ...); cond needs pooled_prompt_embeds and time_ids."""

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        flat = cond.map(lambda x: x.flatten(0, 1))
        added = {"text_embeds": flat.pooled_prompt_embeds, "time_ids": flat.time_ids}
        out = denoiser(x_t.flatten(0, 1), timesteps.flatten(), flat.prompt_embeds, added_cond_kwargs=added).sample
        return out.unflatten(0, x_t.shape[:2])

    return predict


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """N prompts to prompt_embeds (N, 1, L, D1 + D2), the penultimate states, and the second encoder's pooled vector (N, 1, P)."""
    states = []
    pooled = torch.empty(0)
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled = out[0]
    return Conditioning(torch.cat(states, -1)[:, None], pooled[:, None])


def null_prompt(pipeline: DiffusionPipeline) -> Conditioning:
    """What the pipeline uses for an empty prompt: zeros if its config says so (SDXL base), else the encoded empty string."""
    empty = encode_prompts(pipeline, [""])
    return empty.map(torch.zeros_like) if pipeline.config.force_zeros_for_empty_prompt else empty
