"""Putting a run together: settings in, everything that the loop needs out. The one place where the parts meet."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffpref.core.policy import adapter_off, frozen
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Predict, PreferenceBatch
from diffpref.data.sampler import PairSampler
from diffpref.methods import Method
from diffpref.models.backbone import Backbone
from diffpref.models.lora import trainable_state
from diffpref.paths.forward import ForwardNoising
from diffpref.training import checkpoint
from diffpref.training.config import TrainConfig
from diffpref.training.device import new_accelerator, pairs_per_update
from diffpref.training.models import load_models
from diffpref.training.optim import new_optimizer, new_schedule, unwrapped
from diffpref.training.pairs import load_run_pairs
from diffpref.training.run_folder import claim, open_folder
from diffpref.training.run_log import RunLog
from diffpref.training.sources import held_out_accuracy, new_encoder, new_pixels, new_sampler, new_source
from diffpref.training.validation import Validation


@dataclass
class Run:
    """The state of a training run."""

    config: TrainConfig
    method: Method
    accelerator: Accelerator
    folder: Path
    backbone: Backbone
    wrapped: nn.Module  # the UNet as accelerate prepared it; every policy forward goes through it
    trainable: dict[str, Tensor]
    policy: Predict
    reference: Predict | None
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    source: Iterator[PreferenceBatch]
    log: RunLog
    validation: Validation | None
    data: str  # fingerprint of the training pairs
    first_step: int = 0
    path: ForwardNoising = field(default_factory=ForwardNoising)

    @property
    def process(self) -> DdpmProcess:
        """The noise process of the model."""
        return self.backbone.process

    def say(self, text: str) -> None:
        """Print once, above the progress bar."""
        if self.accelerator.is_main_process:
            self.log.bar.write(text, file=sys.stderr)

    def agree(self, code: int) -> int:
        """The largest code of all ranks, so that they stop at the same step."""
        if self.accelerator.num_processes == 1:
            return code
        return int(self.accelerator.gather(torch.tensor([code], device=self.accelerator.device)).max())

    def save(self, step: int) -> bool:
        """Write a checkpoint from the main process; a full disk is reported and training goes on. False if it was not written."""
        saved = True
        if self.accelerator.is_main_process:
            tensors = {"weights": self.trainable, "optimizer": checkpoint.optimizer_tensors(self.trainable, unwrapped(self.optimizer))}
            state = {
                "scheduler": {"last_epoch": self.scheduler.last_epoch},
                "pairs_per_update": pairs_per_update(self.config, self.accelerator),
                "data": self.data,
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            try:
                checkpoint.save_checkpoint(self.folder, step, tensors, state, self.config.checkpoints_total_limit)
            except (OSError, FloatingPointError) as error:
                saved = False
                reason = getattr(error, "strerror", None) or error
                self.say(f"checkpoint of step {step} not written ({reason}); older ones are kept, training goes on")
        self.accelerator.wait_for_everyone()
        return saved

    def validate(self, step: int) -> None:
        """Held-out accuracy and pictures."""
        if self.validation and self.accelerator.is_main_process:
            self.validation.draw(step)  # outside autocast: SDXL's autoencoder overflows in fp16
            if self.validation.accuracy:
                with self.accelerator.autocast():  # the frozen copy is not wrapped, and must compute as the policy does
                    found = self.validation.accuracy()
                self.log.record(step, found)
        self.accelerator.wait_for_everyone()


def prepare_run(config: TrainConfig, method: Method, notes: Sequence[str] = ()) -> Run:
    """Check, load and connect everything; the cheap checks come first. Raises ValueError for whatever the user can mend."""
    accelerator = new_accelerator(config)
    if accelerator.is_main_process:
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    folder, resume = claim(config, method, accelerator)
    pairs, held_out = load_run_pairs(config, accelerator.is_main_process)
    backbone, reference_unet = load_models(config, method, accelerator.device)
    denoiser = backbone.denoiser
    pixels = new_pixels(config, pairs, backbone, accelerator.is_main_process)
    sampler = new_sampler(config, pixels)
    config = with_steps(config, sampler, accelerator)
    trainable = trainable_state(denoiser)
    validation = None
    if config.validation_steps and accelerator.is_main_process:
        validation = Validation.start(config, folder, backbone.pipeline, held_out)
    optimizer = new_optimizer(config, trainable)
    scheduler = new_schedule(config, optimizer)
    first_step = restore(resume, trainable, optimizer, scheduler, config, accelerator, pairs.fingerprint)
    wrapped, prepared = accelerator.prepare(denoiser, optimizer)
    policy = backbone.predictor(wrapped)
    reference = None
    if method.needs_reference:
        reference = frozen(backbone.predictor, reference_unet) if reference_unet is not None else adapter_off(denoiser, policy)
    encoder = new_encoder(config, backbone, accelerator.device)
    source = new_source(config, pixels, sampler, encoder, accelerator, first_step)
    open_folder(folder, config, method, pairs, accelerator, backbone, notes)
    log = RunLog(accelerator, folder, config.max_train_steps, pairs_per_update(config, accelerator), first_step)
    if validation and held_out is not None and reference is not None:
        validation.accuracy = held_out_accuracy(config, held_out, backbone, reference, encoder)
    return Run(
        config=config,
        method=method,
        accelerator=accelerator,
        folder=folder,
        backbone=backbone,
        wrapped=wrapped,
        trainable=trainable,
        policy=policy,
        reference=reference,
        optimizer=prepared,
        scheduler=scheduler,
        source=source,
        log=log,
        validation=validation,
        data=pairs.fingerprint,
        first_step=first_step,
    )


def with_steps(config: TrainConfig, sampler: PairSampler, accelerator: Accelerator) -> TrainConfig:
    """Settings whose max_train_steps are num_train_epochs passes over the pairs, if those are given; the last pass is completed."""
    if config.num_train_epochs is None:
        return config
    micro_batches = sampler.num_micro_batches(config.num_train_epochs, config.train_batch_size)
    steps = math.ceil(micro_batches / (config.gradient_accumulation_steps * accelerator.num_processes))
    return dataclasses.replace(config, max_train_steps=steps)


def restore(
    folder: Path | None,
    trainable: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    config: TrainConfig,
    accelerator: Accelerator,
    data: str,
) -> int:
    """Load a checkpoint into the existing parameters; returns the number of finished steps, 0 without a checkpoint.

    Raises ValueError when the pairs or the number of pairs per update are not those of the checkpoint.
    """
    if folder is None:
        return 0
    tensors, state = checkpoint.load_checkpoint(folder)
    now = pairs_per_update(config, accelerator)
    if state["pairs_per_update"] != now:
        raise ValueError(
            f"train_batch_size x gradient_accumulation_steps x processes is {now}, but the checkpoint was trained with "
            f"{state['pairs_per_update']} pairs per update; choose them so that the product stays"
        )
    if state["data"] != data:
        raise ValueError(f"{config.data_source!r} holds other pairs than the checkpoint was trained on; bring back the data, or start anew")
    checkpoint.restore(trainable, optimizer, tensors)
    scheduler.last_epoch = state["scheduler"]["last_epoch"]
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["step"])
