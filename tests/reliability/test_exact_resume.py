"""Two steps in one go, and one step, a stop, a resume and one step more: the same, bit for bit, for everything that can be trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from diffpref.methods import METHODS
from diffpref.methods.recipes import RECIPES
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import build_objective
from diffpref.training.run import prepare_run

STEPS = 2
SAMPLING = {"num_steps": 3, "first_branch": 0, "num_inner_step": 2, "num_candidates": 2, "threshold": 0.0, "prompts_per_rollout": 4}
FULL = pytest.mark.reliability_full("R2", "R12")
EACH = pytest.mark.reliability("R2", "R12")
TRAINED = [name for name, recipe in RECIPES.items() if recipe.conditioning is None]
"""Policies that read users or axes need data of their own: tests/training/test_ppd.py resumes them."""

pytestmark = pytest.mark.filterwarnings("ignore:method dro")


def brightness(pixels: torch.Tensor, prompts: Sequence[str], timestep: int) -> torch.Tensor:
    """A judge of sampled pictures: their mean pixel."""
    return 50 * pixels.mean((1, 2, 3))


@pytest.fixture(scope="module")
def files(pair_columns: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The pairs with scores of every name that a recipe asks for; True: with a caption per picture."""
    rows = range(len(pair_columns["caption"]))
    scores = {f"{n}_{i}": [0.2 + 0.001 * ((7 * row + 5 * i) % 11) for row in rows] for n in ("pickscore", "score") for i in (0, 1)}
    captions = {f"caption_{name}": [f"{text}, {name}" for text in pair_columns["caption"]] for name in ("0", "1", "negative")}
    found = {}
    for has_captions in (False, True):
        found[has_captions] = tmp_path_factory.mktemp("scored") / "train-0.parquet"
        pq.write_table(pa.table(pair_columns | scores | (captions if has_captions else {})), found[has_captions])
        found[has_captions].with_name("prompts.txt").write_text("".join(f"a red circle, number {i}\n" for i in range(4)))
    return found


@pytest.fixture
def go(sd_folder: Path, files: dict[bool, Path], table_cache: Path) -> Callable[..., Path]:
    """go(recipe, folder, **settings) -> the run folder after training to the end."""

    def run(recipe: str, folder: Path, **settings: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        own: dict[str, Any] = {"num_steps": 2} if RECIPES[recipe].path in ("inversion", "trajectory") else {}
        pairs = files[RECIPES[recipe].groups in ("captioned", "captions")]
        data: dict[str, Any] = {"train_data_dir": str(pairs), "cache_dir": str(table_cache), "check_images": False}
        if samples_its_pairs := RECIPES[recipe].source is not None:
            own, data = {**SAMPLING, "prompt_set": str(pairs.with_name("prompts.txt"))}, {}
        config = TrainConfig(
            method=recipe,
            pretrained_model_name_or_path=str(sd_folder),
            **data,
            output_dir=str(folder),
            resolution=32,
            max_train_steps=STEPS,
            gradient_accumulation_steps=1,
            train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=0,
            checkpointing_steps=1,
            preflight="off",
            proportion_empty_prompts=0.0 if RECIPES[recipe].groups == "captions" or samples_its_pairs else 0.2,
            **({} if settings.get("tune") == "full" else {"rank": 2}),
            **settings,
        )
        started = prepare_run(config, build_objective(recipe, own), (), brightness if samples_its_pairs else None)
        try:
            train(started)
        finally:
            started.log.close()
        return folder

    return run


def check(recipe: str, tune: str, go: Callable[..., Path], home: Path) -> None:
    """Bit for bit, metrics included."""
    whole, parts = go(recipe, home / "whole", tune=tune), home / "parts"
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", ".lock"))
    go(recipe, parts, tune=tune, resume_from_checkpoint="latest")
    for name in ("weights", "optimizer"):
        a, b = (load_file(folder / f"checkpoint-{STEPS}" / f"{name}.safetensors") for folder in (whole, parts))
        before = load_file(parts / "checkpoint-1" / f"{name}.safetensors")
        assert a.keys() == b.keys() == before.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], before[key]) for key in a)
    assert (whole / f"checkpoint-{STEPS}/trainer_state.json").read_text() == (parts / f"checkpoint-{STEPS}/trainer_state.json").read_text()
    lines = [[line.split('"time/')[0] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, parts)]
    assert lines[0] == lines[1]
    assert sum('"loss"' in line for line in lines[0]) == STEPS


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=EACH if name in METHODS else FULL) for name in TRAINED])
def test_lora(recipe: str, go: Callable[..., Path], tmp_path: Path) -> None:
    check(recipe, "lora", go, tmp_path)


@FULL
@pytest.mark.parametrize("recipe", TRAINED)
def test_all_weights(recipe: str, go: Callable[..., Path], tmp_path: Path) -> None:
    check(recipe, "full", go, tmp_path)
