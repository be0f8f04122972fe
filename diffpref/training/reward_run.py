"""Putting a reward-model run together: settings in, everything that its loop needs out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import yaml
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from diffpref.data.pairs import PairDataset, write_rejected
from diffpref.data.sampler import PairSampler
from diffpref.scorers.preprocessing import Preprocessing, ShortestSideCrop, normalise
from diffpref.training import checkpoint
from diffpref.training.device import new_accelerator, pairs_per_update
from diffpref.training.optim import unwrapped
from diffpref.training.pairs import load_run_pairs
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_model import RewardModel, load_reward_model
from diffpref.training.reward_pairs import RewardBatch, RewardPairs
from diffpref.training.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    claim_folder,
    git_revision,
    make_folder,
    versions,
    write_json,
    write_whole,
)
from diffpref.training.run_log import RunLog
from diffpref.training.saving import CheckpointWriter
from diffpref.training.settings import Settings, to_flat
from diffpref.training.step_aware import StepAwareModel, load_step_aware, relabelled
from diffpref.training.step_aware_config import StepAwareConfig


class View(Protocol):
    """What a model sees of a batch."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are decoded."""

    @property
    def levels(self) -> tuple[int | None, ...]:
        """Noise levels that held-out pairs are looked at; None is no noise at all."""

    def __call__(self, batch: RewardBatch, level: int | None = None) -> tuple[Tensor, ...]:
        """What comes before the prompts in a call of the model, on its device."""


@dataclass(frozen=True)
class PlainView:
    """The pictures themselves, as the finished scorer sees them."""

    preprocessing: Preprocessing
    device: torch.device
    levels: tuple[int | None, ...] = (None,)

    def __call__(self, batch: RewardBatch, level: int | None = None) -> tuple[Tensor, ...]:
        """Normalised pictures (G, 2, 3, S, S)."""
        return (normalise(batch.pixels.to(self.device).flatten(0, 1)).unflatten(0, (-1, 2)),)


@dataclass(frozen=True)
class Best:
    """The weights that agreed best with the held-out labels."""

    step: int
    accuracy: float
    weights: dict[str, Tensor]  # copies on the CPU
    by_level: dict[str, float] = field(default_factory=dict)  # accuracies of a step-aware model, "t<timestep>" each


@dataclass
class RewardRun:
    """The state of a run."""

    config: RewardModelConfig
    accelerator: Accelerator
    folder: Path
    model: RewardModel | StepAwareModel
    view: View
    wrapped: nn.Module  # as accelerate prepared it; every forward with gradients goes through it
    trainable: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]  # learning rate of the update after so many finished ones
    data: RewardPairs
    sampler: PairSampler
    held_out: RewardPairs | None
    log: RunLog
    first_step: int = 0
    best: Best | None = None  # on the main process only
    writer: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter(self.folder, self.config.checkpoints_total_limit, lambda step, text: self.say(text))

    def say(self, text: str) -> None:
        """Print once, above the progress bar."""
        if self.accelerator.is_main_process:
            self.log.bar.write(text, file=sys.stderr)

    def batches(self) -> Generator[RewardBatch, None, None]:
        """This rank's micro-batches from the first step to the last."""
        config, accelerator = self.config, self.accelerator
        micro = self.sampler.micro_batches(
            accelerator.process_index,
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            world_size=accelerator.num_processes,
            first_step=self.first_step,
        )
        needed = (config.max_train_steps - self.first_step) * config.gradient_accumulation_steps
        return self.data.batches((next(micro) for _ in range(needed)), config.dataloader_num_workers)

    def total_weight(self, step: int) -> float:
        """Weight of all pairs of one update. The order is known to every rank, so nothing has to be sent."""
        size, accumulation, world = self.config.train_batch_size, self.config.gradient_accumulation_steps, self.accelerator.num_processes
        items = (
            self.sampler.micro_batch(step, micro, rank, batch_size=size, accumulation=accumulation, world_size=world)
            for micro in range(accumulation)
            for rank in range(world)
        )
        return self.data.total_weight(i for batch in items for i, _ in batch)

    def scores(self, module: nn.Module, batch: RewardBatch, level: int | None = None) -> Tensor:
        """Scaled scores (G, 2) in float32; level: one of the view's, in place of the batch's own."""
        with self.accelerator.autocast():
            return module(*self.view(batch, level), batch.prompts).float()


def prepare(config: RewardModelConfig, step_aware: StepAwareConfig | None = None) -> RewardRun:
    """Check, load and connect everything; the cheap checks come first. Raises ValueError for whatever the user can mend.

    step_aware: what the model of SPO needs beside `config`; an ordinary reward model without it.
    """
    shared = config.shared()
    accelerator = new_accelerator(shared)
    settings = to_flat(*(part for part in (config, step_aware) if part))
    folder, resume = claim_folder(Path(str(config.output_dir)), settings, config.resume_from_checkpoint, accelerator)
    pairs, held_out = load_run_pairs(shared, accelerator.is_main_process)
    pairs, held_out = relabelled((pairs, held_out), step_aware, accelerator)
    if held_out is not None and (held_out.p0 == 0.5).all():
        raise ValueError(
            f"held_out_pairs is {config.held_out_pairs}, but all of those pairs are ties, on which no model can be chosen; raise it"
        )
    model, view = load_step_aware(config, step_aware, accelerator) if step_aware else load_plain(config, accelerator.device)
    trainable: dict[str, Tensor] = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        trainable.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
    ).lr_lambdas[0]
    first_step, best = restore(resume, trainable, optimizer, config, pairs_per_update(shared, accelerator), pairs.fingerprint)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if accelerator.is_main_process:
        checkpoint.set_aside_after(folder, first_step)
        open_folder(folder, config, settings, pairs, held_out, accelerator)
    return RewardRun(
        config=config,
        accelerator=accelerator,
        folder=folder,
        model=model,
        view=view,
        wrapped=wrapped,
        trainable=trainable,
        optimizer=prepared,
        rate=lambda step: config.learning_rate * schedule(step),
        data=RewardPairs(pairs, view.preprocessing),
        sampler=PairSampler(len(pairs), config.seed),
        held_out=None if held_out is None else RewardPairs(held_out, view.preprocessing),
        log=RunLog(accelerator, folder, config.max_train_steps, pairs_per_update(shared, accelerator), first_step),
        first_step=first_step,
        best=best if accelerator.is_main_process else None,
    )


def load_plain(config: RewardModelConfig, device: torch.device) -> tuple[RewardModel, PlainView]:
    """An ordinary reward model and what it sees."""
    model = load_reward_model(config, device)
    return model, PlainView(ShortestSideCrop(model.towers.image_size), device)


def open_folder(
    folder: Path, config: RewardModelConfig, settings: Settings, pairs: PairDataset, held_out: PairDataset | None, accelerator: Accelerator
) -> None:
    """Create the run folder with resolved settings, manifest and rejected rows."""
    make_folder(folder)
    write_whole(folder / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))
    if pairs.rejected:
        write_rejected(pairs, folder / "rejected_rows.jsonl")
        print(f"rejected rows are listed in {folder / 'rejected_rows.jsonl'}", file=sys.stderr)
    facts = {"pairs": len(pairs), "ties": pairs.ties, "rejected": len(pairs.rejected), "fingerprint": pairs.fingerprint}
    manifest = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "settings": settings,
        "pairs_per_update": pairs_per_update(config.shared(), accelerator),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "data": facts | {"prompts": len(set(pairs.prompts)), "held_out_pairs": 0 if held_out is None else len(held_out)},
        "git_revision": git_revision(),
        "versions": versions(),
    }
    write_json(folder / MANIFEST_FILE, manifest)


def restore(
    folder: Path | None,
    trainable: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    config: RewardModelConfig,
    pairs_in_update: int,
    data: str,
) -> tuple[int, Best | None]:
    """Load a checkpoint into the existing parameters; returns the number of finished steps and the best weights so far.

    Raises ValueError when the pairs or the number of pairs per update are not those of the checkpoint.
    """
    if folder is None:
        return 0, None
    tensors, state = checkpoint.load_checkpoint(folder)
    if state["pairs_per_update"] != pairs_in_update:
        raise ValueError(
            f"train_batch_size x gradient_accumulation_steps x processes is {pairs_in_update}, but the checkpoint was trained with "
            f"{state['pairs_per_update']} pairs per update; choose them so that the product stays"
        )
    if state["data"] != data:
        name = "train_data_dir" if config.train_data_dir else "dataset_name"
        raise ValueError(
            f"{name} {getattr(config, name)!r} holds other pairs than the checkpoint was trained on; bring back the data, or start anew"
        )
    checkpoint.restore(trainable, optimizer, tensors)
    best = Best(**state["best"], weights=tensors["best"]) if state["best"] else None
    return int(state["step"]), best


def save(run: RewardRun, step: int) -> bool:
    """Write a checkpoint from the main process; a full disk is reported and training goes on. False if it was not written."""
    saved = True
    if run.accelerator.is_main_process:
        tensors = {"weights": run.trainable, "optimizer": checkpoint.optimizer_tensors(run.trainable, unwrapped(run.optimizer))}
        if run.best:
            tensors["best"] = run.best.weights
        state = {
            "pairs_per_update": pairs_per_update(run.config.shared(), run.accelerator),
            "data": run.data.pairs.fingerprint,
            "best": {"step": run.best.step, "accuracy": run.best.accuracy, "by_level": run.best.by_level} if run.best else None,
        }
        save = run.writer.save_last if step == run.config.max_train_steps else run.writer.save
        saved = save(step, tensors, state)
    run.accelerator.wait_for_everyone()
    return saved
