"""Runs of a few steps, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from diffpref.methods import METHODS
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import Objective
from diffpref.training.run import Run, prepare_run

Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the life of a process; every run here is to be the first."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def base_settings(sd_folder: Path, pairs_file: Path, table_cache: Path) -> Settings:
    """Settings of a run of six steps of two pairs."""
    return {
        "pretrained_model_name_or_path": str(sd_folder),
        "train_data_dir": str(pairs_file),
        "cache_dir": str(table_cache),
        "resolution": 32,
        "rank": 2,
        "max_train_steps": 6,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "check_images": False,
        "proportion_empty_prompts": 0.2,
    }


@pytest.fixture
def prepare(base_settings: Settings, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """prepare(folder name, objective, **settings) -> a run that is ready to train; its files are closed at the end of the test."""
    opened: list[Run] = []

    def make(name: str, objective: Objective | None = None, **settings: Any) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        given = base_settings | {"method": "diffusion_dpo", "output_dir": str(tmp_path / name)} | settings
        own = {"beta": given.pop("beta", 100.0)} if given["method"] == "diffusion_dpo" else {}
        run = prepare_run(TrainConfig(**given), objective or Objective(METHODS[given["method"]](**own)))
        opened.append(run)
        return run

    yield make
    for run in opened:
        run.log.close()


@pytest.fixture
def run_training(prepare: Callable[..., Run]) -> Callable[..., Path]:
    """run_training(folder name, **settings) -> the run folder after training to the end."""

    def go(name: str, objective: Objective | None = None, **settings: Any) -> Path:
        run = prepare(name, objective, **settings)
        try:
            train(run)
        finally:
            run.log.close()
        if run.port:
            run.port.save(run.folder, run.backbone.denoiser)
        return run.folder

    return go


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[Settings]]:
    """read_metrics(folder) -> the lines of metrics.jsonl without the times."""

    def read(folder: Path) -> list[Settings]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: x for name, x in line.items() if not name.startswith("time/")} for line in lines]

    return read


@pytest.fixture(scope="session")
def read_state() -> Callable[[Path, int], dict[str, Tensor]]:
    """read_state(folder, step) -> every tensor of that checkpoint."""

    def read(folder: Path, step: int) -> dict[str, Tensor]:
        parts = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
        assert [p.stem for p in parts if p.stem != "ema"] == ["optimizer", "weights"]
        return {f"{p.stem}/{name}": x for p in parts for name, x in load_file(p).items()}

    return read
