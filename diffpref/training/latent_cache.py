"""The cache of latents and prompts that a run reads: what it depends on, and whether it fits (data/cache.py has the files)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffpref.data import cache
from diffpref.data.cache import LatentStore
from diffpref.models.backbone import Backbone, text_encoders
from diffpref.models.outlines import stored_weight
from diffpref.training.config import TrainConfig
from diffpref.training.models import check_resolution
from diffpref.training.sharding import whole


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """32 hex digits over names, shapes, types and a few values of every weight: enough to tell models apart, within milliseconds.

    Adapters are left out; of outlines the values are those of their files. Every process has to call this for a sharded model.
    """
    digest, values = hashlib.blake2b(digest_size=16), []
    for module in modules:
        for given, p in module.state_dict().items():
            if "lora_" in given:
                continue
            digest.update(repr((given.replace(".base_layer", ""), tuple(p.shape), p.dtype)).encode())
            x = stored_weight(module, given) if p.is_meta else whole(p)
            values.append(x.flatten()[:: max(1, p.numel() // 16)][:16].float())
    digest.update(torch.cat(values).cpu().numpy().tobytes())  # joined first: one transfer from a GPU
    return digest.hexdigest()


def identity(config: TrainConfig, backbone: Backbone, pictures: int) -> dict[str, Any]:
    """What a cache depends on, and what has to be equal in a run that reads it. pictures: those of a group."""
    found: dict[str, Any] = {
        "resolution": check_resolution(config, backbone),
        "aspect_ratio_buckets": config.aspect_ratio_buckets,
        "crop": "centre",
        **({} if config.train_text_encoder else {"base_dtype": config.base_dtype}),  # of the text encoders; named before their digest
        "autoencoder": fingerprint([backbone.pipeline.vae]),
        "scaling_factor": backbone.pipeline.vae.config.scaling_factor,
    }
    if config.aspect_ratio_buckets:
        found |= {"bucket_step": config.bucket_step, "pictures that share a bucket": pictures}
    if not config.train_text_encoder:  # such a run encodes its prompts itself
        found["text_encoders"] = fingerprint(text_encoders(backbone))
    return found


def differences(made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Every value in which a cache and a run, or two builds, differ, with both.

    Caches from before base_dtype was noted are compared without it; the text encoders' digest depends on it.
    """
    noted = {name: x for name, x in wanted.items() if name != "base_dtype" or name in made_with}
    return cache.differences(made_with, noted)


def open_store(config: TrainConfig, backbone: Backbone, pictures: int) -> LatentStore:
    """The cache of a run. Raises ValueError for a folder that is incomplete, or that other settings have made, with both values."""
    if config.dataloader_num_workers:
        workers = config.dataloader_num_workers
        raise ValueError(f"dataloader_num_workers is {workers}, but latent_cache {config.latent_cache!r} leaves nothing to decode; drop it")
    store = LatentStore.open(str(config.latent_cache))
    made_with, wanted = dict(store.manifest["made_with"]), identity(config, backbone, pictures)
    mirrored = made_with.pop("mirrored")
    if config.train_text_encoder:
        for name in ("base_dtype", "text_encoders"):
            made_with.pop(name, None)
    found = differences(made_with, wanted)
    if not mirrored and not config.no_hflip:
        found.append("mirrored is False in the cache and True in this run (no_hflip is false)")
    if found:
        models = f"; the cache is of {store.manifest['model']}, the run of {config.pretrained_model_name_or_path}"
        raise ValueError(
            f"latent_cache {config.latent_cache!r} was made with other settings: {', '.join(found)}{models}. "
            "Use its settings, or build another folder"
        )
    return store
