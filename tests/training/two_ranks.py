"""Each of the two processes of test_sharding.py: gradients of a micro-batch, then a run, interrupted once; LoRA and all weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch import Tensor, nn

import diffpref.training.run
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.launcher import leave_processes
from diffpref.training.loop import learn
from diffpref.training.objective import Objective
from diffpref.training.run import prepare_run
from diffpref.training.sharding import collected, is_sharded, share_out

frozen: list[nn.Module] = []
"""The frozen copy of the last run, if it had one."""


def watched(config: TrainConfig, module: nn.Module, frozen_copy: nn.Module | None) -> nn.Module | None:
    """share_out, which keeps the frozen copy where the test can look at it."""
    frozen[:] = [frozen_copy] if frozen_copy is not None else []
    return share_out(config, module, frozen_copy)


def share(tensors: Iterable[Tensor]) -> str:
    """Part of the numbers that this process holds."""
    kept = list(tensors)
    own = sum((x.to_local() if is_sharded(x) else x).numel() for x in kept)  # type: ignore[attr-defined]
    return str(own / sum(x.numel() for x in kept))


def config(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    """Of the next run in this process."""
    AcceleratorState._reset_state()  # the process group stays
    GradientState._reset_state()
    return TrainConfig(**settings | changes)


def gradients(settings: dict[str, Any], folder: Path) -> None:
    """Write the gradients of the first micro-batch of each process, averaged over the processes, and what part of all this one holds."""
    errors = str(folder.with_suffix(".safetensors")) if settings["tune"] == "lora" else None  # the sharded reference answers beforehand
    run = prepare_run(config(settings, output_dir=str(folder), reference_errors=errors), Objective(DiffusionDPO(beta=100.0)))
    learn(run, next(run.source))
    found = {name: p.grad for name, p in run.trainable.items() if p.grad is not None}
    shares = {"share": share(found.values())}
    if frozen:
        shares["frozen_share"] = share(frozen[0].parameters())
    kept = {name: collected(x) for name, x in found.items()}
    if run.accelerator.is_main_process:
        save_file(kept, folder / "gradients.safetensors", shares)
    run.log.close()


def main() -> None:
    """Both ways of training, of which the second takes the launcher's word for it: first FSDP2, then, to go on, DeepSpeed's ZeRO-2."""
    diffpref.training.run.share_out = watched
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it would end the process group, which the next run needs
    for tune in ("lora", "full"):
        given = settings | {"tune": tune, "shard": "weights" if tune == "lora" else "no", "gradient_checkpointing": tune == "full"}
        parts = [("run", 3, None)] if tune == "lora" else [("run", 2, None), ("run", 3, "latest")]
        for name, steps, resume in [("gradients", 1, None), *parts]:
            if resume:
                os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")
            elif tune == "full":
                os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="false")
            place = folder / f"{tune}-{name}"
            if name == "gradients":
                gradients(given, place)
            else:
                end = config(given, output_dir=str(place), max_train_steps=steps, resume_from_checkpoint=resume)
                align(end, DiffusionDPO(beta=100.0))
    leave_processes(0)


if __name__ == "__main__":
    main()
