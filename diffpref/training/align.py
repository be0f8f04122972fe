"""One call from settings to an aligned model on disk; the command line and Python users share it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffpref.methods import Method
from diffpref.sources.stepwise import StepScorer
from diffpref.training.config import TrainConfig
from diffpref.training.export import export
from diffpref.training.hub import upload
from diffpref.training.loop import train
from diffpref.training.memory import words
from diffpref.training.model_card import CARD_FILE, PICTURE, write_card
from diffpref.training.objective import Objective, as_objective
from diffpref.training.preflight import brief
from diffpref.training.run import Run, prepare_run
from diffpref.training.run_folder import CONFIG_FILE
from diffpref.training.stopping import NotSaved, OutOfMemory


@dataclass(frozen=True)
class Aligned:
    """A finished run."""

    folder: Path
    is_main_process: bool
    repository: str | None  # its id on the hub, if it was to be pushed
    pushed: bool  # whether it is there
    timings: dict[str, float]  # seconds


def align(config: TrainConfig, method: Method | Objective, notes: Sequence[str] = (), step_scorer: StepScorer | None = None) -> Aligned:
    """Train and export into config.output_dir, outputs/<method>-<time> if that is None.

    `method` is one of METHODS, any object with the same attributes (docs/extend.md), or an Objective with its path and guards.
    `notes` are lines about where settings came from; they are printed and stored in the manifest. `step_scorer` judges what a method
    that samples its own pairs has sampled, in place of the scorer that the setting of this name names.

    Raises ValueError for settings and data that cannot work, and one of the ends of stopping.py for a run that cannot go on: then the
    newest checkpoint is complete. An upload that fails is an event, and `pushed` is false.
    """
    objective = as_objective(method)
    name = objective.name
    folder = config.output_dir or f"outputs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    start = time.perf_counter()
    run = prepare_run(dataclasses.replace(config, method=name, output_dir=folder), objective, notes, step_scorer)
    loaded = time.perf_counter()
    try:
        with memory_explained(run):
            train(run)
    finally:
        run.log.close()
    trained, pushed = time.perf_counter(), False
    run.make_whole()
    if run.accelerator.is_main_process:
        try:
            with run.exported():
                names = export(run.backbone.pipeline, run.folder, config.tune, config.merge_lora)
                names += run.port.save(run.folder, run.backbone.denoiser) if run.port else []
        except (OSError, SafetensorError) as error:
            raise NotSaved(f"the aligned model could not be written ({error}); {again(run)}") from error
        write_card(run.folder, run.repository)
        if run.repository:
            why = upload(config, run.repository, run.folder, [*names, CARD_FILE, CONFIG_FILE], "Aligned model")
            pushed = why is None
            if why:
                run.log.event(config.max_train_steps, "not uploaded", why)
    run.accelerator.wait_for_everyone()
    run.log.finish(run.config.max_train_steps)
    if run.unsaved:
        raise NotSaved(f"the aligned model is written, but the checkpoint of the last step could not be; {again(run)}")
    timings = {"loading": loaded - start, "training": trained - loaded}
    return Aligned(run.folder, run.accelerator.is_main_process, run.repository, pushed, timings)


def again(run: Run) -> str:
    """How to repeat what failed."""
    return f"make space, then repeat the command with --resume_from_checkpoint latest --output_dir {run.folder}"


@contextmanager
def memory_explained(run: Run) -> Iterator[None]:
    """Turn a lack of memory within the block into OutOfMemory, which says what would fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
        if not is_memory:
            raise
        again_with = f"Continue with --resume_from_checkpoint latest --output_dir {run.folder}"
        if "DataLoader worker" in str(error):
            raise OutOfMemory(
                f"a decoding process had no memory for a picture (dataloader_num_workers is {run.config.dataloader_num_workers}; 0 decodes "
                f"in the training process). Use fewer, or smaller pictures: diffpref inspect lists their sizes. {again_with}"
            ) from error
        preflight = run.preflight
        counted = preflight.found.get("memory") if preflight else None
        advice = preflight.advice(0.9 * counted["bytes"]) if preflight and counted else "use a smaller train_batch_size, or tune lora"
        parts = ", ".join(f"{name} {words(size)}" for name, size in (counted or {}).items() if name not in _NO_PARTS)
        why = brief(error) + (f"; counted: {parts}" if parts else "")
        raise OutOfMemory(f"a step did not fit into the memory of {run.accelerator.device} ({why}); {advice}. {again_with}") from error


_NO_PARTS = ("bytes", "is_upper_bound", "available")


def refresh_card(aligned: Aligned, config: TrainConfig) -> None:
    """Put the scores of an evaluation that was written into the run folder on the card, also on the hub."""
    write_card(aligned.folder, aligned.repository)
    if aligned.repository and aligned.pushed:
        why = upload(config, aligned.repository, aligned.folder, [CARD_FILE, PICTURE], "Scores")
        if why:
            print(why, file=sys.stderr)
