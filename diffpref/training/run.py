"""Putting a run together: settings in, everything that the loop needs out. The one place where the parts meet."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffpref.core.policy import adapter_off, frozen
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Predict, PreferenceBatch
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import PairDataset
from diffpref.data.sampler import PairSampler
from diffpref.methods import Method
from diffpref.models.backbone import Backbone, load_backbone
from diffpref.models.lora import add_lora, trainable_state
from diffpref.paths.forward import ForwardNoising
from diffpref.sources.dataset import Encoder, LatentCache, from_disk
from diffpref.training import checkpoint
from diffpref.training.config import TrainConfig
from diffpref.training.pairs import load_run_pairs
from diffpref.training.run_folder import claim, open_folder
from diffpref.training.run_log import RunLog
from diffpref.training.validation import HeldOut, Validation


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


def prepare_run(config: TrainConfig, method: Method) -> Run:
    """Check, load and connect everything; the cheap checks come first. Raises ValueError for whatever the user can mend."""
    accelerator = new_accelerator(config)
    folder, resume = claim(config, method, accelerator)
    pairs, held_out = load_run_pairs(config, accelerator.is_main_process)
    backbone, reference_unet = load_models(config, method, accelerator.device)
    resolution, denoiser = check_resolution(config, backbone), backbone.denoiser
    trainable = trainable_state(denoiser)
    validation = None
    if config.validation_steps and accelerator.is_main_process:
        validation = Validation.start(config, folder, backbone.pipeline, held_out)
    optimizer = new_optimizer(config, trainable)
    scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
    )
    first_step = restore(resume, trainable, optimizer, scheduler, config, accelerator, pairs.fingerprint)
    wrapped, prepared = accelerator.prepare(denoiser, optimizer)
    policy = backbone.predictor(wrapped)
    reference = None
    if method.needs_reference:
        reference = frozen(backbone.predictor, reference_unet) if reference_unet is not None else adapter_off(denoiser, policy)
    encoder = new_encoder(config, backbone, accelerator.device)
    sampler = PairSampler(len(pairs), config.seed)
    pixels = PairPixels(pairs, resolution, config.seed, 0.0 if config.no_hflip else 0.5, config.random_crop)
    source = new_source(config, pixels, sampler, encoder, accelerator, first_step)
    open_folder(folder, config, method, pairs, accelerator, backbone)
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


def load_models(config: TrainConfig, method: Method, device: torch.device) -> tuple[Backbone, UNet2DConditionModel | None]:
    """The model with a trainable UNet, and the frozen copy that full training compares with, if the method needs one."""
    backbone = load_backbone(str(config.pretrained_model_name_or_path), config.revision, config.variant)
    check_resolution(config, backbone)
    denoiser = backbone.denoiser
    make_trainable(config, denoiser)
    reference = copy.deepcopy(denoiser) if config.tune == "full" and method.needs_reference else None
    backbone.pipeline.to(device)
    if reference is not None:
        reference.to(device)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.eval()  # dropout would make policy and reference differ; even of probability 0 it changes memory layouts, and so rounding
    return backbone, reference


def new_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ValueError for settings that this machine cannot run, and for ranks that do not know of each other."""
    on_cpu = not torch.cuda.is_available()  # also on a Mac, whose GPU has no float64 for the noise tables
    if (config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16" and on_cpu:
        raise ValueError("mixed_precision is fp16, which needs a GPU; on a CPU use no or bf16")
    trackers = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu, log_with=trackers, project_dir=config.output_dir)
    except ValueError as error:
        raise ValueError(f"report_to {config.report_to!r}: {error}; install it with pip install diffpref[trackers], or use none") from error
    if trackers and not accelerator.log_with:
        raise ValueError(f"report_to {config.report_to!r} is not installed; install it with pip install diffpref[trackers], or use none")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported; use one process or plain data parallel"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {world} but {accelerator.num_processes} process takes part; launch with torchrun or accelerate launch"
        )
    return accelerator


def check_resolution(config: TrainConfig, backbone: Backbone) -> int:
    """The training resolution. Raises ValueError when the model cannot take it."""
    resolution, factor = config.resolution or backbone.default_resolution, backbone.pixel_factor
    if resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise ValueError(
            f"resolution is {resolution}; this model needs a multiple of {factor} (VAE and UNet down-sampling), for example {near}"
        )
    return resolution


def make_trainable(config: TrainConfig, denoiser: UNet2DConditionModel) -> None:
    """Attach an adapter, or unfreeze the UNet."""
    if config.tune == "lora":
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        add_lora(denoiser, config.rank, alpha, config.lora_targets, config.seed)
    else:
        denoiser.requires_grad_(True)


def new_optimizer(config: TrainConfig, trainable: dict[str, Tensor]) -> torch.optim.Optimizer:
    """AdamW in one fused kernel."""
    return torch.optim.AdamW(
        trainable.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def pairs_per_update(config: TrainConfig, accelerator: Accelerator) -> int:
    """Pairs behind one optimizer step, all ranks together."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes


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


def new_encoder(config: TrainConfig, backbone: Backbone, device: torch.device) -> Encoder:
    """The frozen encoders of the model, with the run's prompt dropout."""
    return Encoder(
        encode_moments=backbone.encode_moments,
        encode_prompts=backbone.encode_prompts,
        null_prompt=backbone.null_prompt(),
        uses_time_ids=backbone.uses_time_ids,
        device=device,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
        prompt_cache={} if config.cache_latents else None,
    )


def new_source(
    config: TrainConfig, pixels: PairPixels, sampler: PairSampler, encoder: Encoder, accelerator: Accelerator, first_step: int
) -> Iterator[PreferenceBatch]:
    """This rank's micro-batches from `first_step` on."""

    def items() -> Iterator[list[tuple[int, int]]]:
        return sampler.micro_batches(
            accelerator.process_index,
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            world_size=accelerator.num_processes,
            first_step=first_step,
        )

    if config.cache_latents:
        return LatentCache.build(pixels, encoder, config.train_batch_size).batches(items, encoder)
    return from_disk(pixels, items, encoder, config.dataloader_num_workers)


def held_out_accuracy(config: TrainConfig, held_out: PairDataset, backbone: Backbone, reference: Predict, encoder: Encoder) -> HeldOut:
    """Implicit accuracy on the held-out pairs, with their full prompts and without mirroring."""
    pixels = PairPixels(held_out, check_resolution(config, backbone), config.seed)
    plain = dataclasses.replace(encoder, proportion_empty_prompts=0.0, prompt_cache={})
    return HeldOut.build(backbone, reference, pixels, plain, config.train_batch_size)
