"""A tiny model and its uninterrupted run, which every broken run has to equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import Trainer, diffpref

STEPS, EVERY = 12, 3


@pytest.fixture(scope="session")
def settings(sd_folder: Path, pairs_file: Path, table_cache: Path) -> dict[str, Any]:
    """Twelve steps of two pairs in two parts: one pass over the 24 pairs. Rows are read by the smallest path."""
    return {
        "pretrained_model_name_or_path": str(sd_folder),
        "train_data_dir": str(pairs_file),
        "cache_dir": str(table_cache),
        "method": "diffusion_dpo",
        "resolution": 32,
        "rank": 2,
        "max_train_steps": STEPS,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "check_images": False,
        "proportion_empty_prompts": 0.2,
        "max_train_samples": 7,
    }


@pytest.fixture(scope="session")
def rows(pair_columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The pairs that the runs learn from, one by one."""
    return [dict(zip(pair_columns, values, strict=True)) for values in zip(*pair_columns.values(), strict=True)]


@pytest.fixture(scope="session")
def make_trainer(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """make_trainer(**settings) -> our trainer."""

    def make(environment: dict[str, str] | None = None, **more: Any) -> Trainer:
        return diffpref(settings | more, EVERY, tmp_path_factory.mktemp("logs"), environment)

    return make


@pytest.fixture(scope="session")
def trainer(make_trainer: Callable[..., Trainer]) -> Trainer:
    """Ours."""
    return make_trainer()


@pytest.fixture(scope="session")
def whole(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = trainer.run(folder)
    assert outcome.code == 0, outcome.errors
    return trainer.result(folder)
