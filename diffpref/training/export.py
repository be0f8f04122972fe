"""What a run leaves for others: a diffusers pipeline or a LoRA file at the root of the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffpref.models.lora import adapted_parts, merged_copy, save_lora


def export(pipeline: DiffusionPipeline, folder: Path, tune: str, merge_lora: bool) -> None:
    """Write the aligned model into `folder`, complete or not at all.

    A full run writes the pipeline, which DiffusionPipeline.from_pretrained(folder) loads. A LoRA run writes
    pytorch_lora_weights.safetensors, which load_lora_weights(folder) reads, and with merge_lora also the pipeline with the
    adapter merged into its weights.
    """
    hidden = folder / f".tmp-export-{os.getpid()}"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        if tune == "lora":
            save_lora(pipeline, hidden)
            if merge_lora:
                merged(pipeline).save_pretrained(hidden)
        else:
            pipeline.save_pretrained(hidden)
        for part in sorted(hidden.iterdir(), key=lambda p: p.name == "model_index.json"):
            target = folder / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@torch.no_grad()
def merged(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that shares all parts but those with an adapter: copies with the adapter added to their weights and removed."""
    parts = {name: merged_copy(part) for name, part in adapted_parts(pipeline).items()}
    return type(pipeline)(**{**pipeline.components, **parts}, **_flags(pipeline))


def _flags(pipeline: DiffusionPipeline) -> dict[str, object]:
    """Constructor options that are no components, such as SDXL's zeros for empty prompts."""
    names = ("force_zeros_for_empty_prompt", "requires_safety_checker")
    return {name: pipeline.config[name] for name in names if name in pipeline.config}
