"""The training loop of every method over stored pairs: one page, read from top to bottom.

Micro-batches are numbered globally and gradients are averaged, so that two ranks and one rank with twice the accumulation
take the same steps. The schedule counts optimizer steps.
"""

from __future__ import annotations

import math
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffpref.core.policy import evaluate, two_pass_backward
from diffpref.core.types import LossOutput, PreferenceBatch
from diffpref.training.alarms import Alarms
from diffpref.training.sharding import whole
from diffpref.training.stopping import MAX_OVERFLOWS, MAX_RETURNS, MAX_SKIPPED, NotFinite, Stopped, StopSignals

if TYPE_CHECKING:  # run.py imports the probe, which learns as this file does
    from diffpref.training.run import Run

UNTOUCHED_LIMIT = {"no": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Largest relative difference of the errors of an untouched policy and its reference, by mixed_precision; 0 on a CPU."""


def train(run: Run) -> None:
    """Run until max_train_steps, saving checkpoints and validating on the way.

    Raises Stopped after a signal (everything is saved), NotFinite when updates stay not finite, NotSaved when the folder is gone.
    """
    config, accelerator = run.config, run.accelerator
    skipped, alarms, steps = 0, Alarms(), run.steps()
    step = steps.start
    with StopSignals() as signals, closing(run.log.bar):  # what is said about the end then stands below the bar
        while step < steps.stop:
            computing = 0.0
            seen: list[str] = []
            for micro_step in range(config.gradient_accumulation_steps):
                batch = next_batch(run, step, micro_step)
                start = time.perf_counter()
                is_last = micro_step == config.gradient_accumulation_steps - 1
                with nullcontext() if is_last else accelerator.no_sync(run.wrapped):
                    out = learn(run, batch)
                computing += time.perf_counter() - start
                run.log.collect(out.per_group.mean(), out.metrics)
                seen += batch.pair_ids
                if step == run.first_step and micro_step == 0:
                    check_untouched(run, out)
            values = run.log.means() | {"lr": float(run.scheduler.get_last_lr()[0])}
            start = time.perf_counter()
            values["grad_norm"] = update(run, values["loss"])
            run.state.follow(config, step + 1, accelerator.device)
            values["time/compute"] = computing + time.perf_counter() - start
            skipped, earlier = after_update(run, step, values, seen, skipped)
            if earlier is not None:
                step = earlier
                continue
            for kind, text in alarms.look(values):
                run.log.event(step + 1, kind, f"step {step + 1}: {text}", pairs=seen)
            run.scheduler.step()
            run.log.write(step + 1, values)
            if finish_step(run, step + 1, signals.code):
                break
            step += 1


def next_batch(run: Run, step: int, micro_step: int) -> PreferenceBatch:
    """The next micro-batch. Workers that were killed or hang are replaced once, at the same place.

    Raises ValueError when their replacements fail too.
    """
    try:
        return next(run.source)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        run.log.event(step + 1, "workers lost", f"step {step + 1}: {error}; started anew")
    try:
        run.open_source(step)
        for _ in range(micro_step):
            next(run.source)
        return next(run.source)
    except RuntimeError as error:
        raise ValueError(
            f"dataloader_num_workers is {run.config.dataloader_num_workers}, and workers were lost twice at step {step + 1} ({error}); "
            "use fewer, or 0, and look at the machine's memory"
        ) from error


def learn(run: Run, batch: PreferenceBatch) -> LossOutput:
    """Path, predictions, loss and backward pass of one micro-batch; the loss comes back without its graph."""
    accelerator, objective = run.accelerator, run.objective
    batch = batch.first(objective.images_per_group)
    if run.state.reliability:
        batch = run.state.reliability.attach(batch)
    loss = partial(objective.loss, batch)
    with accelerator.autocast():
        steps = objective.path(batch, run.process, batch.random(run.config.seed), run.policy, run.reference, run.null)

    def backward(value: Tensor) -> None:
        accelerator.backward(value / run.config.gradient_accumulation_steps)

    if len(steps) > 1:  # the activations of all steps of a trajectory would not fit
        with accelerator.autocast():
            ask = (steps, batch.cond, run.policy, run.reference, loss)
            no_sync = partial(accelerator.no_sync, run.wrapped)
            out = two_pass_backward(*ask, null=run.null, backward=backward, no_sync=no_sync, at_once=objective.steps_at_once)
    else:
        with accelerator.autocast():
            evals = evaluate(steps, batch.cond, run.policy, run.reference, run.null, batch.reference_error)
        out = loss(evals)
        backward(out.per_group.mean())
    if run.state.reliability:
        run.state.reliability.note(batch, out)
    return replace(out, per_group=out.per_group.detach())


def update(run: Run, loss: float) -> float:
    """Clip and step; returns the gradient norm before clipping. A non-finite loss or gradient never reaches the weights."""
    norm = run.accelerator.clip_grad_norm_(run.trainable.values(), run.config.max_grad_norm)
    norm = float(whole(norm)) if isinstance(norm, Tensor) else 0.0
    scaler, taken = run.accelerator.scaler, math.isfinite(loss) and math.isfinite(norm)
    if taken or (scaler is not None and not math.isfinite(norm)):  # fp16: the scaler skips this step and lowers its scale
        run.optimizer.step()
    elif scaler is not None:
        scaler.update()
    if taken and run.state.ema:
        run.state.ema.update(run.trainable)
    run.optimizer.zero_grad()
    return norm


def after_update(run: Run, step: int, values: dict[str, float], pair_ids: list[str], skipped: int) -> tuple[int, int | None]:
    """(non-finite updates in a row, step to go back to or None), after reporting an update that was not finite.

    Raises NotFinite at the third in a row, at the first under non_finite stop, and after the third return to a checkpoint.
    """
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return 0, None
    searching = run.accelerator.scaler is not None and math.isfinite(values["loss"])  # the loss scale halves until it fits
    what = f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: update skipped"
    pair_ids = gather_object(pair_ids) if run.accelerator.num_processes > 1 else pair_ids
    run.log.event(step + 1, "not finite", f"{what}, pairs {', '.join(pair_ids)}", pairs=pair_ids)
    limit = MAX_OVERFLOWS if searching else 1 if run.config.non_finite == "stop" else MAX_SKIPPED
    advice = f"Lower learning_rate ({run.config.learning_rate}) or beta, or use mixed_precision bf16 instead of fp16"
    if not searching and run.config.non_finite == "roll_back":
        returns = run.state.data_key
        if returns >= MAX_RETURNS:
            raise NotFinite(f"an update was not finite again at step {step + 1}, after {returns} returns to a checkpoint. {advice}")
        if (earlier := run.roll_back()) is not None:
            run.log.event(step + 1, "rolled back", f"back to checkpoint-{earlier}, with other batches from there on")
            return 0, earlier
    if skipped + 1 >= limit:
        in_a_row = f"{limit} updates in a row were not finite, the last at step {step + 1}" if limit > 1 else what
        raise NotFinite(f"{in_a_row}; the newest checkpoint is from before. {advice}")
    return skipped + 1, None


def check_untouched(run: Run, out: LossOutput) -> None:
    """At step 0 the policy is the reference: equal errors, margin 0, and a loss of log 2 for a pair."""
    warm = run.config.start_lora_as == "adapter"
    errors = [name for name in out.metrics if name.startswith("error/reference")]
    if run.first_step or warm or not errors:
        why = "resumed run" if run.first_step else "started from an adapter" if warm else "no reference"
        run.say("check that the untouched policy equals the reference: skipped, " + why)
        return
    for name in errors:
        policy, reference = (float(out.metrics[name.replace("reference", who)]) for who in ("policy", "reference"))
        if not abs(policy - reference) <= UNTOUCHED_LIMIT[run.accelerator.mixed_precision] * reference:
            raise ValueError(
                f"before the first step the policy's error is {policy:.6g} and the reference's {reference:.6g}: "
                "policy and reference compute differently. Use the same precision for both, "
                "and no adapter initialisation that changes the base weights"
            )


@torch.no_grad()
def finish_step(run: Run, step: int, code: int) -> bool:
    """Validate, save, and stop if a signal asked for it; whether the run ends early because validations no longer improve."""
    config = run.config
    code = run.agree(code)
    is_last, is_over = step == config.max_train_steps, False
    if config.validation_steps and (step % config.validation_steps == 0 or is_last):
        is_over = run.validate(step)
    is_final = is_last or is_over
    saved = True
    if step % config.checkpointing_steps == 0 or is_final or code:
        saved = run.save(step, is_last=is_final or bool(code))
    if code and not is_final:
        what = f"stopped by a signal after step {step}" + ("" if saved else ", which could not be saved")
        raise Stopped(code, f"{what}; continue with --resume_from_checkpoint latest --output_dir {run.folder}")
    run.unsaved = is_final and bool(run.agree(int(not saved)))
    if is_over and not is_last:
        run.say(f"stopped after step {step}: {config.early_stopping_patience} validations in a row were not better than the best")
    return is_over
