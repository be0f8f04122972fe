"""What is timed on a GPU: cases with their contestants, the numerics that have to hold first, and the commands of all of them.

Weights are random and of the real configurations; pairs are drawn from a fixed seed. Targets are those of one H200.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fixture
import torch
from bench_cpu import HERE, ROOT
from contest import Contestant
from parts import run_program
from real_size import write_model

from diffpref.data.cache import INDEX
from diffpref.training.run_folder import write_json

FEW = 400  # optimizer steps that a run is told to take; no contest takes so many
PAIRS = 64  # of the data
SIDES = {"sdxl": 1024, "sd15": 512}  # pixels of a family's pairs
PATIENCE = 330.0  # seconds for a program, or for a contestant's start with its first step
PEERS = ("diffusers", "salesforce")


@dataclass(frozen=True)
class Entry:
    """One contestant: ours, bare, usual, or a peer's script."""

    who: str
    pairs: int  # per step
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Contestants that take turns. The first is ours, and every other one is compared with it."""

    family: str  # of the model: sdxl or sd15
    side: int  # pixels
    entries: Mapping[str, Entry]
    path: str  # of NUMERICS, without which the times do not count
    work: str | None = None  # of the cost model's METHODS: what a pair computes, where it has been counted
    pairs_per_second: float | None = None  # the target on one H200
    ratio: float | None = None  # the target for times as many pairs per second as each peer


HALF = {"mixed_precision": "bf16"}
LORA = {"tune": "lora", "rank": 8, "base_dtype": "bf16", **HALF, "gradient_checkpointing": False, "compile": True}
FULL = {"tune": "full", **HALF, "gradient_checkpointing": True, "compile": True, "learning_rate": 1e-8}
DIFFUSERS = HALF | {"allow_tf32": True, "rank": 8}
BARE = {"precision": "bf16", "rank": 8}
OURS = Entry("ours", 4, LORA)
OURS_FULL = Entry("ours", 4, FULL)

NUMERICS: dict[str, dict[str, Any]] = {
    "LoRA": LORA | {"compile": False},
    "LoRA, one pair": LORA | {"compile": False, "train_batch_size": 1},
    "LoRA, channels last": LORA | {"compile": False, "channels_last": True},
    "LoRA, compiled": LORA,
    "LoRA, recomputed activations": LORA | {"compile": False, "gradient_checkpointing": True, "train_batch_size": 8},
    "LoRA, products kept": LORA | {"compile": False, "gradient_checkpointing": "selective"},
    "LoRA, flash attention": LORA | {"compile": False, "attention": "native_flash"},
    "LoRA, cuDNN attention": LORA | {"compile": False, "attention": "native_cudnn"},
    "LoRA, TF32": LORA | {"compile": False, "base_dtype": "fp32", "mixed_precision": "no", "allow_tf32": True, "train_batch_size": 1},
    "all weights": FULL | {"compile": False, "train_batch_size": 1},
    "all weights, compiled": FULL,
    "all weights in bf16, compiled": FULL | {"base_dtype": "bf16"},
}
"""Paths on which an untouched policy has to answer as its reference; 4 pairs if nothing else is said, bf16 but for TF32."""

CASES = {
    "SDXL 1024, DPO, LoRA": Case(
        "sdxl",
        1024,
        {"ours": OURS, "bare": Entry("bare", 4, BARE), "usual": Entry("usual", 4, BARE)},
        "LoRA, compiled",
        "diffusion_dpo",
        pairs_per_second=9,
    ),
    "SDXL 1024, DPO, LoRA, diffusers at its defaults": Case(
        "sdxl",
        1024,
        {
            "ours": OURS,
            "ours, 1 pair": replace(OURS, pairs=1),
            "diffusers": Entry("diffusers", 1, DIFFUSERS | {"gradient_checkpointing": True}),
        },
        "LoRA, compiled",
        "diffusion_dpo",
        ratio=2.2,
    ),
    "SDXL 1024, DPO, LoRA, diffusers with 4 pairs": Case(
        "sdxl",
        1024,
        {
            "ours": OURS,
            "diffusers": Entry("diffusers", 4, DIFFUSERS | {"dataloader_num_workers": 8}),
            "diffusers, recomputing": Entry("diffusers", 4, DIFFUSERS | {"dataloader_num_workers": 8, "gradient_checkpointing": True}),
        },
        "LoRA, compiled",
        "diffusion_dpo",
        ratio=1.6,
    ),
    "SDXL 1024, DPO, LoRA, diffusers with 8 pairs": Case(
        "sdxl",
        1024,
        {
            "ours": OURS,
            "ours, 8 pairs, recomputing": Entry("ours", 8, LORA | {"gradient_checkpointing": True}),
            "diffusers, recomputing": Entry("diffusers", 8, DIFFUSERS | {"dataloader_num_workers": 8, "gradient_checkpointing": True}),
        },
        "LoRA, compiled",
        "diffusion_dpo",
        ratio=1.6,
    ),
    "SDXL 1024, DPO, LoRA, what each setting gives": Case(
        "sdxl",
        1024,
        {
            "ours": OURS,
            "eager": Entry("ours", 4, LORA | {"compile": False}),
            "stored errors": Entry("ours", 4, LORA | {"reference_errors": "errors.safetensors"}),
            "without cache": Entry("ours", 4, LORA | {"latent_cache": False}),
        },
        "LoRA, compiled",
        "diffusion_dpo",
    ),
    "SDXL 512, DPO, LoRA": Case("sdxl", 512, {"ours": replace(OURS, pairs=8)}, "LoRA, compiled", pairs_per_second=38),
    "SDXL 1024, DPO, all weights": Case(
        "sdxl",
        1024,
        {
            "ours": OURS_FULL,
            "ours, 1 pair": replace(OURS_FULL, pairs=1),
            "weights in bf16": replace(OURS_FULL, flags=FULL | {"base_dtype": "bf16"}),
            "salesforce": Entry("salesforce", 1, HALF),
        },
        "all weights, compiled",
        "diffusion_dpo",
        7.5,
        6.0,
    ),
    "SDXL 1024, MaPO, all weights": Case(
        "sdxl", 1024, {"ours": Entry("ours", 4, FULL | {"method": "mapo"})}, "all weights, compiled", "mapo", pairs_per_second=10
    ),
    "SD1.5 512, DPO, all weights": Case(
        "sd15",
        512,
        {"ours": Entry("ours", 16, FULL | {"gradient_checkpointing": False})},
        "all weights, compiled",
        "diffusion_dpo",
        pairs_per_second=60,
    ),
    "SDXL 1024, InPO, all weights": Case(
        "sdxl", 1024, {"ours": Entry("ours", 4, FULL | {"method": "inpo", "compile": False})}, "all weights", "inpo", pairs_per_second=3.2
    ),
    "SDXL 1024, Inversion-DPO with 8 steps, LoRA": Case(
        "sdxl", 1024, {"ours": Entry("ours", 1, LORA | {"compile": False, "method": "inversion_dpo", "num_steps": 8})}, "LoRA, one pair"
    ),
}
"""In the order in which they are measured."""


def words(flags: Mapping[str, Any]) -> list[str]:
    """As on a command line; false leaves a flag out."""
    return [
        word for key, value in flags.items() if value is not False for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def smaller(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for the tiny fixture, also on a CPU: it has no TF32, and compiling takes minutes. bf16 stays."""
    return {key: value for key, value in flags.items() if key not in ("compile", "allow_tf32", "attention")}


def small_case(case: Case) -> Case:
    """The case on the tiny fixture: SDXL's layout, whatever the family, and one pair."""
    entries = {name: Entry(e.who, 1, smaller(e.flags)) for name, e in case.entries.items()}
    return replace(case, side=64, entries=entries)


def fixtures(folder: Path, family: str, tiny: bool) -> Path:
    """Folder with model and pairs, made once: random weights of the real configuration in bf16."""
    place = folder / (f"tiny-{family}" if tiny else family)
    if tiny:
        fixture.make(place, "tiny", pairs=PAIRS, side=64)
    elif not (place / "facts.json").exists():
        write_model(place / "model", family, torch.bfloat16)
        fixture.write_pairs(place, pairs=PAIRS, side=SIDES[family])
        write_json(place / "facts.json", {"family": family, "side": SIDES[family], "pairs": PAIRS})
    return place


def our_flags(place: Path, side: int, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run on the fixture; `flags` win. The cache is the one for its size and the dtype of its text encoders."""
    found: dict[str, Any] = {"pretrained_model_name_or_path": place / "model", "train_data_dir": place / "pickapic", "resolution": side}
    found |= {"cache_dir": place / "tables", "latent_cache": place / f"latents-{side}-{flags.get('base_dtype', 'fp32')}"}
    found |= {"output_dir": new_folder(place), "method": "diffusion_dpo", "preset": "diffpref", "preflight": "off"}
    found |= {"train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-5, "lr_scheduler": "constant"}
    return found | {"lr_warmup_steps": 0, "max_train_steps": FEW, "checkpointing_steps": 10**6, **flags}


def new_folder(place: Path) -> Path:
    """For a run; none starts in a folder that is used."""
    return place / "runs" / f"run-{time.time_ns()}"


def build_cache(flags: Mapping[str, Any]) -> None:
    """The latent cache of a run with these settings, made or completed; nothing if it is there, or not wanted."""
    if not flags.get("latent_cache") or (Path(flags["latent_cache"]) / INDEX).exists():
        return
    names = ("pretrained_model_name_or_path", "train_data_dir", "cache_dir", "resolution", "latent_cache")
    names += ("base_dtype", "mixed_precision") if flags.get("base_dtype", "fp32") != "fp32" else ()
    run_program([sys.executable, "-m", "diffpref.cli", "cache", *words({name: flags[name] for name in names})], PATIENCE)


def contestant(place: Path, case: Case, entry: Entry, scripts: Mapping[str, Path | None]) -> Contestant:
    """The command of an entry; what it reads has been made."""
    if entry.who in ("bare", "usual"):
        flags = {"model": place / "model", "pairs": entry.pairs, "resolution": case.side, **entry.flags}
        if entry.who == "usual":
            flags |= {"pairs_file": next((place / "pickapic").glob("*.parquet"))}
        script = HERE / ("bare_step.py" if entry.who == "bare" else "conventional_step.py")
        return Contestant(script, words(flags), entry.pairs)
    if entry.who == "ours":
        flags = our_flags(place, case.side, {"train_batch_size": entry.pairs, **entry.flags})
        if "reference_errors" in flags:
            flags |= {"reference_errors": place / flags["reference_errors"], "max_train_steps": 100}
        build_cache(flags)
        return Contestant(ROOT / "scripts" / "train.py", words(flags), entry.pairs)
    script = scripts[entry.who]
    assert script is not None
    return Contestant(script, words(peer_flags(place, case.side, entry)), entry.pairs, stand_ins(entry.who))


def stand_ins(peer: str) -> tuple[str, ...]:
    """What a peer's script needs to start without."""
    return ("wandb",) if peer == "diffusers" else ("wandb", "xformers", "cuda")


def peer_flags(place: Path, side: int, entry: Entry) -> dict[str, Any]:
    """Settings of a peer's script on the same pipeline and pairs."""
    split = {"split": "train", "sdxl": True} if entry.who == "salesforce" else {"dataset_split_name": "train"}
    flags = {"pretrained_model_name_or_path": place / "model", "dataset_name": place / "pickapic", **split, "cache_dir": place / "hub"}
    flags |= {"output_dir": new_folder(place), "resolution": side, "train_batch_size": entry.pairs, "seed": 0}
    flags |= {"learning_rate": 1e-8, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": FEW, "checkpointing_steps": FEW}
    return flags | dict(entry.flags)
