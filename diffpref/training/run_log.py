"""metrics.jsonl, events.jsonl, trackers and the progress bar. Values are averaged over the accumulation window and over all ranks."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from diffpref.training.run_folder import write_whole
from diffpref.training.trackers import tell_trackers

_DIFFUSERS_NAMES = {
    "raw_model_loss": ("error/policy_chosen", "error/policy_rejected"),
    "ref_loss": ("error/reference_chosen", "error/reference_rejected"),
    "implicit_acc": ("rewards/accuracies",),
}
"""Top-level aliases that users of the diffusers scripts look for: means of our keys."""


METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"


class RunLog:
    """Collects the metrics of one optimizer step and writes them at its end."""

    def __init__(self, accelerator: Accelerator, folder: Path, num_steps: int, pairs_per_update: int, first_step: int) -> None:
        self.accelerator = accelerator
        self.pairs_per_update = pairs_per_update
        self.first_step = first_step
        self.window: list[dict[str, Tensor]] = []
        self.started = self.last = time.perf_counter()
        self.folder = folder
        self.file = self._open(first_step)
        self.unwritten = b""  # lines that wait for space on the disk
        self.bar = tqdm(
            total=num_steps, initial=first_step, desc="training", unit="step", disable=not accelerator.is_main_process, mininterval=1.0
        )

    def _open(self, first_step: int) -> io.FileIO | None:
        if not self.accelerator.is_main_process:
            return None
        keep_until(self.folder / METRICS_FILE, first_step)
        return (self.folder / METRICS_FILE).open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Go on after `step`: later lines are dropped, and the bar goes back."""
        self._close_file()
        self.file, self.unwritten, self.window = self._open(step), b"", []
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Print once, above the progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text, file=sys.stderr)

    def event(self, step: int, kind: str, text: str, **facts: Any) -> None:
        """Say what happened at `step`, and add it to events.jsonl, which keeps also what was trained again later."""
        self.say(text)
        if self.accelerator.is_main_process:
            line = json.dumps({"step": step, "event": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts, "text": text})
            try:
                with (self.folder / EVENTS_FILE).open("a") as file:
                    file.write(line + "\n")
            except OSError:  # the disk is full or gone: it was said, and training goes on
                pass

    def collect(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Remember the scalars of one forward pass."""
        self.window.append({"loss": loss.detach(), **metrics})

    def means(self) -> dict[str, float]:
        """Mean over the window and all ranks; empties the window. One message between ranks, one wait for the device."""
        names = list(self.window[0])
        stacked = torch.stack([torch.stack([m[name].float() for name in names]) for m in self.window]).mean(0)
        self.window = []
        values = self.accelerator.reduce(stacked, "mean").tolist()
        found = dict(zip(names, values, strict=True))
        for alias, keys in _DIFFUSERS_NAMES.items():
            if all(k in found for k in keys):
                found[alias] = sum(found[k] for k in keys) / len(keys)
        return found

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and the trackers' step, and the bar moves on."""
        now = time.perf_counter()
        speed = self.pairs_per_update / (now - self.last)
        self.last = now
        self.record(step, {**values, "time/pairs_per_second": speed})
        self.bar.set_postfix_str(self._summary(step, values), refresh=False)
        self.bar.update(1)

    def _summary(self, step: int, values: Mapping[str, float]) -> str:
        done = step - self.first_step
        parts = [f"{done * self.pairs_per_update / (time.perf_counter() - self.started):.0f} pairs/s", f"loss {values['loss']:.3f}"]
        shown = {"acc": "rewards/accuracies", "win err": "error/policy_chosen", "lose err": "error/policy_rejected"}
        return ", ".join(parts + [f"{label} {values[key]:.3f}" for label, key in shown.items() if key in values])

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write values of a step without moving the bar, e.g. a validation."""
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            waiting, self.unwritten = bool(self.unwritten), self.unwritten + (json.dumps({"step": step, **finite}) + "\n").encode()
            self._write(silent=waiting)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        self.track(step, lambda tracker: tracker.log(numbers, step=step))

    def track(self, step: int, tell: Callable[[Any], None]) -> None:
        """Do something with every tracker; the loss of one is an event."""
        tell_trackers(self.accelerator, tell, lambda text: self.event(step, "tracker lost", text))

    def _write(self, silent: bool) -> None:
        """What cannot be written now stays in memory and follows as soon as there is space."""
        assert self.file is not None
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not silent:
                self.say(f"{METRICS_FILE} cannot be written ({error.strerror}); its lines wait in memory, training goes on")

    def _close_file(self) -> None:
        if self.file:
            self._write(silent=False)
            self.file.close()
            self.file = None

    def finish(self, step: int) -> None:
        """End the trackers' runs. Not by accelerate's end_training, which also ends the process group: see launcher.leave_processes."""
        self.track(step, lambda tracker: tracker.finish())
        self.accelerator.trackers = []

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self._close_file()


def keep_until(path: Path, step: int) -> None:
    """Drop lines after `step` from a metrics file, so that a resumed run does not report a step twice."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    if kept != lines:
        write_whole(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill
