"""The model of a run: loaded, made trainable, and the frozen copy that full training compares with."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from diffpref.core.types import Conditioning
from diffpref.data.buckets import bucket_shapes
from diffpref.models.attention import Size, use_attention
from diffpref.models.backbone import Backbone, check_finite, vae_factor, with_text_encoders
from diffpref.models.execution import compile_regions, set_recompute
from diffpref.models.lora import add_lora
from diffpref.models.packed import pack
from diffpref.models.pipeline import complete
from diffpref.training.config import TrainConfig
from diffpref.training.device import DTYPES
from diffpref.training.encoded import encoded_before
from diffpref.training.objective import Objective
from diffpref.training.port import Port
from diffpref.training.start import DTYPES as DTYPES_OF_WEIGHTS
from diffpref.training.start import load_base, start_adapter


def has_errors(config: TrainConfig) -> bool:
    """Whether the errors of the reference lie in a file, so that nothing else is asked of it."""
    return config.reference_errors is not None and Path(config.reference_errors).exists() and not config.validation_steps


def load_models(
    config: TrainConfig, objective: Objective, device: torch.device, port: Port | None = None, precision: str = "no"
) -> tuple[Backbone, nn.Module, nn.Module | None]:
    """The model on its device, its trained module, and the frozen copy that full training compares with, if there is one.

    precision: of the forward passes, as accelerate calls it. A kernel of attention that does not work here is replaced, with a line.
    """
    null = None if port is not None else encoded_before(config)
    backbone = load_base(config, leave_out=null is not None)
    factor = vae_factor(backbone.pipeline)
    sizes = [(height // factor, width // factor) for height, width in picture_sizes(config, backbone)]
    if null is None:
        backbone.pipeline.to(device)
    else:
        backbone = without_encoders(config, backbone, null, device)
    check_finite(backbone, str(config.pretrained_model_name_or_path))
    dtype = DTYPES.get(precision, torch.float32)
    images = objective.groups_at_once(config.train_batch_size) * (objective.images_per_group or 2)
    note = use_attention(backbone.denoiser, config.attention, sizes, images, dtype, is_training=True)
    if note is not None and PartialState().is_main_process:
        print(note, file=sys.stderr)
    if config.channels_last:
        backbone.denoiser.to(memory_format=torch.channels_last)
    if port is None or objective.has_adapter:
        backbone, module = make_trainable(config, backbone)
    if port is not None:
        backbone, module = port.attach(config, backbone)
    is_frozen = config.tune == "full" and objective.needs_reference and not (config.reference_update_steps or has_errors(config))
    reference = copy.deepcopy(module) if is_frozen else None
    if config.pack_weights:
        if device.type != "cpu" or precision != "no":
            where = f"{device.type} with mixed_precision {precision}"
            raise ValueError(f"pack_weights is true on {where}; it is for a CPU with mixed_precision no: leave it out")
        pack(backbone.denoiser, images)
    set_recompute(backbone.denoiser, config.gradient_checkpointing)
    module.eval()  # dropout would make policy and reference differ; even of probability 0 it changes memory layouts, and so rounding
    if config.compile:
        if port is not None:
            raise ValueError(
                f"compile is true, but method {objective.name} has a user branch, without which its reference is another graph"
            )
        for network in (module, reference):
            if network is not None:
                compile_regions(network, config.compile_backend)
    return backbone, module, reference


def without_encoders(config: TrainConfig, backbone: Backbone, null: Conditioning, device: torch.device) -> Backbone:
    """A backbone whose encoders were left out: only its UNet is on the device, and its empty prompt is the stored one."""
    backbone.denoiser.to(device)
    source, dtype = str(config.pretrained_model_name_or_path), DTYPES_OF_WEIGHTS[config.base_dtype]
    finish = partial(complete, backbone.pipeline, source, config.variant, dtype, device)
    return replace(backbone, null_prompt=lambda: null.map(lambda x: x.to(device, dtype)), complete=finish)


def make_trainable(config: TrainConfig, backbone: Backbone) -> tuple[Backbone, nn.Module]:
    """Attach adapters, or unfreeze the UNet; the backbone whose predictor fits the trained module, and that module.

    The model is on its device already: the norms that DoRA starts from are then those that its forward pass computes.
    """
    if config.tune == "full":
        return backbone, backbone.denoiser.requires_grad_(True)
    if config.start_lora and config.start_lora_as == "adapter":
        return start_adapter(config, backbone)
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    denoiser, seed, rslora = backbone.denoiser, config.seed, config.use_rslora
    add_lora(denoiser, config.rank, alpha, config.lora_targets, seed, use_dora=config.use_dora, use_rslora=rslora)
    if not config.train_text_encoder:
        return backbone, denoiser
    return with_text_encoders(backbone, config.gradient_checkpointing != "off", rank=config.rank, alpha=alpha, seed=seed, use_rslora=rslora)


def picture_sizes(config: TrainConfig, backbone: Backbone) -> tuple[Size, ...]:
    """Height and width of the pictures: one size, or those of all buckets. Raises ValueError for what the model cannot take."""
    resolution, factor = check_resolution(config, backbone), backbone.pixel_factor
    if not config.aspect_ratio_buckets:
        return ((resolution, resolution),)
    if config.bucket_step % factor:
        near = math.ceil(config.bucket_step / factor) * factor
        raise ValueError(
            f"bucket_step is {config.bucket_step}; this model needs a multiple of {factor} (VAE and UNet down-sampling), for example {near}"
        )
    return bucket_shapes(resolution, config.bucket_step)


def check_resolution(config: TrainConfig, backbone: Backbone) -> int:
    """The training resolution. Raises ValueError when the model cannot take it."""
    resolution, factor = config.resolution or backbone.default_resolution, backbone.pixel_factor
    if resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise ValueError(
            f"resolution is {resolution}; this model needs a multiple of {factor} (VAE and UNet down-sampling), for example {near}"
        )
    return resolution
