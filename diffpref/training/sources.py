"""Where the batches of a run come from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator

from diffpref.core.types import Predict, PreferenceBatch
from diffpref.data.buckets import Buckets, read_sizes
from diffpref.data.groups import Grouping, Groups, arranged
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import PairDataset
from diffpref.data.sampler import PairSampler
from diffpref.models.backbone import Backbone
from diffpref.sources.dataset import Encoder, LatentCache, from_disk
from diffpref.sources.stored import StoredLatents, with_store
from diffpref.training.config import TrainConfig
from diffpref.training.latent_cache import open_store
from diffpref.training.models import check_resolution, picture_sizes
from diffpref.training.order import group_weights, new_sampler
from diffpref.training.port import Port
from diffpref.training.validation import HeldOut


def new_pixels(config: TrainConfig, pairs: PairDataset, backbone: Backbone, grouping: Grouping, is_main: bool) -> PairPixels:
    """What is trained on as pixels: the pairs, or groups made of them.

    With buckets the sizes of all pictures are read, and the main process prints their table. Raises ValueError when the model cannot
    take resolution or bucket_step, the data has not what the groups are made of, or a picture has no readable size.
    """
    groups = arranged(pairs, grouping, config.list_size, partial(print, file=sys.stderr) if is_main else None)
    if grouping == "captions" and config.proportion_empty_prompts:
        raise ValueError(
            f"proportion_empty_prompts is {config.proportion_empty_prompts}, but method {config.method} compares captions: under the empty "
            "prompt there is nothing to compare; use 0"
        )
    buckets = new_buckets(config, pairs if groups is None else groups, backbone, is_main)
    if buckets and is_main:
        print(buckets.table(config.train_batch_size), file=sys.stderr)
    pixels = PairPixels(
        pairs,
        check_resolution(config, backbone),
        config.seed,
        flip_probability=0.0 if config.no_hflip else 0.5,
        random_crop=config.random_crop,
        flip_mode=config.flip_mode,
        buckets=buckets,
        groups=groups,
    )
    return replace(pixels, weights=group_weights(config, pixels))


def new_buckets(config: TrainConfig, pairs: PairDataset | Groups, backbone: Backbone, progress: bool) -> Buckets | None:
    """The aspect-ratio buckets of these pairs, None without aspect_ratio_buckets. Raises ValueError like `new_pixels`."""
    picture_sizes(config, backbone)  # refuses what cannot work before reading thousands of pictures
    if not config.aspect_ratio_buckets:
        return None
    return Buckets.of_sizes(read_sizes(pairs, progress=progress), check_resolution(config, backbone), config.bucket_step)


def new_encoder(config: TrainConfig, backbone: Backbone, device: torch.device, pictures: int = 2) -> Encoder:
    """The frozen encoders of the model, with the run's prompt dropout, or its latent_cache; pictures: those of a group.

    Raises ValueError for a latent_cache that does not fit.
    """
    encoder = Encoder(
        encode_moments=backbone.encode_moments,
        encode_prompts=backbone.encode_prompts,
        null_prompt=backbone.null_prompt(),
        uses_time_ids=backbone.uses_time_ids,
        device=device,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
        prompt_cache={} if config.cache_latents else None,
        pictures_at_once=pictures_at_once(config, pictures),
        prompts_at_once=config.train_batch_size,
    )
    return with_store(encoder, open_store(config, backbone, pictures), not config.train_text_encoder) if config.latent_cache else encoder


def pictures_at_once(config: TrainConfig, per_group: int = 2) -> int:
    """The most pictures, up to vae_encode_batch_size, that divide those of a micro-batch, so that no part has to be filled up."""
    pictures = per_group * config.train_batch_size
    return next(n for n in range(config.vae_encode_batch_size, 0, -1) if pictures % n == 0)


def new_source(
    config: TrainConfig,
    pixels: PairPixels,
    sampler: PairSampler,
    encoder: Encoder,
    accelerator: Accelerator,
    first_step: int,
    port: Port | None = None,
) -> Iterator[PreferenceBatch]:
    """This rank's micro-batches from `first_step` on, drawn with the seed of `config`."""
    if config.seed != sampler.seed:  # the run went back to a checkpoint
        pixels, encoder = replace(pixels, seed=config.seed), replace(encoder, seed=config.seed)
        sampler = new_sampler(config, pixels)

    def items() -> Iterator[list[tuple[int, int]]]:
        return sampler.micro_batches(
            accelerator.process_index,
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            world_size=accelerator.num_processes,
            first_step=first_step,
        )

    if encoder.store is not None:
        batches = StoredLatents.of(encoder.store, pixels).batches(items, encoder)
    elif config.cache_latents:
        batches = LatentCache.build(pixels, encoder, config.train_batch_size).batches(items, encoder)
    else:
        batches = from_disk(pixels, items, encoder, config.dataloader_num_workers)
    return port.conditioned(batches) if port else batches


def held_out_pixels(config: TrainConfig, held_out: PairDataset, grouping: Grouping, backbone: Backbone) -> PairPixels:
    """The held-out pairs as pixels, without mirroring; lists and single pictures as pairs."""
    groups = arranged(held_out, grouping) if grouping in ("captioned", "captions") else None
    buckets = new_buckets(config, held_out if groups is None else groups, backbone, progress=False)
    return PairPixels(held_out, check_resolution(config, backbone), config.seed, buckets=buckets, groups=groups)


def held_out_accuracy(
    config: TrainConfig,
    held_out: PairDataset,
    grouping: Grouping,
    backbone: Backbone,
    compared: tuple[Predict, Predict],
    encoder: Encoder,
    port: Port | None = None,
) -> HeldOut:
    """Implicit accuracy of `compared`, policy and reference, on the held-out pairs with their full prompts."""
    pixels = held_out_pixels(config, held_out, grouping, backbone)
    plain = replace(encoder, proportion_empty_prompts=0.0, prompt_cache={})
    make = partial(from_disk, pixels) if encoder.store is None else StoredLatents.of(encoder.store, pixels).batches
    found = HeldOut.build(*compared, backbone.process, pixels, lambda chunks: make(chunks, plain), config.train_batch_size)
    return replace(found, batches=list(port.conditioned(found.batches, is_training=False))) if port else found
