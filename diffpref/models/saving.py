"""Writing pipelines that plain diffusers reads, also with older libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

SHARD = "20GB"
"""Largest weight file. Above SDXL's UNet in float32 (10.3 GB): many tools expect one file, which diffusers would split at 10 GB."""


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write all parts to `folder`, from which `DiffusionPipeline.from_pretrained(folder)` reads them.

    Two things are added for transformers before version 5: the tokenizers' vocab.json and merges.txt, and the first part of
    the names of text encoder weights, which version 5 leaves out of encoders that it did not load from a file. Where on this
    machine the parts came from is taken out of the configs.
    """
    pipeline.save_pretrained(folder, max_shard_size=SHARD)
    for name, part in pipeline.components.items():
        if hasattr(part, "backend_tokenizer") and not (folder / name / "vocab.json").exists():
            part.backend_tokenizer.model.save(str(folder / name))
        elif name.startswith("text_encoder") and isinstance(part, nn.Module):
            _name_as_before(folder / name / "model.safetensors")
    for config in (folder / "model_index.json", *folder.glob("*/*config.json")):
        _forget_places(config)


def _name_as_before(path: Path) -> None:
    """Give the weights of a CLIP text encoder the names of its older class, which both generations read."""
    state = load_file(path)
    top = ("embeddings.", "encoder.", "final_layer_norm.")
    if not any(name.startswith(top) for name in state):
        return
    renamed = {f"text_model.{name}" if name.startswith(top) else name: x for name, x in state.items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(renamed, draft, metadata={"format": "pt"})
    draft.replace(path)


def _forget_places(path: Path) -> None:
    """Remove absolute paths that the libraries store as the origin of a part; hub ids stay."""
    config = json.loads(path.read_text())
    kept = {key: x for key, x in config.items() if not (key in ("_name_or_path", "name_or_path") and Path(str(x)).is_absolute())}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2) + "\n")


def save_configs(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write everything but the weights: what `from_single_file(file, config=folder)` needs beside the file."""
    pipeline.save_config(folder)
    parts: dict[str, Any] = {name: part for name, part in pipeline.components.items() if part is not None}
    for name, part in parts.items():
        if hasattr(part, "save_config"):  # diffusers' models and schedulers
            part.save_config(folder / name)
        elif hasattr(part, "config"):  # transformers' models
            part.config.save_pretrained(folder / name)
        else:
            part.save_pretrained(folder / name)
