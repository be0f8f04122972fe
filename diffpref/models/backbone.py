"""What a run needs of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffpref.core.process import DdpmProcess
from diffpref.core.random import moved
from diffpref.core.types import Conditioning, Predict
from diffpref.models import sd, sdxl, sdxl_refiner
from diffpref.models.family import SETTING, family_of_config, model_family
from diffpref.models.joint import TextAndUNet
from diffpref.models.lora import add_text_lora, freeze_unreached
from diffpref.models.outlines import is_outline
from diffpref.models.pipeline import load_pipeline

__all__ = [
    "FAMILIES",
    "Backbone",
    "as_backbone",
    "check_finite",
    "load_backbone",
    "load_pipeline",
    "model_family",
    "on_token_ids",
    "vae_factor",
    "with_text_encoders",
]

FAMILIES: Mapping[str, ModuleType] = {"sd": sd, "sdxl": sdxl, "sdxl_refiner": sdxl_refiner}
"""The files of this folder that know a family."""


@dataclass(frozen=True)
class Backbone:
    """A loaded model as functions. `pipeline` stays complete, for sampling and export."""

    family: str  # a key of FAMILIES
    pipeline: DiffusionPipeline
    process: DdpmProcess
    predictor: Callable[[nn.Module], Predict]  # give it the wrapped denoiser, always
    encode_prompts: Callable[[Sequence[str]], Conditioning]  # N prompts -> (N, 1, ...), without time_ids; what `predictor` takes
    null_prompt: Callable[[], Conditioning]  # the empty prompt as the pipeline's guidance sees it, (1, 1, ...)
    complete: Callable[[], None] = field(default=lambda: None)  # loads parts that were left out, before a picture or an export needs them

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
        return self.denoiser.config.addition_embed_type == "text_time"

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] to mean and standard deviation of the latent (N, 2, C, h, w), in float32.

        The autoencoder runs in float32: SDXL's overflows in half precision.
        """
        vae = self.pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(moved(pixels, vae.device).float()).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor

    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Latents (N, C, h, w) to pixels (N, 3, H, W), about [0, 1] but not clamped, float32; dtype: of the autoencoder's products."""
        vae = self.pipeline.vae
        half = dtype != torch.float32
        with torch.no_grad(), torch.autocast(latents.device.type, dtype if half else None, enabled=half):
            return vae.decode(latents.to(vae.device, torch.float32) / vae.config.scaling_factor).sample.float() / 2 + 0.5


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
    freeze_unreached(encoders, family.text_depths(backbone.pipeline))
    named = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
    module = TextAndUNet(backbone.denoiser, named, family.encode, family.predictor, recompute)
    ids = replace(
        backbone,
        predictor=lambda wrapped: wrapped,
        encode_prompts=lambda prompts: Conditioning(token_ids=family.tokenize(backbone.pipeline, prompts)[:, None]),
        null_prompt=lambda: Conditioning(token_ids=family.null_ids(backbone.pipeline)[:, None]),
    )
    return ids, module


def text_encoders(backbone: Backbone) -> list[nn.Module]:
    """The text encoders of a model."""
    return FAMILIES[backbone.family].text_encoders(backbone.pipeline)


def vae_factor(pipeline: DiffusionPipeline) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def load_backbone(source: str, revision: str | None = None, variant: str | None = None) -> Backbone:
    """Load a model as it is. Raises ValueError for what is no model of a supported family."""
    return as_backbone(load_pipeline(source, revision, variant), source)


def as_backbone(pipeline: DiffusionPipeline, source: str, is_turbo: bool = False) -> Backbone:
    """A loaded pipeline, frozen and in evaluation mode, with the functions of its family; `source` names it in errors.

    is_turbo: the noise levels of SDXL Turbo, on a schedule that ends in pure noise. The pipeline's scheduler stays: Turbo is sampled
    on the schedule that its scheduler describes. Raises ValueError for another family than SDXL there, and for a network that
    predicts noise on a schedule that ends in pure noise, from which no picture follows.
    """
    pooled = getattr(pipeline, "text_encoder_2", None)
    name = family_of_config(pipeline.unet.config, pooled.config.projection_dim if pooled is not None else 0, source)
    family = FAMILIES[name]
    for part in (pipeline.vae, pipeline.unet, *family.text_encoders(pipeline)):
        part.requires_grad_(False)
        part.eval()
    scheduler = pipeline.scheduler
    process = replace(DdpmProcess.from_betas(scheduler.betas, scheduler.config.prediction_type), trained_at=family.TIMESTEPS)
    if is_turbo:
        if name != "sdxl":
            raise ValueError(f"is_turbo is true, but {SETTING} {source!r} is of the {name} family; Turbo is an SDXL model")
        process = replace(process.with_zero_terminal_snr(), trained_at=sdxl.TURBO_TIMESTEPS)
    elif process.has_zero_terminal_snr and process.prediction_type == "epsilon":
        raise ValueError(
            f"rescale_betas_zero_snr is true for {SETTING} {source!r}, whose UNet predicts noise: at the last timestep the input is "
            "pure noise and says nothing about the picture. Use prediction_type v_prediction if the UNet was trained so, is_turbo for "
            "SDXL Turbo, or rescale_betas_zero_snr false"
        )
    return Backbone(
        family=name,
        pipeline=pipeline,
        process=process,
        predictor=family.predictor,
        encode_prompts=lambda prompts: family.encode_prompts(pipeline, prompts),
        null_prompt=lambda: family.null_prompt(pipeline),
    )


@torch.no_grad()
def check_finite(backbone: Backbone, source: str) -> None:
    """Encode one picture and one prompt and look at the weights of UNet and text encoders, before anything is trained.

    Parts that were left out are passed over. Raises ValueError naming the part whose numbers are not finite: weights that overflowed
    when they were cast to fp16, or a damaged file.
    """
    if is_outline(backbone.pipeline.vae):
        _refuse(source, {"UNet": _is_finite(backbone.denoiser)})
        return
    side = backbone.pixel_factor * 2
    ramp = torch.linspace(-1, 1, side).expand(1, 3, side, side)
    cond = backbone.encode_prompts(["a photograph of a cat"])
    texts = [x for x in (cond.prompt_embeds, cond.pooled_prompt_embeds) if x is not None]
    encoders = [getattr(backbone.pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    encoder_weights = (p.sum() for encoder in encoders if encoder is not None for p in encoder.parameters())
    found = {
        "autoencoder": bool(torch.isfinite(backbone.encode_moments(ramp)).all()),
        "text encoder": all(bool(torch.isfinite(x).all()) for x in [*texts, *encoder_weights]),
        "UNet": _is_finite(backbone.denoiser),
    }
    _refuse(source, found)


def _is_finite(network: nn.Module) -> bool:
    return all(bool(torch.isfinite(p.sum())) for p in network.parameters())


def _refuse(source: str, found: Mapping[str, bool]) -> None:
    """Raises ValueError for the first part that is not finite."""
    remedies = {
        "autoencoder": "an autoencoder that fits into fp16 (for SDXL pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix)",
        "text encoder": "weights in float32 or bf16 (another variant)",
        "UNet": "weights in float32 or bf16 (another variant, or another unet_init)",
    }
    for part, is_finite in found.items():
        if not is_finite:
            raise ValueError(
                f"the {part} of {SETTING} {source!r} gives values that are not finite: its weights are damaged or overflowed in fp16; "
                f"use {remedies[part]}"
            )
