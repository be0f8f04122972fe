"""What a run leaves for others: a diffusers pipeline or a LoRA file at the root of the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from diffpref.models.lora import adapted_parts, merged_copy, save_lora
from diffpref.models.saving import save_pipeline

INDEX = "model_index.json"
"""The file by which a folder is a pipeline; the last one to be put in place."""


def export(pipeline: DiffusionPipeline, folder: Path, tune: str, merge_lora: bool) -> list[str]:
    """Write the aligned model into `folder`, complete or not at all, and return the names of what was written.

    A full run writes the pipeline, which DiffusionPipeline.from_pretrained(folder) loads. A LoRA run writes
    pytorch_lora_weights.safetensors, which load_lora_weights(folder) reads, and with merge_lora also the pipeline with the
    adapters (LoRA, DoRA, text encoders) merged into its weights. The pipeline itself stays as it is.
    """
    hidden = folder / f".tmp-export-{os.getpid()}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        if tune == "lora" and adapted_parts(pipeline):
            save_lora(pipeline, hidden)
        if tune == "full" or merge_lora:
            save_pipeline(merged(pipeline), hidden)
        return put_in_place(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def put_in_place(hidden: Path, folder: Path) -> list[str]:
    """Move everything from `hidden` to `folder`. The index goes first and comes last: a mixture of old and new is no pipeline."""
    (folder / INDEX).unlink(missing_ok=True)
    names = sorted((part.name for part in hidden.iterdir()), key=lambda name: (name == INDEX, name))
    for name in names:
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        (hidden / name).replace(target)
    return names


def merged(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that shares all parts but those with an adapter: copies with the adapter added to their weights and removed."""
    parts = {name: _merged_copy(part) for name, part in adapted_parts(pipeline).items()}
    return type(pipeline)(**{**pipeline.components, **parts}, **_flags(pipeline)) if parts else pipeline


def _merged_copy(part: nn.Module) -> nn.Module:
    """Made on the CPU: a GPU that held the training may have no room for a second UNet."""
    device = next(part.parameters()).device
    try:
        return merged_copy(part.to("cpu"))
    finally:
        part.to(device)


def _flags(pipeline: DiffusionPipeline) -> dict[str, object]:
    """Constructor options that are no components, such as SDXL's zeros for empty prompts."""
    names = ("force_zeros_for_empty_prompt", "requires_safety_checker", "requires_aesthetics_score")
    return {name: pipeline.config[name] for name in names if name in pipeline.config}
