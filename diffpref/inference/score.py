"""An aligned model and its base as a scorer of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffpref.core.types import Conditioning
from diffpref.models.backbone import Backbone, load_backbone, on_token_ids, text_encoders
from diffpref.models.lora_file import merge_lora
from diffpref.scorers.implicit import ImplicitReward, implicit_scorer

Scorer = Callable[[np.ndarray, Sequence[str]], Tensor]
"""(uint8 pictures (N, H, W, 3), N prompts) -> float32 (N,), higher is better."""


def load_implicit_scorer(base: str, aligned: str | None = None, lora: str | None = None, num_draws: int = 10, seed: int = 0) -> Scorer:
    """The implicit reward of an aligned model, or of a LoRA file or folder, relative to its base.

    base and aligned: a diffusers folder, a hub id or a single file whose configs can be had.
    Pictures must be squares that the model can take. Raises ValueError unless exactly one of aligned and lora is given, and for
    what cannot be loaded.
    """
    if (aligned is None) == (lora is None):
        raise ValueError(f"aligned is {aligned!r} and lora is {lora!r}; give one of them")
    reference, policy = load_backbone(base), load_backbone(aligned or base)
    if lora:
        merge_lora(policy.pipeline, lora, "lora")
    for backbone in (reference, policy):
        backbone.denoiser.eval()
    modules = [policy.denoiser, reference.denoiser]
    if not same_text_encoders(policy, reference):  # then each encodes the prompts itself
        (policy, modules[0]), (reference, modules[1]) = on_token_ids(policy), on_token_ids(reference)
    predict = [b.predictor(module) for b, module in zip((policy, reference), modules, strict=True)]
    reward = ImplicitReward(predict[0], predict[1], reference.process, seed, num_draws)

    def encode_images(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return reference.encode_moments(pixels)[:, 0]

    def score(images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        side = images.shape[1]
        return implicit_scorer(reward, encode_images, lambda texts: with_time_ids(reference, texts, side))(images, prompts)

    return score


def same_text_encoders(a: Backbone, b: Backbone) -> bool:
    """Whether two models of one family turn prompts into the same conditioning: equal weights."""
    states = [{f"{i}.{n}": x for i, part in enumerate(text_encoders(m)) for n, x in part.state_dict().items()} for m in (a, b)]
    return states[0].keys() == states[1].keys() and all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def with_time_ids(backbone: Backbone, prompts: Sequence[str], side: int) -> Conditioning:
    """Text conditioning (N, 1, ...) of uncropped square pictures of `side` pixels."""
    cond = backbone.encode_prompts(prompts)
    if not backbone.uses_time_ids:
        return cond
    time_ids = torch.tensor([side, side, 0, 0, side, side]).float().expand(len(prompts), 1, 6)
    return replace(cond, time_ids=time_ids)
