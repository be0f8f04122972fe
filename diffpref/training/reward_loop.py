"""The loop of a reward model, and the scorer that it leaves.

    one update: the pairs of all ranks and micro-batches, each weighted by 1 / pairs of its prompt (core/preference.py)

The held-out pairs are scored every validation_steps; the weights that agree best with their labels are exported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffpref.core.preference import agreement, label_divergence, loss_share
from diffpref.evaluation.stats import wilson_interval
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_pairs import RewardBatch, RewardPairs
from diffpref.training.reward_run import Best, RewardRun, prepare, save
from diffpref.training.run_folder import write_json
from diffpref.training.step_aware_config import StepAwareConfig
from diffpref.training.stopping import MAX_SKIPPED, NotFinite, Stopped, StopSignals

RESULT_FILE = "reward_model.json"
"""Beside the weights: which step they are of and how they did on the held-out pairs. It marks them as no released scorer."""


@dataclass(frozen=True)
class Fitted:
    """A finished run."""

    folder: Path
    is_main_process: bool
    step: int
    """Optimizer step of the exported weights."""
    accuracy: float | None
    """Of the exported weights on the held-out pairs; None without such pairs."""


def fit(config: RewardModelConfig, step_aware: StepAwareConfig | None = None) -> Fitted:
    """Fit a reward model and write it into config.output_dir, outputs/reward-model-<time> if that is None.

    step_aware: what the step-aware preference model of SPO needs beside `config`; an ordinary reward model without it.

    Raises ValueError for settings and data that cannot work, Stopped after a signal, NotFinite after three non-finite updates in
    a row; in the last two cases the newest checkpoint is complete.
    """
    folder = config.output_dir or f"outputs/reward-model-{time.strftime('%Y%m%d-%H%M%S')}"
    run = prepare(replace(config, output_dir=folder), step_aware)
    try:
        train(run)
    finally:
        run.log.close()
    step = run.best.step if run.best else config.max_train_steps
    if run.accelerator.is_main_process:
        export(run, step)
    run.accelerator.wait_for_everyone()
    run.log.finish(run.config.max_train_steps)
    return Fitted(run.folder, run.accelerator.is_main_process, step, run.best.accuracy if run.best else None)


def train(run: RewardRun) -> None:
    """Run until max_train_steps, validating and saving checkpoints on the way.

    Raises Stopped after a signal (everything is saved), NotFinite after three non-finite updates in a row.
    """
    skipped = 0
    with StopSignals() as signals, closing(run.log.bar), closing(run.batches()) as batches:
        for step in range(run.first_step, run.config.max_train_steps):
            rate = run.rate(step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            seen = accumulate(run, batches, step)
            values = run.log.means() | {"lr": rate}
            norm = run.accelerator.clip_grad_norm_(run.trainable.values(), run.config.max_grad_norm)
            values["grad_norm"] = float(norm)
            if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
                run.optimizer.step()
                skipped = 0
            else:
                skipped += 1
                run.say(f"step {step + 1}: loss {values['loss']}, gradient norm {norm}: update skipped, pairs {', '.join(seen)}")
            run.optimizer.zero_grad()
            if skipped == MAX_SKIPPED:
                raise NotFinite(
                    f"{MAX_SKIPPED} updates in a row were not finite, the last at step {step + 1}; the newest checkpoint is from before. "
                    f"Lower learning_rate ({run.config.learning_rate})"
                )
            run.log.write(step + 1, values)
            finish_step(run, step + 1, signals.code)


def accumulate(run: RewardRun, batches: Iterator[RewardBatch], step: int) -> list[str]:
    """Forward and backward over this rank's part of one update; returns the ids of its pairs."""
    accumulation, world = run.config.gradient_accumulation_steps, run.accelerator.num_processes
    total, seen = run.total_weight(step), []
    for micro_step in range(accumulation):
        batch = next(batches)
        p0, weight = batch.p0.to(run.accelerator.device), batch.weight.to(run.accelerator.device)
        with nullcontext() if micro_step == accumulation - 1 else run.accelerator.no_sync(run.wrapped):
            scores = run.scores(run.wrapped, batch)
            share = loss_share(label_divergence(scores, p0), weight, total)
            run.accelerator.backward(share * world)  # gradients are averaged over ranks, but the shares add up
        found = scores.detach()
        metrics = {
            "accuracy": agreement(found, p0).mean(),
            "margin": ((found[:, 0] - found[:, 1]) * torch.sign(p0 - 0.5)).mean(),
            "scale": run.model.towers.scale.detach(),
        }
        run.log.collect(share * (accumulation * world), metrics)  # the log takes the mean over micro-batches and ranks
        seen += batch.pair_ids
    return seen


def finish_step(run: RewardRun, step: int, code: int) -> None:
    """Validate, save, and stop if a signal asked for it."""
    config, accelerator = run.config, run.accelerator
    if accelerator.num_processes > 1:
        code = int(accelerator.gather(torch.tensor([code], device=accelerator.device)).max())
    is_final = step == config.max_train_steps
    if run.held_out is not None and (step % config.validation_steps == 0 or is_final):
        if accelerator.is_main_process:
            validate(run, run.held_out, step)
        accelerator.wait_for_everyone()
    saved = save(run, step) if step % config.checkpointing_steps == 0 or is_final or code else True
    if code and not is_final:
        what = f"stopped by a signal after step {step}" + ("" if saved else ", which could not be saved")
        raise Stopped(code, f"{what}; continue with --resume_from_checkpoint latest --output_dir {run.folder}")


@torch.no_grad()
def validate(run: RewardRun, held_out: RewardPairs, step: int) -> None:
    """Score the held-out pairs at every level of the view; keep the weights if their mean accuracy is the best so far.

    Writes eval/accuracy (of pairs that are no ties) and eval/loss, means over the levels, and of a step-aware model
    eval/accuracy_t<level>.
    """
    size = 2 * run.config.train_batch_size  # nothing is kept for a backward pass
    chunks = [[(k, 0) for k in range(i, min(i + size, len(held_out.pairs)))] for i in range(0, len(held_out.pairs), size)]
    run.model.eval()
    with closing(held_out.batches(chunks, run.config.dataloader_num_workers)) as batches:
        parts = [torch.stack([run.scores(run.model, batch, level).cpu() for level in run.view.levels]) for batch in batches]
    run.model.train()
    scores, p0 = torch.cat(parts, 1), torch.from_numpy(held_out.pairs.p0).float()
    decided, weight = p0 != 0.5, torch.tensor(held_out.weights)
    each = [float(agreement(at_level[decided], p0[decided]).mean()) for at_level in scores]
    loss = [float(loss_share(label_divergence(at_level, p0), weight, sum(held_out.weights))) for at_level in scores]
    accuracy = sum(each) / len(each)
    found = {"eval/accuracy": accuracy, "eval/loss": sum(loss) / len(loss), "eval/pairs": int(decided.sum())}
    by_level = {f"t{level}": value for level, value in zip(run.view.levels, each, strict=True) if level is not None}
    run.log.record(step, found | {f"eval/accuracy_{level}": value for level, value in by_level.items()})
    listed = ", ".join(f"{level} {value:.3f}" for level, value in by_level.items())
    run.say(f"step {step}: held-out accuracy {accuracy:.3f} on {int(decided.sum())} pairs" + (f" ({listed})" if listed else ""))
    if run.best is None or accuracy > run.best.accuracy:
        run.best = Best(step, accuracy, {name: x.detach().to("cpu", copy=True) for name, x in run.trainable.items()}, by_level)


@torch.no_grad()
def export(run: RewardRun, step: int) -> None:
    """Write the best model, or the last one without held-out pairs, as a scorer, and say what it can do."""
    result: dict[str, object] = {"step": step}
    if run.best and run.held_out is not None:
        for name, x in run.best.weights.items():
            run.trainable[name].copy_(x)
        pairs = int((run.held_out.pairs.p0 != 0.5).sum())
        low, high = wilson_interval(run.best.accuracy * pairs, pairs)
        result |= {"accuracy_by_timestep": run.best.by_level} if run.best.by_level else {}
        result |= {"held_out_accuracy": run.best.accuracy, "interval_95": [low, high], "held_out_pairs": pairs}
    run.model.save(run.folder, run.config.export_dtype)
    write_json(run.folder / RESULT_FILE, result)
