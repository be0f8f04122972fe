"""What a run starts from: the model, with parts and a LoRA from elsewhere, or an adapter that is trained further."""

from __future__ import annotations

import dataclasses
import sys

import torch
from accelerate import PartialState
from torch import nn

from diffpref.models.backbone import Backbone, as_backbone, load_pipeline, on_token_ids, with_text_encoders
from diffpref.models.lora import TARGETS
from diffpref.models.lora_file import load_adapter, merge_lora
from diffpref.training.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(config: TrainConfig, leave_out: bool = False) -> Backbone:
    """The model that policy and reference start with, and on stderr what the user might not expect of it.

    leave_out: autoencoder and text encoders come without weights.
    """
    source = str(config.pretrained_model_name_or_path)
    pipeline = load_pipeline(
        source,
        config.revision,
        config.variant,
        single_file_config=config.single_file_config,
        vae=config.pretrained_vae_model_name_or_path,
        unet_init=config.unet_init,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        dtype=DTYPES[config.base_dtype],
        leave_out=leave_out,
    )
    notes = []
    if config.start_lora and config.start_lora_as == "base":
        merge_lora(pipeline, config.start_lora, "start_lora")
    backbone = as_backbone(pipeline, source, config.is_turbo)
    if config.is_turbo:
        levels = ", ".join(map(str, backbone.process.timesteps.tolist()))
        notes.append(
            f"is_turbo: trained at timesteps {levels} on a schedule that ends in pure noise; its end, 999, is left out, because both "
            "pictures of a pair are the same noise there"
        )
    inside = [config.unet_init, config.start_lora if config.start_lora_as == "base" else None]
    named = " and ".join(name for name in inside if name)
    if named and config.tune == "lora":
        notes.append(f"the exported LoRA belongs to {source} with {named} in it; --merge_lora writes a model that needs neither")
    if PartialState().is_main_process:
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    return backbone


def start_adapter(config: TrainConfig, backbone: Backbone) -> tuple[Backbone, nn.Module]:
    """Attach start_lora as the adapter that is trained; the backbone whose predictor fits the trained module, and that module.

    Rank, alpha, layers and variant are the file's. With train_text_encoder, a file without layers of the text encoders is joined by
    new adapters of the UNet's rank. Raises ValueError for a file without UNet layers, with text encoder layers that are not trained,
    and for a setting that is neither the file's nor its default.
    """
    source = str(config.start_lora)
    lora = load_adapter(backbone.pipeline, source, "start_lora")
    if "unet" not in lora.tensors:
        raise ValueError(f"start_lora {source!r} has no layers of the UNet; use start_lora_as base")
    if len(lora.tensors) > 1 and not config.train_text_encoder:
        raise ValueError(
            f"start_lora {source!r} has layers of the text encoders, which are not trained; add train_text_encoder, or use "
            "start_lora_as base"
        )
    found = lora.configs["unet"]
    alpha = found.lora_alpha if found.lora_alpha != int(found.lora_alpha) else int(found.lora_alpha)
    theirs = {"rank": found.r, "lora_alpha": alpha, "use_dora": found.use_dora, "use_rslora": found.use_rslora}
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    for name, value in theirs.items():
        wanted = getattr(config, name)
        if wanted not in (value, defaults[name]):
            raise ValueError(f"{name} is {wanted}, but start_lora {source!r} has {value}; an adapter keeps its shape: leave {name} out")
    layers = {name.split(".lora_")[0] for name in lora.tensors["unet"]}
    names = TARGETS.get(config.lora_targets, tuple(t.strip() for t in config.lora_targets.split(",")))
    asked = {n.removesuffix(".base_layer") for n, _ in backbone.denoiser.named_modules()}
    asked = {layer for layer in asked if any(layer == t or layer.endswith("." + t) for t in names)}
    if config.lora_targets != defaults["lora_targets"] and asked != layers:
        raise ValueError(
            f"lora_targets is {config.lora_targets!r}, which means {len(asked)} layers, but start_lora {source!r} has {len(layers)} "
            "others or fewer; an adapter keeps its layers: leave lora_targets out"
        )
    if PartialState().is_main_process:
        said = ", ".join(f"{name} {value}" for name, value in theirs.items())
        print(f"start_lora: the adapter is trained further as it is: {said}, {len(layers)} layers of the UNet", file=sys.stderr)
    if len(lora.tensors) > 1:
        return on_token_ids(backbone, config.gradient_checkpointing != "off")
    if not config.train_text_encoder:
        return backbone, backbone.denoiser
    options = {"rank": found.r, "alpha": found.lora_alpha, "use_rslora": found.use_rslora}
    return with_text_encoders(backbone, config.gradient_checkpointing != "off", seed=config.seed, **options)
