"""What a run needs of a model, whatever its family, and loading from diffusers folders and hub ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, Predict
from diffpref.models import sd, sdxl
from diffpref.models.joint import TextAndUNet
from diffpref.models.lora import add_text_lora

FAMILIES = {"sd": sd, "sdxl": sdxl}


@dataclass(frozen=True)
class Backbone:
    """A loaded model as functions. `pipeline` stays complete, for sampling and export."""

    family: str  # "sd" or "sdxl"
    pipeline: DiffusionPipeline
    process: DdpmProcess
    predictor: Callable[[nn.Module], Predict]  # give it the wrapped denoiser, always
    encode_prompts: Callable[[Sequence[str]], Conditioning]  # N prompts -> (N, 1, ...), without time_ids; what `predictor` takes
    null_prompt: Callable[[], Conditioning]  # the empty prompt as the pipeline's guidance sees it, (1, 1, ...)

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.pipeline.unet

    @property
    def pixel_factor(self) -> int:
        """Image sides must be divisible by this: VAE factor times the UNet's own down-sampling."""
        return vae_factor(self.pipeline) * 2 ** (len(self.denoiser.config.down_block_types) - 1)

    @property
    def default_resolution(self) -> int:
        """Side in pixels that the UNet was configured for."""
        return int(self.denoiser.config.sample_size) * vae_factor(self.pipeline)

    @property
    def uses_time_ids(self) -> bool:
        """Whether the UNet is conditioned on image sizes and crops."""
        return self.family == "sdxl"

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] to mean and standard deviation of the latent (N, 2, C, h, w), in float32.

        The autoencoder runs in float32: SDXL's overflows in half precision.
        """
        vae = self.pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, torch.float32)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor


def with_text_encoders(backbone: Backbone, recompute: bool, **lora: Any) -> tuple[Backbone, TextAndUNet]:
    """A backbone whose trained module contains the text encoders, with adapters on them, and that module.

    Its prompts are token ids, which the module encodes itself. recompute: see TextAndUNet. lora: as in `add_text_lora`.
    """
    family = FAMILIES[backbone.family]
    add_text_lora(family.text_encoders(backbone.pipeline), family.text_depths(backbone.pipeline), **lora)
    return on_token_ids(backbone, recompute)


def on_token_ids(backbone: Backbone, recompute: bool = False) -> tuple[Backbone, TextAndUNet]:
    """A backbone whose prompts are token ids, and the module that encodes them with the pipeline's own text encoders."""
    family = FAMILIES[backbone.family]
    encoders = family.text_encoders(backbone.pipeline)
    named = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
    module = TextAndUNet(backbone.denoiser, named, family.encode, family.predictor, recompute)
    ids = replace(
        backbone,
        predictor=lambda wrapped: wrapped,
        encode_prompts=lambda prompts: Conditioning(token_ids=family.tokenize(backbone.pipeline, prompts)[:, None]),
        null_prompt=lambda: Conditioning(token_ids=family.null_ids(backbone.pipeline)[:, None]),
    )
    return ids, module


def vae_factor(pipeline: DiffusionPipeline) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def load_pipeline(source: str, revision: str | None = None, variant: str | None = None) -> DiffusionPipeline:
    """Load a diffusers folder or hub id in float32, from safetensors only.

    Raises ValueError when the source cannot be read as a diffusers pipeline.
    """
    try:
        config: dict[str, Any] = DiffusionPipeline.load_config(source, revision=revision)
        extra = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        pipeline = DiffusionPipeline.from_pretrained(source, revision=revision, variant=variant, use_safetensors=True, **extra)
    except (OSError, ValueError, KeyError) as error:
        place = "folder" if Path(source).exists() else "local folder or hub id"
        reason = " ".join(str(error).split())  # diffusers' own messages run over several lines
        raise ValueError(
            f"pretrained_model_name_or_path {source!r} could not be loaded as a diffusers pipeline ({reason}). "
            f"Give a {place} that holds model_index.json and .safetensors weights, as written by save_pretrained"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()
    return pipeline


def model_family(source: str, revision: str | None = None) -> str:
    """ "sd" or "sdxl", from the UNet's config alone. Raises ValueError when it cannot be read."""
    try:
        config = UNet2DConditionModel.load_config(source, subfolder="unet", revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained_model_name_or_path {source!r} has no readable UNet config ({error})") from error
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"


def load_backbone(source: str, revision: str | None = None, variant: str | None = None) -> Backbone:
    """Load a pipeline and detect its family from the UNet's config.

    Raises ValueError for a model that is neither of the SD nor of the SDXL family.
    """
    pipeline = load_pipeline(source, revision, variant)
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise ValueError(
            f"pretrained_model_name_or_path {source!r} is a {type(pipeline).__name__} without a UNet; SD and SDXL are supported"
        )
    kind = unet.config.addition_embed_type
    if kind not in (None, "text_time"):
        raise ValueError(
            f"pretrained_model_name_or_path {source!r}: UNet with addition_embed_type {kind!r}; "
            "SD (none) and SDXL (text_time) are supported"
        )
    name = "sdxl" if kind == "text_time" else "sd"
    family = FAMILIES[name]
    for part in (pipeline.vae, unet, *family.text_encoders(pipeline)):
        part.requires_grad_(False)
        part.eval()
    scheduler = pipeline.scheduler
    process = DdpmProcess.from_betas(scheduler.betas, scheduler.config.prediction_type)
    return Backbone(
        family=name,
        pipeline=pipeline,
        process=process,
        predictor=family.predictor,
        encode_prompts=lambda prompts: family.encode_prompts(pipeline, prompts),
        null_prompt=lambda: family.null_prompt(pipeline),
    )
