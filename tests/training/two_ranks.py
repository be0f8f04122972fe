"""Each of the two processes of test_sharding.py: gradients of a micro-batch, then a run, interrupted once; LoRA and all weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.launcher import leave_processes
from diffpref.training.loop import learn
from diffpref.training.objective import Objective
from diffpref.training.run import prepare_run
from diffpref.training.sharding import collected, is_sharded


def config(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    """Of the next run in this process."""
    AcceleratorState._reset_state()  # the process group stays
    GradientState._reset_state()
    return TrainConfig(**settings | changes)


def gradients(settings: dict[str, Any], folder: Path) -> None:
    """Write the gradients of the first micro-batch of each process, averaged over the processes, and what part of them one holds."""
    errors = str(folder.with_suffix(".safetensors")) if settings["tune"] == "lora" else None  # the sharded reference answers beforehand
    run = prepare_run(config(settings, output_dir=str(folder), reference_errors=errors), Objective(DiffusionDPO(beta=100.0)))
    learn(run, next(run.source))
    found = {name: p.grad for name, p in run.trainable.items() if p.grad is not None}
    own = sum(x.to_local().numel() for x in found.values() if is_sharded(x))
    total = sum(x.numel() for x in found.values())
    kept = {name: collected(x) for name, x in found.items()}
    if run.accelerator.is_main_process:
        save_file(kept, folder / "gradients.safetensors", {"share": str(own / total)})
    run.log.close()


def main() -> None:
    """Both ways of training, of which the second takes the launcher's word for it."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it would end the process group, which the next run needs
    for tune in ("lora", "full"):
        given = settings | {"tune": tune, "shard": "weights" if tune == "lora" else "no"}
        parts = [("run", 3, None)] if tune == "lora" else [("run", 2, None), ("run", 3, "latest")]
        for name, steps, resume in [("gradients", 1, None), *parts]:
            if tune == "full":
                os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="false")
            place = folder / f"{tune}-{name}"
            if name == "gradients":
                gradients(given, place)
            else:
                end = config(given, output_dir=str(place), max_train_steps=steps, resume_from_checkpoint=resume)
                align(end, DiffusionDPO(beta=100.0))
    leave_processes()


if __name__ == "__main__":
    main()
