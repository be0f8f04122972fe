"""One call from settings to an aligned model on disk; the command line and Python users share it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffpref.methods import Method
from diffpref.training.config import TrainConfig
from diffpref.training.export import export
from diffpref.training.loop import train
from diffpref.training.objective import Objective, as_objective
from diffpref.training.run import prepare_run


@dataclass(frozen=True)
class Aligned:
    """A finished run."""

    folder: Path
    is_main_process: bool
    timings: dict[str, float]  # seconds


def align(config: TrainConfig, method: Method | Objective, notes: Sequence[str] = ()) -> Aligned:
    """Train and export into config.output_dir, outputs/<method>-<time> if that is None.

    `method` is one of METHODS, any object with the same attributes (docs/extend.md), or an Objective with its path and guards.
    `notes` are lines about where settings came from; they are printed and stored in the manifest.

    Raises ValueError for settings and data that cannot work, Stopped after a signal, NotFinite after three non-finite updates in
    a row; in the last two cases the newest checkpoint is complete.
    """
    objective = as_objective(method)
    name = objective.name
    folder = config.output_dir or f"outputs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    start = time.perf_counter()
    run = prepare_run(dataclasses.replace(config, method=name, output_dir=folder), objective, notes)
    loaded = time.perf_counter()
    try:
        train(run)
    finally:
        run.log.close()
    trained = time.perf_counter()
    if run.accelerator.is_main_process:
        with run.exported():
            export(run.backbone.pipeline, run.folder, config.tune, config.merge_lora)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return Aligned(run.folder, run.accelerator.is_main_process, {"loading": loaded - start, "training": trained - loaded})
