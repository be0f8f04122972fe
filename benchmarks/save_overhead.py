"""What checkpoints cost: the share of a run's time in which it waits for them, measured inside of runs at the default interval.

    python benchmarks/save_overhead.py [--steps 500] [--train_batch_size 4]

trains Diffusion-DPO on the testbed with a LoRA, with all weights, and with all weights saved in the background. Then the state of a
LoRA of rank 16 for SD1.5 (random numbers in its shapes) is saved again and again: its time says above which length of a step the
share stays below 2 % on a real model. On a machine that does other things too, steps take longer and the share is too small: the
seconds waited are therefore compared with the run's processor seconds as well, which a run cannot do without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel

from diffpref.models.lora import TARGETS
from diffpref.testbed.recipe import read_recipe
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import all_names, build_objective
from diffpref.training.run import prepare_run
from diffpref.training.run_folder import versions
from diffpref.training.saving import CheckpointWriter

GOAL = 0.02
INTERVAL = next(int(f.default) for f in fields(TrainConfig) if f.name == "checkpointing_steps")  # type: ignore[call-overload]


def share_of_a_run(recipe: str, folder: Path, steps: int, **more: Any) -> dict[str, float]:
    """Seconds of training and of waiting for checkpoints, of a run that saves at the default interval."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = read_recipe(recipe) | more | {"output_dir": str(folder), "max_train_steps": steps, "checkpointing_steps": INTERVAL}
    settings |= {"validation_steps": None, "held_out_pairs": 0, "lr_warmup_steps": 0, "preflight": "off"}
    own = {name: settings.pop(name) for name in all_names() if name in settings}
    run = prepare_run(TrainConfig(**settings), build_objective("diffusion_dpo", own))
    start, worked = time.perf_counter(), time.process_time()
    try:
        train(run)
    finally:
        run.log.close()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    written = sum(p.stat().st_size for p in (folder / f"checkpoint-{steps}").iterdir())
    saves = len(list(folder.glob("checkpoint-*")))
    print(f"{recipe} {more}: {run.writer.waited:.3f} s of {seconds:.1f} s in {saves} saves", flush=True)
    waited, found = run.writer.waited, {"seconds": seconds, "cpu_seconds": worked, "saves": saves, "megabytes_per_save": written / 1e6}
    return found | {"seconds_waited": waited, "share": waited / (seconds - waited), "share_of_cpu_seconds": waited / worked}


def sd15_lora(rank: int = 16) -> dict[str, torch.Tensor]:
    """Tensors in the shapes of a LoRA on the attention of SD1.5's UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8)
    found = {}
    for name, layer in unet.named_modules():
        if name.endswith(TARGETS["attention"]) and isinstance(layer, torch.nn.Linear):
            found[f"{name}.lora_A"] = torch.randn(rank, layer.in_features)
            found[f"{name}.lora_B"] = torch.randn(layer.out_features, rank)
    return found


def save_again_and_again(folder: Path, times: int = 7) -> dict[str, float]:
    """Seconds of a save of weights and both moments."""
    weights = sd15_lora()
    moments = {f"{name}/{moment}": torch.randn(x.shape) for name, x in weights.items() for moment in ("exp_avg", "exp_avg_sq")}
    writer = CheckpointWriter(folder, 1, lambda step, text: print(text))
    seconds = []
    for step in range(1, times + 1):
        start = time.perf_counter()
        assert writer.save(step, {"weights": weights, "optimizer": moments}, {})
        seconds.append(time.perf_counter() - start)
    written = sum(p.stat().st_size for p in (folder / f"checkpoint-{times}").iterdir())
    median = statistics.median(seconds)
    return {"megabytes": written / 1e6, "seconds": median, "longest": max(seconds), "step_seconds_for_goal": median / (GOAL * INTERVAL)}


def main() -> None:
    """Print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=INTERVAL)
    parser.add_argument("--train_batch_size", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as home:
        runs = {
            "lora": share_of_a_run("diffusion_dpo", Path(home, "lora"), given.steps, train_batch_size=given.train_batch_size),
            "full": share_of_a_run("diffusion_dpo_full", Path(home, "full"), given.steps, train_batch_size=given.train_batch_size),
            "full, in the background": share_of_a_run(
                "diffusion_dpo_full", Path(home, "beside"), given.steps, train_batch_size=given.train_batch_size, save_in_background=True
            ),
        }
        sd15 = save_again_and_again(Path(home))
    machine = {"cores": os.cpu_count(), "ram_gb": round(psutil.virtual_memory().total / 1e9), "threads": 1}
    machine |= {"python": platform.python_version()}
    found = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions(), "interval": INTERVAL, "goal": GOAL}
    print(json.dumps(found | {**vars(given), "testbed": runs, "sd15_lora_rank_16": sd15}, indent=1))


if __name__ == "__main__":
    main()
