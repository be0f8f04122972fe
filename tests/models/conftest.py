"""Tiny pipelines of every kind of SD and SDXL model, in shapes that differ from each other as the real ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpref.models.single_file import to_original_layout

FIRST, SECOND, POOLED, TIMES = 16, 24, 20, 4  # widths: CLIP, OpenCLIP, its projection, an embedded number of time_ids
DOWN, CROSS = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

Make = Callable[..., DiffusionPipeline]


def new_unet(blocks: list[tuple[str, str]], text_width: int, layers: int, **options: Any) -> UNet2DConditionModel:
    """A UNet with these (down, up) block types, mirrored as in SD."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8 * (i + 1) for i in range(len(blocks))],
        layers_per_block=layers,
        down_block_types=[down for down, _ in blocks],
        up_block_types=[up for _, up in reversed(blocks)],
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=text_width,
        **options,
    )


def text_time(pooled: int, numbers: int) -> dict[str, Any]:
    """SDXL's additional conditioning."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIMES,
        "projection_class_embeddings_input_dim": numbers * TIMES + pooled,
        "use_linear_projection": True,
    }


def new_vae(scaling_factor: float = 0.18215, channels: int = 4) -> AutoencoderKL:
    """Three levels of different widths."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 12),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def new_encoder(cls: type, tokenizer: CLIPTokenizer, width: int, layers: int, act: str, projection: int = POOLED) -> Any:
    """A CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=act,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config)


def new_scheduler(**options: Any) -> EulerDiscreteScheduler:
    """The sampler that SDXL is published with, on the noise schedule of SD."""
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1} | options
    return EulerDiscreteScheduler(timestep_spacing="leading", **options)


@pytest.fixture(scope="session")
def new_pipeline(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Make:
    """new_pipeline(kind, **scheduler options) -> sd1, sd2, sdxl or refiner with random weights."""
    first, second = tokenizers

    def sd(text_width: int, act: str, layers: int, unet: UNet2DConditionModel, scheduler: dict[str, Any]) -> DiffusionPipeline:
        return StableDiffusionPipeline(
            vae=new_vae(),
            text_encoder=new_encoder(CLIPTextModel, first, text_width, layers, act),
            tokenizer=first,
            unet=unet,
            scheduler=new_scheduler(**scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def make(kind: str, **scheduler: Any) -> DiffusionPipeline:
        torch.manual_seed(3)
        if kind == "sd1":
            return sd(FIRST, "quick_gelu", 2, new_unet([CROSS, DOWN], FIRST, 2), scheduler)
        if kind == "sd2":
            return sd(SECOND, "gelu", 3, new_unet([CROSS, DOWN], SECOND, 1, use_linear_projection=True), scheduler)
        open_clip = new_encoder(CLIPTextModelWithProjection, second, SECOND, 3, "gelu")
        if kind == "refiner":
            return StableDiffusionXLImg2ImgPipeline(
                vae=new_vae(0.13025),
                text_encoder=None,
                text_encoder_2=open_clip,
                tokenizer=None,
                tokenizer_2=second,
                unet=new_unet([DOWN, CROSS, CROSS, DOWN], SECOND, 1, **text_time(POOLED, 5)),
                scheduler=new_scheduler(**scheduler),
                requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
            )
        unet = new_unet([DOWN, CROSS, CROSS], FIRST + SECOND, 1, transformer_layers_per_block=[1, 1, 2], **text_time(POOLED, 6))
        return StableDiffusionXLPipeline(
            vae=new_vae(0.13025),
            text_encoder=new_encoder(CLIPTextModel, first, FIRST, 2, "quick_gelu"),
            text_encoder_2=open_clip,
            tokenizer=first,
            tokenizer_2=second,
            unet=unet,
            scheduler=new_scheduler(**scheduler),
        )

    return make


@pytest.fixture(scope="session")
def folder_of(new_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder_of(kind) -> the saved pipeline of that kind; made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("kinds") / kind
            new_pipeline(kind).save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def single_file(new_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """single_file(kind, edit, **scheduler options) -> a checkpoint in the original layout, under a name that says nothing."""

    def write(kind: str, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **scheduler: Any) -> Path:
        state = to_original_layout(new_pipeline(kind, **scheduler))
        path = tmp_path_factory.mktemp("files") / "model.safetensors"
        save_file(edit(state) if edit else state, path)
        return path

    return write
