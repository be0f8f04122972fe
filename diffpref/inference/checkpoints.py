"""Aligned models in the forms they are published in, opened on top of their base: what `evaluate` and `verify` compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffpref.inference.user_pipelines import as_user_pipeline
from diffpref.inference.users import CONFIG_FILE as USER_CONFIG_FILE
from diffpref.models.files import read_shapes
from diffpref.models.lora import LORA_FILE
from diffpref.models.lora_file import merge_lora
from diffpref.models.pipeline import load_pipeline

METRICS_FILE = "metrics.jsonl"
"""Where a training run keeps its log, beside the model."""


@dataclass(frozen=True)
class Candidate:
    """A model that takes part: the base itself, or something on top of it."""

    name: str
    source: str | None  # None for the base
    kind: str = "base"  # base, pipeline, unet, lora or user
    lora_scale: float | None = None
    label: str = ""  # the name without the strength or the user
    user: str | None = None  # for whom a personalised model draws

    def facts(self) -> dict[str, Any]:
        """What a report says about where the model comes from; folders by their name only."""
        source = Path(self.source).name if self.source and Path(self.source).exists() else self.source
        facts = {"source": source or "base", "kind": self.kind, "lora_scale": self.lora_scale, "label": self.label or self.name}
        return facts | ({"user": self.user} if self.user else {})

    def run_metrics(self) -> list[dict[str, Any]]:
        """The log of the training run that wrote the model, if it lies beside it; lines that a kill cut short are left out."""
        place = Path(self.source or "")
        path = (place.parent if place.is_file() else place) / METRICS_FILE
        if not self.source or not path.is_file():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows


def parse_candidates(specs: Sequence[str], lora_scales: Sequence[float], users: Sequence[str] = ()) -> list[Candidate]:
    """Models from "path" or "name=path"; a LoRA once for every strength, a personalised model once for every user.

    Raises ValueError for names that come twice or cannot name a folder, for paths of no known form, and for users where no model
    draws for any, or the other way round.
    """
    found: list[Candidate] = []
    for spec in specs:
        name, separator, source = spec.partition("=")
        if not separator:
            source, name = spec, Path(spec.rstrip("/")).stem if Path(spec).is_file() else Path(spec.rstrip("/")).name
        if not name or name.startswith(".") or "/" in name or name == "base":
            raise ValueError(f"aligned {spec!r}: {name!r} cannot name a model; write name=path with a name of its own")
        kind = kind_of(source)
        if kind == "lora":
            several = len(lora_scales) > 1
            found += [Candidate(f"{name} x{scale:g}" if several else name, source, kind, scale, name) for scale in lora_scales]
        elif kind == "user":
            if not users:
                raise ValueError(f"aligned {spec!r} draws for users; name them with --users, as that run's data does")
            found += [Candidate(f"{name} for {user}", source, kind, None, name, user) for user in users]
        else:
            found.append(Candidate(name, source, kind, None, name))
    if users and not any(c.kind == "user" for c in found):
        raise ValueError(f"users is {', '.join(users)}, but none of the aligned models draws for users; leave it out")
    if bad := [user for user in users if "/" in user]:
        raise ValueError(f"users names {bad[0]!r}, which cannot be part of a folder's name")
    names = [c.name for c in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"aligned names {twice[0]!r} twice; write name=path with different names")
    return found


def kind_of(source: str) -> str:
    """pipeline, unet, lora or user, from the files themselves; a hub id counts as a pipeline.

    Raises ValueError for a path that holds none of them.
    """
    path = Path(source)
    if path.is_dir():
        if (path / USER_CONFIG_FILE).is_file():
            return "user"
        if (path / "model_index.json").is_file():
            return "pipeline"
        if (path / LORA_FILE).is_file():
            return "lora"
        if (path / "config.json").is_file() or (path / "unet" / "config.json").is_file():
            return "unet"
        raise ValueError(
            f"aligned {source!r} holds no model: it needs model_index.json (a pipeline), config.json (a UNet), {LORA_FILE} (a LoRA) or "
            f"{USER_CONFIG_FILE} (a personalised model)"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            return "unet"  # a state dict such as unet.pth
        names = read_shapes(path, "aligned")
        if any("lora" in name for name in names):
            return "lora"
        return "pipeline" if any(name.startswith("model.diffusion_model.") for name in names) else "unet"
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"aligned {source!r} does not exist; give a folder, a file or a hub id")
    return "pipeline"


def open_candidate(base: str, revision: str | None, variant: str | None, candidate: Candidate) -> DiffusionPipeline:
    """The candidate as a pipeline in float32. Raises ValueError when it does not fit the base."""
    if candidate.kind == "pipeline":
        return load_pipeline(str(candidate.source), single_file_config=base if Path(str(candidate.source)).is_file() else None)
    unet = candidate.source if candidate.kind == "unet" else None
    pipeline = load_pipeline(base, revision, variant, unet_init=unet)
    if candidate.kind == "lora":
        merge_lora(pipeline, str(candidate.source), "aligned", 1.0 if candidate.lora_scale is None else candidate.lora_scale)
    if candidate.kind == "user":
        folder = Path(str(candidate.source))
        if (folder / LORA_FILE).is_file():  # trained together with the user branch
            merge_lora(pipeline, str(folder), "aligned")
        pipeline = as_user_pipeline(pipeline, folder)
        pipeline.set_user(candidate.user)
    return pipeline
