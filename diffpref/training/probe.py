"""One micro-batch as the loop will run it, before the run begins: does it fit, do the kernels work, how long does it take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from diffpref.core.types import PreferenceBatch
from diffpref.training import machine
from diffpref.training.loop import learn
from diffpref.training.memory import words
from diffpref.training.preflight import Preflight, brief

if TYPE_CHECKING:
    from diffpref.training.run import Run

T = TypeVar("T")


def probe(run: Run, batches: Iterator[PreferenceBatch], preflight: Preflight) -> None:
    """Run a micro-batch forward and backward with the run's own modules, autocast, checkpointing and kernels, and forget it.

    batches: a source of its own that begins where the run begins; nothing of the run is used up. Weights and generators stay as they
    are. Every rank has to call this. Raises ValueError (or warns) when the micro-batch does not fit, when the attention kernel fails,
    and when loss or gradients are not finite.
    """
    config, device = run.config, run.accelerator.device
    problems = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            problems += _measure(run, batches, preflight)
    except torch.OutOfMemoryError as error:
        advice = preflight.advice(0.9 * preflight.found["memory"]["bytes"])
        problems.append(f"train_batch_size {config.train_batch_size} does not fit onto {device} ({brief(error)}); {advice}")
    except RuntimeError as error:
        if config.attention == "sdpa":
            raise
        problems.append(f"attention {config.attention} failed on a micro-batch of this model ({brief(error)}); use --attention sdpa")
    finally:
        _drop_gradients(run)
    preflight.settle(problems)


def _measure(run: Run, batches: Iterator[PreferenceBatch], preflight: Preflight) -> list[str]:
    """Two micro-batches, the first to warm up; time and memory of the second go to the manifest. Returns what is wrong."""
    config, device = run.config, run.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    problems = _not_finite(run, _backward(run, next(batches)))
    if config.gradient_accumulation_steps == 1:
        _drop_gradients(run)  # else they are there when the second micro-batch of an update comes
    reading, batch = _timed(run, lambda: next(batches))
    step, _ = _timed(run, lambda: _backward(run, batch))
    micro_batches = (config.max_train_steps - run.first_step) * config.gradient_accumulation_steps
    hours = micro_batches * (step + (0.0 if config.cache_latents else reading)) / 3600
    preflight.found["probe"] = {"seconds": step, "seconds_reading": reading, "hours": hours}
    ahead = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    text = f"probe: {step:.2f} s per micro-batch and {reading:.2f} s to read and encode it; about {ahead} for what is ahead"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        needed = peak + (0 if run.state.optimizer.state else preflight.optimizer_bytes())  # a resumed optimizer has its state already
        free = machine.device_memory(device)
        preflight.found["probe"]["bytes"] = needed
        text += f"; {words(needed)} of {words(free)}"
        if needed > free:
            advice = preflight.advice(free * preflight.found["memory"]["bytes"] / needed)
            problems.append(f"a micro-batch takes {words(peak)}, with the optimizer {words(needed)}, of {words(free)}; {advice}")
    preflight.say(text)
    return problems


def _backward(run: Run, batch: PreferenceBatch) -> float:
    """The loss; gradients are added to those that are there, without the message between ranks."""
    with run.accelerator.no_sync(run.wrapped):
        return float(learn(run, batch).per_group.mean())


def _not_finite(run: Run, loss: float) -> list[str]:
    """A remedy, if loss or gradients are not finite; gradients scaled for fp16 may overflow, the loop adapts their scale."""
    gradients = [p.grad for p in run.trainable.values() if p.grad is not None]
    if math.isfinite(loss) and (run.accelerator.scaler is not None or all(bool(g.isfinite().all()) for g in gradients)):
        return []
    half = run.accelerator.mixed_precision == "fp16"
    advice = "use --mixed_precision bf16" if half else "the model's weights are not sound: try them with diffpref generate"
    return [f"before the first update the loss is {loss} or its gradients are not finite; {advice}"]


def _timed(run: Run, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds until the device is done, and the result."""
    device = run.accelerator.device
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _drop_gradients(run: Run) -> None:
    if run.state.reliability:
        run.state.reliability.seen.clear()
    for p in run.trainable.values():
        p.grad = None
