"""Every way to tune, in this process: the first step, exact resume, and what is exported."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.training.run import Run

Settings = dict[str, Any]
Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[Settings]]
State = Callable[[Path, int], dict[str, Tensor]]

PACKAGES = {"adamw_8bit": "bitsandbytes", "adamw_4bit": "torchao", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
OPTIONS: dict[str, Settings] = {
    "dora": {"use_dora": True, "lora_targets": "all"},
    "rslora": {"use_rslora": True, "rank": 4},
    "text encoder": {"train_text_encoder": True, "gradient_checkpointing": True},
    "text encoders of sdxl": {"train_text_encoder": True, "cache_latents": True, "family": "sdxl", "train_batch_size": 4},
    "ema": {"use_ema": True, "ema_decay": 0.5},
    "adafactor": {"optimizer": "adafactor", "tune": "full", "learning_rate": 1e-3, "adam_weight_decay": 0.1},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule_free": {"optimizer": "schedule_free", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
    "adamw_8bit": {"optimizer": "adamw_8bit", "tune": "full", "learning_rate": 1e-3},
    "adamw_4bit": {"optimizer": "adamw_4bit", "tune": "full", "learning_rate": 1e-3, "lr_scheduler": "cosine"},
    "restarts": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
    "polynomial": {"lr_scheduler": "polynomial", "lr_power": 2.0},
    "scaled rate": {"scale_lr": True, "learning_rate": 1e-3},
}


@pytest.fixture
def option(request: pytest.FixtureRequest) -> Settings:
    """The settings of an entry of OPTIONS; skips where its package is missing."""
    settings = dict(OPTIONS[request.param])
    if settings.get("optimizer") in PACKAGES:
        pytest.importorskip(PACKAGES[settings["optimizer"]])
    if settings.pop("family", "sd") == "sdxl":
        settings["pretrained_model_name_or_path"] = str(request.getfixturevalue("sdxl_folder"))
    return settings


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def numbers(folder: Path, step: int) -> Settings:
    """What a checkpoint holds beside tensors."""
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


@pytest.mark.parametrize("option", OPTIONS, indirect=True)
def test_a_resumed_run_is_the_uninterrupted_one(
    option: Settings, run_training: Go, prepare: Start, read_metrics: Metrics, read_state: State
) -> None:
    whole = run_training("whole", max_train_steps=4, checkpointing_steps=2, **option)
    lines = read_metrics(whole)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["rewards/margins"] != 0
    assert numbers(whole, 2)["optimizer"] != {}
    parts = whole.with_name("parts")
    whole.rename(parts)
    (parts / "checkpoint-4").rename(parts / "kept-4")
    kept = {f"{p.stem}/{name}": x for p in sorted((parts / "kept-4").glob("*.safetensors")) for name, x in load(p).items()}
    before = json.loads((parts / "kept-4" / "trainer_state.json").read_text())
    run_training("parts", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest", **option)
    assert_same(read_state(parts, 4), kept)
    assert numbers(parts, 4) == before
    assert read_metrics(parts) == lines


def load(path: Path) -> dict[str, Tensor]:
    """A safetensors file."""
    return importlib.import_module("safetensors.torch").load_file(path)
