"""Short runs of every recipe, whole and in two parts, on one process or on several:

torchrun --nproc_per_node 2 tests/reliability/resumed_runs.py MODEL PAIRS CAPTIONED CACHE FOLDER RECIPE,TUNE ...
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from diffpref.methods.recipes import RECIPES
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import build_objective
from diffpref.training.run import prepare_run

STEPS = 2
SAMPLING = {"num_steps": 3, "first_branch": 0, "num_inner_step": 2, "num_candidates": 2, "threshold": 0.0, "prompts_per_rollout": 4}


class Inputs(NamedTuple):
    """What all runs read."""

    model: Path
    pairs: Path
    captioned: Path
    cache: Path


def brightness(pixels: torch.Tensor, prompts: Sequence[str], timestep: int) -> torch.Tensor:
    """A judge of sampled pictures: their mean pixel."""
    return 50 * pixels.mean((1, 2, 3))


def go(recipe: str, folder: Path, inputs: Inputs, **settings: Any) -> None:
    """Train to the end in `folder`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    own: dict[str, Any] = {"num_steps": 2} if RECIPES[recipe].path in ("inversion", "trajectory") else {}
    pairs = inputs.captioned if RECIPES[recipe].groups in ("captioned", "captions") else inputs.pairs
    data: dict[str, Any] = {"train_data_dir": str(pairs), "cache_dir": str(inputs.cache), "check_images": False}
    if samples_its_pairs := RECIPES[recipe].source is not None:
        own, data = {**SAMPLING, "prompt_set": str(pairs.with_name("prompts.txt"))}, {}
    config = TrainConfig(
        method=recipe,
        pretrained_model_name_or_path=str(inputs.model),
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
    run = prepare_run(config, build_objective(recipe, own), (), brightness if samples_its_pairs else None)
    try:
        train(run)
    finally:
        run.log.close()


def check(recipe: str, tune: str, inputs: Inputs, home: Path) -> None:
    """Two steps in one go equal one step, a stop, a resume and one step more: bit for bit, metrics included."""
    whole, parts = home / "whole", home / "parts"
    go(recipe, whole, inputs, tune=tune)
    is_first = PartialState().is_main_process
    if is_first:
        shutil.copytree(whole, parts, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", ".lock"))
    PartialState().wait_for_everyone()
    go(recipe, parts, inputs, tune=tune, resume_from_checkpoint="latest")
    if is_first:
        compare(whole, parts)


def compare(whole: Path, parts: Path) -> None:
    """Raises AssertionError for any difference, and for a last step that changed nothing."""
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


if __name__ == "__main__":
    *places, out = map(Path, sys.argv[1:6])
    torch.set_num_threads(1)
    for word in sys.argv[6:]:
        method, _, tuned = word.partition(",")
        check(method, tuned, Inputs(*places), out / method / tuned)
        if PartialState().is_main_process:
            print("exact", word, PartialState().num_processes, flush=True)
    torch.distributed.destroy_process_group()
