"""What a run on a public model will take, from its settings alone: nothing is loaded or downloaded, and no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffpref.core.types import Conditioning
from diffpref.models.backbone import FAMILIES, Backbone
from diffpref.models.configs import PARAMETERS, new_part
from diffpref.models.lora import add_lora
from diffpref.training.config import TrainConfig
from diffpref.training.objective import Objective
from diffpref.training.run_costs import RunCosts
from diffpref.training.run_data import NoPictures
from diffpref.training.start import DTYPES

WIDTHS = {"sd15": (768, None), "sdxl": (2048, 1280)}
"""Of prompt embeddings and of the pooled one."""


def estimate(config: TrainConfig, objective: Objective, family: str, num_processes: int = 1) -> RunCosts:
    """The costs of a run on one GPU of a model of the size of SD1.5 ("sd15") or SDXL ("sdxl").

    Raises ValueError for a setting of which the public models alone do not tell the cost.
    """
    if objective.conditioning is not None or config.train_text_encoder:
        raise ValueError(f"method {objective.name}: user branches and text encoders that are trained are counted when a run starts only")
    backbone = without_weights(family, DTYPES[config.base_dtype])
    unet = backbone.denoiser.requires_grad_(config.tune == "full")
    if config.tune == "lora":
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        add_lora(unet, config.rank, alpha, config.lora_targets, config.seed, use_dora=config.use_dora, use_rslora=config.use_rslora)
    resolution = config.resolution or backbone.default_resolution
    place: Any = SimpleNamespace(mixed_precision=config.mixed_precision or "no", device=torch.device("cuda"), num_processes=num_processes)
    return RunCosts(config, objective, backbone, unet, NoPictures(resolution), place, budget=0)


def without_weights(family: str, dtype: torch.dtype) -> Backbone:
    """A public model whose weights have shapes and types, and no memory; the autoencoder in float32."""
    parts: dict[str, nn.Module] = {}
    for name in PARAMETERS[family]:
        parts[name] = new_part(family, name, torch.float32 if name == "vae" else dtype, "meta").requires_grad_(False)
    pipeline: Any = SimpleNamespace(**parts, components=parts)
    text, pooled = WIDTHS[family]
    null = Conditioning(
        torch.empty(1, 1, 77, text, dtype=dtype, device="meta"),
        None if pooled is None else torch.empty(1, 1, pooled, dtype=dtype, device="meta"),
    )
    known = "sd" if family == "sd15" else family
    unknown: Any = None
    return Backbone(known, pipeline, unknown, FAMILIES[known].predictor, lambda prompts: null, lambda: null)
