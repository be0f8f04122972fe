"""Putting a run together: settings in, everything that the loop needs out. The one place where the parts meet."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffpref.core.policy import adapter_off, frozen, one_graph, stored, without_user
from diffpref.core.process import DdpmProcess
from diffpref.core.random import derived
from diffpref.core.types import Conditioning, Predict, PreferenceBatch
from diffpref.models.backbone import Backbone
from diffpref.sources.stepwise import StepScorer
from diffpref.training import checkpoint
from diffpref.training.alarms import held_out_alarm
from diffpref.training.config import TrainConfig
from diffpref.training.device import check_ranks_agree, check_same_weights, new_accelerator, pairs_per_update
from diffpref.training.ema import exchanged
from diffpref.training.hub import claim_repository
from diffpref.training.models import load_models
from diffpref.training.objective import Objective
from diffpref.training.optim import check_optimizer
from diffpref.training.port import Port
from diffpref.training.preflight import Preflight
from diffpref.training.probe import probe
from diffpref.training.reference_errors import check_reference_errors, open_or_compute, with_errors
from diffpref.training.run_data import Begin, RunPairs, RunPrompts, load_run_data
from diffpref.training.run_folder import claim, open_folder
from diffpref.training.run_log import RunLog
from diffpref.training.saving import CheckpointWriter
from diffpref.training.settings import to_flat
from diffpref.training.sharding import asked_by_launcher, check_sharding, filled, share_out
from diffpref.training.sources import held_out_accuracy
from diffpref.training.state import TrainingState
from diffpref.training.trackers import log_images, start_trackers
from diffpref.training.validation import Validation, load_scorer


@dataclass
class Run:
    """The state of a training run."""

    config: TrainConfig
    objective: Objective
    accelerator: Accelerator
    folder: Path
    backbone: Backbone
    wrapped: nn.Module  # the trained module as accelerate prepared it; every policy forward goes through it
    trainable: dict[str, Tensor]
    policy: Predict
    reference: Predict | None
    null: Conditioning  # the empty prompt (1, 1, ...), for guidance
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    state: TrainingState  # trainable, optimizer and scheduler, and what else a checkpoint holds
    validation: Validation | None
    data: str  # fingerprint of the training pairs
    port: Port | None = None
    outline: nn.Module | None = None  # of a sharded module, to be filled for the export
    first_step: int = 0
    repository: str | None = None  # full id on the hub, on the main process of a run that pushes
    preflight: Preflight | None = None
    unsaved: bool = False  # whether the last checkpoint could not be written
    source: Iterator[PreferenceBatch] = field(init=False)  # made after the preflight, because keeping latents takes long
    source_from: Callable[[TrainConfig, int], Iterator[PreferenceBatch]] = field(init=False, repr=False)  # (settings, first step)
    writer: CheckpointWriter = field(init=False)
    log: RunLog = field(init=False)  # likewise, because a run that is refused leaves no trace

    @property
    def process(self) -> DdpmProcess:
        """The noise process of the model."""
        return self.backbone.process

    def steps(self) -> range:
        """The steps that are left, counted from 0; none when the checkpoint is of a run that was stopped early."""
        early = self.state.early_stopping
        return range(self.first_step, self.first_step if early and early.is_over else self.config.max_train_steps)

    @property
    def data_seed(self) -> int:
        """Seed of order, noise and all other draws of the batches: the run's, another one after each return to a checkpoint."""
        return derived(self.config.seed, "data key", self.state.data_key) if self.state.data_key else self.config.seed

    def open_source(self, first_step: int) -> None:
        """Batches from `first_step` on, drawn with the data seed."""
        self.source = self.source_from(dataclasses.replace(self.config, seed=self.data_seed), first_step)

    def say(self, text: str) -> None:
        """Print once, above the progress bar."""
        self.log.say(text)

    def agree(self, code: int) -> int:
        """The largest code of all ranks, so that they stop at the same step."""
        if self.accelerator.num_processes == 1:
            return code
        return int(self.accelerator.gather(torch.tensor([code], device=self.accelerator.device)).max())

    def save(self, step: int, is_last: bool = False) -> bool:
        """Write a checkpoint from the main process; a full disk is reported and training goes on. False if it was not written."""
        saved = True
        check_same_weights(self.accelerator, self.trainable)
        tensors = self.state.tensors() if self.accelerator.is_main_process or self.outline is not None else {}
        if self.accelerator.is_main_process:
            facts = {"pairs_per_update": pairs_per_update(self.config, self.accelerator), "data": self.data}
            write = self.writer.save_last if is_last else self.writer.save
            saved = write(step, tensors, self.state.numbers() | facts)
        self.accelerator.wait_for_everyone()
        return saved

    def roll_back(self) -> int | None:
        """Load the newest complete checkpoint and draw other batches from there; its step, or None when there is no checkpoint.

        Every rank has to call this.
        """
        if self.accelerator.is_main_process:
            self.writer.wait()
        with self.accelerator.main_process_first():
            found, _ = checkpoint.find_checkpoint(self.folder, "latest") if checkpoint.checkpoints(self.folder) else (None, [])
        if found is None:
            return None
        key = self.state.data_key
        tensors, numbers = checkpoint.load_checkpoint(found)
        self.state.restore(tensors, numbers)
        self.state.data_key = key + 1
        step = int(numbers["step"])
        if self.accelerator.is_main_process:
            checkpoint.drop_best_after(self.folder, step)
        self.log.rewind(step)
        self.open_source(step)
        return step

    def validate(self, step: int) -> bool:
        """Held-out accuracy, pictures and their scores, by the weights that would be exported; whether to stop early, on all ranks."""
        if self.validation and self.accelerator.is_main_process:
            with self.state.evaluated():
                found, pictures = self.validation.look(step)  # outside autocast: SDXL's autoencoder overflows in fp16
                if self.validation.accuracy:
                    with self.accelerator.autocast():  # the frozen copy is not wrapped, and must compute as the policy does
                        found |= self.validation.accuracy()
                found |= self.keep_best(step, found)
            shown = partial(log_images, step=step, images={"validation/policy": pictures}, prompts=self.validation.prompts)
            self.log.track(step, shown)
            if found:
                self.log.record(step, found)
            if (alarm := held_out_alarm(found)) is not None:
                self.log.event(step, "saturated", f"step {step}: {alarm}")
        self.accelerator.wait_for_everyone()
        early = self.state.early_stopping
        return early is not None and bool(self.agree(int(early.is_over)))

    def keep_best(self, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """Under early stopping: count this validation, write best-<step> if it is the best so far, and say where the best stands."""
        early = self.state.early_stopping
        if early is None:
            return {}
        if early.improves(step, found[early.key]):
            try:
                checkpoint.save_best(self.folder, step, self.trainable, {early.key: early.best})
            except (OSError, FloatingPointError) as error:
                reason = getattr(error, "strerror", None) or error
                self.log.event(step, "not saved", f"best weights of step {step} not written ({reason}); training goes on")
        return {"early_stopping/best": early.best, "early_stopping/best_step": early.best_step, "early_stopping/waited": early.waited}

    def make_whole(self) -> None:
        """Put a sharded model's weights together in the main process, for the export. Every rank has to call this."""
        if self.outline is not None:
            self.backbone.pipeline.unet = filled(self.outline, self.wrapped)

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Within the block the model has the weights to export: of the best validation under early stopping, else the validated ones."""
        if self.config.tune == "full" or self.config.merge_lora:
            self.backbone.complete()
        early = self.state.early_stopping
        best = checkpoint.load_best(self.folder, early.best_step) if early else None
        if early and best is None:
            self.say(f"best-{early.best_step} is damaged or gone; the last weights are exported")
        elif early and best is not None:
            self.say(f"exporting the weights of step {early.best_step}, the best validation: {early.key} {early.best:.4g}")
        elif self.state.ema:
            self.say(f"exporting the moving average of the weights (ema_decay {self.config.ema_decay:g})")
        on_device = {name: x.to(self.trainable[name].device) for name, x in (best or {}).items()}
        with exchanged(self.trainable, on_device) if best is not None else self.state.evaluated():
            yield


def prepare_run(config: TrainConfig, objective: Objective, notes: Sequence[str] = (), step_scorer: StepScorer | None = None) -> Run:
    """Check, load and connect everything, the cheap checks first; step_scorer: see `align`. Raises ValueError for what a user can mend."""
    config, notes = launched(config, notes)
    accelerator = new_accelerator(config)
    accelerator.print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    preflight = Preflight(config, accelerator)
    preflight.check_start(Path(str(config.output_dir)))
    folder, resume, repository = claim_places(config, objective, accelerator)
    objective, data = load_run_data(config, objective, accelerator, step_scorer)
    scorer = load_scorer(config.validation_scorer, accelerator.device) if accelerator.is_main_process else None
    with preflight.loading():
        backbone, module, frozen_copy = load_models(config, objective, accelerator.device, data.port, accelerator.mixed_precision)
    supply = data.supply(config, objective, backbone, accelerator)
    preflight.config = config = supply.config
    preflight.check_model(objective, backbone, module, supply.pictures, folder, resume)
    outline = share_out(config, module, frozen_copy)
    state = TrainingState.start(config, module, accelerator, objective, supply.pictures)
    wrapped, optimizer = prepared(accelerator, backbone, module, state.optimizer, is_split=outline is not None)
    validates = config.validation_steps and accelerator.is_main_process
    validation = Validation.start(config, folder, backbone.pipeline, data.held_out, scorer) if validates else None
    first_step = restore(resume, folder, state, config, accelerator, data.fingerprint)
    policy, alone = backbone.predictor(wrapped), backbone.predictor(module)  # held-out pairs are one process's work
    if config.compile:
        policy, alone = one_graph(policy, partial(accelerator.no_sync, wrapped)), one_graph(alone)
    run = Run(
        config=config,
        objective=objective,
        accelerator=accelerator,
        folder=folder,
        backbone=backbone,
        wrapped=wrapped,
        trainable=state.trainable,
        policy=policy,
        reference=new_reference(backbone, module, frozen_copy, policy, state) if objective.needs_reference else None,
        null=supply.encoder.null_prompt,
        optimizer=optimizer,
        scheduler=state.scheduler,
        state=state,
        validation=validation,
        data=data.fingerprint,
        port=data.port,
        outline=outline,
        first_step=first_step,
        repository=repository,
    )
    begin(run, preflight, supply.begin, data, notes)
    if validation and data.held_out is not None and has_comparison(config, objective):
        compared = alone, new_reference(backbone, module, frozen_copy, alone, state)
        validation.accuracy = held_out_accuracy(config, data.held_out, objective.groups, backbone, compared, supply.encoder, data.port)
    return run


def prepared(
    accelerator: Accelerator, backbone: Backbone, module: nn.Module, optimizer: torch.optim.Optimizer, is_split: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Module and optimizer as accelerate wraps them; a module whose weights are split exchanges gradients by itself."""
    if is_split:
        return module, accelerator.prepare(optimizer)
    wrapped, prepared_optimizer = accelerator.prepare(module, optimizer)
    if module is not backbone.denoiser:
        accelerator.prepare_model(backbone.denoiser, evaluation_mode=True)  # pictures are then drawn in the precision of training
    return wrapped, prepared_optimizer


def launched(config: TrainConfig, notes: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The settings with what the launcher asks for, and the lines that the user should see. Raises ValueError as check_optimizer does."""
    asked = asked_by_launcher()
    told = [f"shard {asked}, as the launcher asks; torch's fully_shard splits"] if asked else []
    return dataclasses.replace(config, shard=asked or config.shard), [*notes, *told, *check_optimizer(config)]


def begin(run: Run, preflight: Preflight, source: Begin, data: RunPairs | RunPrompts, notes: Sequence[str]) -> None:
    """Probe; then what takes long or leaves a trace: the source, which may keep all latents, the folder, trackers and the log."""
    config, accelerator = run.config, run.accelerator
    if preflight.probes:
        plain = dataclasses.replace(config, cache_latents=False, dataloader_num_workers=0)
        probe(run, source(run, plain, run.first_step), preflight)
    check_ranks_agree(accelerator, {"data": run.data, **to_flat(dataclasses.replace(config, output_dir=None), *run.objective.parts)})
    run.source_from = partial(source, run)
    if config.reference_errors is not None:
        errors = open_or_compute(run, partial(source, run, config, 0))
        run.source_from = lambda config, first_step: with_errors(source(run, config, first_step), errors, config.seed)
        run.reference = None
    run.open_source(run.first_step)
    open_folder(run.folder, config, run.objective, data.facts(), accelerator, run.backbone, notes, preflight.found)
    if accelerator.is_main_process:
        data.write_rejected(run.folder)
    start_trackers(accelerator, config.tracker_project_name, to_flat(config, *run.objective.parts), run.first_step)
    run.log = RunLog(accelerator, run.folder, config.max_train_steps, pairs_per_update(config, accelerator), run.first_step)
    report = partial(run.log.event, kind="not saved")
    run.writer = CheckpointWriter(
        run.folder, config.checkpoints_total_limit, lambda step, text: report(step, text=text), config.save_in_background
    )
    run.preflight = preflight


def claim_places(config: TrainConfig, objective: Objective, accelerator: Accelerator) -> tuple[Path, Path | None, str | None]:
    """(run folder, checkpoint to resume from or None, repository on the hub or None), after the checks that need nothing loaded.

    Raises ValueError as `claim` and `claim_repository` do; nothing is written on this machine.
    """
    folder, resume = claim(config, objective, accelerator)
    check_reference(config, objective)
    check_sharding(config, objective)
    check_reference_errors(config, objective)
    return folder, resume, claim_repository(config, folder) if accelerator.is_main_process else None


def new_reference(backbone: Backbone, module: nn.Module, frozen_copy: nn.Module | None, policy: Predict, state: TrainingState) -> Predict:
    """What the policy is compared with: weights that follow it, the frozen copy, or the policy without its adapters and its user."""
    if state.reference is not None:
        return without_user(stored(policy, state.trainable, state.reference))
    if any(block._compiled_call_impl is not None for block in module.modules()):
        return compiled_reference(backbone, frozen_copy, policy, state)
    return without_user(adapter_off(module, policy)) if frozen_copy is None else frozen(backbone.predictor, frozen_copy)


def compiled_reference(backbone: Backbone, frozen_copy: nn.Module | None, policy: Predict, state: TrainingState) -> Predict:
    """A reference that a compiler cannot tell from the policy, so that both are one graph: what follows B = 0 in place of adapters off.

    The frozen copy is recorded as the policy is, and nothing ever asks for its gradients.
    """
    if frozen_copy is not None:
        return torch.no_grad()(one_graph(backbone.predictor(frozen_copy.eval().requires_grad_(True))))
    last = {name: p for name, p in state.trainable.items() if "lora_B" in name}
    return stored(policy, last, {name: torch.zeros_like(p, requires_grad=False) for name, p in last.items()})


def check_reference(config: TrainConfig, objective: Objective) -> None:
    """Raises ValueError when the value to stop by is not measured for this method, or a reference is to move that is not there."""
    if config.reference_update_steps is not None and not objective.needs_reference:
        raise ValueError(
            f"reference_update_steps is {config.reference_update_steps}, but method {config.method} has no reference; leave it out"
        )
    by_accuracy = config.early_stopping_patience is not None and config.early_stopping_metric == "implicit_accuracy"
    if by_accuracy and not has_comparison(config, objective):
        raise ValueError(
            f"early_stopping_metric is implicit_accuracy, but method {config.method} has no reference to measure it with when tune is "
            "full; use early_stopping_metric scorer with a validation_scorer"
        )


def has_comparison(config: TrainConfig, objective: Objective) -> bool:
    """Whether held-out accuracy can be measured: against the method's reference, or else the model without its adapters."""
    return objective.needs_reference or config.tune == "lora"


def restore(resume: Path | None, folder: Path, state: TrainingState, config: TrainConfig, accelerator: Accelerator, data: str) -> int:
    """Load a checkpoint into the existing parameters; returns the number of finished steps, 0 without a checkpoint.

    Raises ValueError when the pairs or the number of pairs per update are not those of the checkpoint.
    """
    if resume is None:
        return 0
    tensors, numbers = checkpoint.load_checkpoint(resume)
    now = pairs_per_update(config, accelerator)
    if numbers["pairs_per_update"] != now:
        raise ValueError(
            f"train_batch_size x gradient_accumulation_steps x processes is {now}, but the checkpoint was trained with "
            f"{numbers['pairs_per_update']} pairs per update; choose them so that the product stays"
        )
    if numbers["data"] != data:
        raise ValueError(f"{config.named_data} holds other pairs than the checkpoint was trained on; bring back the data, or start anew")
    state.restore(tensors, numbers)
    if accelerator.is_main_process:
        checkpoint.drop_best_after(folder, int(numbers["step"]))
        for name in checkpoint.set_aside_after(folder, int(numbers["step"])):
            print(f"{name} is of a later step than {resume.name} and was renamed to later-{name}", file=sys.stderr)
    return int(numbers["step"])
