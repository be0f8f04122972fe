"""The model of a run: loaded, made trainable, and the frozen copy that full training compares with."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel

from diffpref.methods import Method
from diffpref.models.backbone import Backbone, load_backbone
from diffpref.models.lora import add_lora
from diffpref.training.config import TrainConfig


def load_models(config: TrainConfig, method: Method, device: torch.device) -> tuple[Backbone, UNet2DConditionModel | None]:
    """The model with a trainable UNet, and the frozen copy that full training compares with, if the method needs one."""
    backbone = load_backbone(str(config.pretrained_model_name_or_path), config.revision, config.variant)
    check_resolution(config, backbone)
    denoiser = backbone.denoiser
    make_trainable(config, denoiser)
    reference = copy.deepcopy(denoiser) if config.tune == "full" and method.needs_reference else None
    backbone.pipeline.to(device)
    if reference is not None:
        reference.to(device)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.eval()  # dropout would make policy and reference differ; even of probability 0 it changes memory layouts, and so rounding
    return backbone, reference


def make_trainable(config: TrainConfig, denoiser: UNet2DConditionModel) -> None:
    """Attach an adapter, or unfreeze the UNet."""
    if config.tune == "lora":
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        add_lora(denoiser, config.rank, alpha, config.lora_targets, config.seed)
    else:
        denoiser.requires_grad_(True)


def check_resolution(config: TrainConfig, backbone: Backbone) -> int:
    """The training resolution. Raises ValueError when the model cannot take it."""
    resolution, factor = config.resolution or backbone.default_resolution, backbone.pixel_factor
    if resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise ValueError(
            f"resolution is {resolution}; this model needs a multiple of {factor} (VAE and UNet down-sampling), for example {near}"
        )
    return resolution
