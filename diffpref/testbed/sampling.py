"""Pictures from testbed pipelines, spread over single-threaded processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffpref.evaluation.generate import Images, generate
from diffpref.models.backbone import load_pipeline
from diffpref.models.lora import LORA_FILE

STEPS = 16
GUIDANCE = 3.0
BATCH = 50


@dataclass(frozen=True)
class Sampler:
    """A model and how it is sampled."""

    model: str
    """Folder of a pipeline."""
    lora: str | None = None
    """Folder of a LoRA file, if any."""
    steps: int = STEPS
    guidance: float = GUIDANCE

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        """uint8 (N, 64, 64, 3) in this process."""
        pipeline = _load(self.model, self.lora)
        return generate(pipeline, prompts, seeds, num_inference_steps=self.steps, guidance_scale=self.guidance, batch_size=BATCH)


@lru_cache(maxsize=2)  # a process may sample hundreds of models, one after the other
def _load(model: str, lora: str | None) -> DiffusionPipeline:
    pipeline = load_pipeline(model)
    if lora:
        pipeline.load_lora_weights(lora, weight_name=LORA_FILE, use_safetensors=True)
    return pipeline


def sample_parallel(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], num_processes: int) -> Images:
    """The same pictures as `sampler(prompts, seeds)`, up to rounding, from several processes."""
    parts = [range(start, min(start + BATCH, len(prompts))) for start in range(0, len(prompts), BATCH)]
    work = [([prompts[i] for i in part], [seeds[i] for i in part]) for part in parts]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return np.concatenate(list(pool.map(sampler, *zip(*work, strict=True))))
