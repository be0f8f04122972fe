"""Where the batches of a run come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from diffpref.core.types import Predict, PreferenceBatch
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import PairDataset
from diffpref.data.sampler import PairSampler
from diffpref.models.backbone import Backbone
from diffpref.sources.dataset import Encoder, LatentCache, from_disk
from diffpref.training.config import TrainConfig
from diffpref.training.models import check_resolution
from diffpref.training.validation import HeldOut


def new_encoder(config: TrainConfig, backbone: Backbone, device: torch.device) -> Encoder:
    """The frozen encoders of the model, with the run's prompt dropout."""
    return Encoder(
        encode_moments=backbone.encode_moments,
        encode_prompts=backbone.encode_prompts,
        null_prompt=backbone.null_prompt(),
        uses_time_ids=backbone.uses_time_ids,
        device=device,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
        prompt_cache={} if config.cache_latents else None,
    )


def new_source(
    config: TrainConfig, pixels: PairPixels, sampler: PairSampler, encoder: Encoder, accelerator: Accelerator, first_step: int
) -> Iterator[PreferenceBatch]:
    """This rank's micro-batches from `first_step` on."""

    def items() -> Iterator[list[tuple[int, int]]]:
        return sampler.micro_batches(
            accelerator.process_index,
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            world_size=accelerator.num_processes,
            first_step=first_step,
        )

    if config.cache_latents:
        return LatentCache.build(pixels, encoder, config.train_batch_size).batches(items, encoder)
    return from_disk(pixels, items, encoder, config.dataloader_num_workers)


def held_out_accuracy(config: TrainConfig, held_out: PairDataset, backbone: Backbone, reference: Predict, encoder: Encoder) -> HeldOut:
    """Implicit accuracy on the held-out pairs, with their full prompts and without mirroring."""
    pixels = PairPixels(held_out, check_resolution(config, backbone), config.seed)
    plain = dataclasses.replace(encoder, proportion_empty_prompts=0.0, prompt_cache={})
    return HeldOut.build(backbone, reference, pixels, plain, config.train_batch_size)
