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
from diffpref.training.hub import upload
from diffpref.training.loop import train
from diffpref.training.model_card import CARD_FILE, PICTURE, write_card
from diffpref.training.objective import Objective, as_objective
from diffpref.training.run import prepare_run
from diffpref.training.run_folder import CONFIG_FILE


@dataclass(frozen=True)
class Aligned:
    """A finished run."""

    folder: Path
    is_main_process: bool
    repository: str | None  # its id on the hub, if it was pushed
    timings: dict[str, float]  # seconds


def align(config: TrainConfig, method: Method | Objective, notes: Sequence[str] = ()) -> Aligned:
    """Train and export into config.output_dir, outputs/<method>-<time> if that is None.

    `method` is one of METHODS, any object with the same attributes (docs/extend.md), or an Objective with its path and guards.
    `notes` are lines about where settings came from; they are printed and stored in the manifest.

    Raises ValueError for settings and data that cannot work, and when the upload fails after everything was written; Stopped after a
    signal, NotFinite after three non-finite updates in a row: then the newest checkpoint is complete.
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
            names = export(run.backbone.pipeline, run.folder, config.tune, config.merge_lora)
        write_card(run.folder, run.repository)
        if run.repository:
            upload(config, run.repository, run.folder, [*names, CARD_FILE, CONFIG_FILE], "Aligned model")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    timings = {"loading": loaded - start, "training": trained - loaded}
    return Aligned(run.folder, run.accelerator.is_main_process, run.repository, timings)


def refresh_card(aligned: Aligned, config: TrainConfig) -> None:
    """Put the scores of an evaluation that was written into the run folder on the card, also on the hub."""
    write_card(aligned.folder, aligned.repository)
    if aligned.repository:
        upload(config, aligned.repository, aligned.folder, [CARD_FILE, PICTURE], "Scores")
