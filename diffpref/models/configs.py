"""The public configurations of SD1.5 and SDXL, and models of that size without their weights.

The values are those that the released checkpoints carry in their `config.json` files; they are kept in assets/models. Parts on
the "meta" device have every name and shape of the real model and no memory: they tell what a checkpoint has to look like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from diffpref.locations import asset

FAMILIES = ("sd15", "sdxl")
PARAMETERS: Mapping[str, Mapping[str, int]] = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
"""Parameters of every part of the released models."""


def public_config(family: str) -> dict[str, dict[str, Any]]:
    """Part of the pipeline -> its configuration, with the name of its class under "class".

    Raises ValueError for a family other than FAMILIES.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not known; use {' or '.join(FAMILIES)}")
    found: dict[str, dict[str, Any]] = json.loads(asset("models", f"{family}.json").read_text())
    return found


def new_part(family: str, part: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A network of a family, such as "unet", in evaluation mode: random weights, or none at all on the device "meta".

    Its weights are made in `dtype`, so that no larger copy is ever in memory.
    """
    options = public_config(family)[part]
    name = options.pop("class")
    with _default_dtype(dtype), torch.device(device) if device != "cpu" else nullcontext():
        if hasattr(diffusers, name):
            network = getattr(diffusers, name)(**options)
        else:
            encoder = getattr(transformers, name)
            network = encoder(encoder.config_class(**options))
    return network.eval()


def shapes(family: str, part: str) -> dict[str, torch.Size]:
    """Name -> shape of every weight that the checkpoint of a part holds."""
    return {name: x.shape for name, x in new_part(family, part, device="meta").state_dict().items()}


def new_pipeline(family: str, tokenizers: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> DiffusionPipeline:
    """A complete pipeline of a family with random weights; save_pretrained writes it in the released layout.

    tokenizers: "tokenizer", and "tokenizer_2" for SDXL. All networks are of `dtype`. SDXL takes 14 GB in float32, 7 GB in bf16.
    """
    config = public_config(family)
    scheduler = config["scheduler"]
    scheduler_class = getattr(diffusers, scheduler.pop("class"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {part: new_part(family, part, dtype) for part in PARAMETERS[family]}
    options = config["pipeline"]
    pipeline_class = getattr(diffusers, options.pop("class"))
    if family == "sd15":
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline_class(**networks, **tokenizers, scheduler=scheduler_class(**scheduler), **options)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
