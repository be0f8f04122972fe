"""LoRA on the UNet: targets, attaching, reading and writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What save_lora writes."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "all": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"),
}
"""Named sets of UNet layers; "all" adds projections, feed-forwards and the residual blocks."""


def add_lora(denoiser: UNet2DConditionModel, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Attach a trainable adapter named "default": A Gaussian, B zero, so that the policy starts as the reference.

    targets: a key of TARGETS or layer names separated by commas. Raises ValueError when a name matches no layer.
    """
    names = list(TARGETS.get(targets, tuple(t.strip() for t in targets.split(",") if t.strip())))
    layers = [name for name, _ in denoiser.named_modules()]
    missing = [t for t in names if not any(layer == t or layer.endswith("." + t) for layer in layers)]
    if missing or not names:
        raise ValueError(
            f"lora_targets {targets!r}: no layer of the UNet is called {missing or 'so'}; "
            f"use {', '.join(TARGETS)} or layer names such as to_q,to_k"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
        denoiser.add_adapter(config)


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors with its alpha and rank to `folder`; `pipe.load_lora_weights(folder)` reads it.

    All names stay in PEFT's form: diffusers looks at the first name only, and its own older form exists for attention layers
    alone, so that a file with both would lose the attention layers in silence.
    """
    layers = get_peft_model_state_dict(pipeline.unet)
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers, **_collate_lora_metadata({"unet": pipeline.unet}))


def trainable_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, without a copy."""
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
