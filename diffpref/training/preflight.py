"""Checks before the first step, so that a run is refused at its start, with the remedy, and does not fail an hour later.

First, can the output folder be written. After loading, do weights, gradients, optimizer, activations
and caches fit into memory, checkpoints and export onto the disk. On a GPU also one micro-batch as the loop will run it (probe.py).
Nothing here changes weights, generators or the result, and a run that is refused has written nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from diffpref.models.backbone import Backbone
from diffpref.training import machine
from diffpref.training.config import TrainConfig
from diffpref.training.memory import (
    as_flags,
    checkpoint_bytes,
    export_bytes,
    larger_micro_batch,
    num_checkpoints,
    optimizer_bytes,
    remedies,
    words,
)
from diffpref.training.objective import Objective
from diffpref.training.run_costs import Pictures, RunCosts


class Preflight:
    """The checks of one run. `found` holds their numbers, for the manifest; empty when preflight is off."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.found: dict[str, Any] = {}
        self.on = config.preflight != "off"
        self.on_gpu = accelerator.device.type == "cuda"
        self.probes = self.on and self.on_gpu  # on a CPU the first update shows what a probe would, and no sooner
        self.costs: RunCosts | None = None

    def settle(self, problems: list[str]) -> None:
        """Refuse or warn for the problems of all ranks; every rank has to call this."""
        if self.accelerator.num_processes > 1:
            problems = list(dict.fromkeys(gather_object(problems)))
        if problems and self.config.preflight == "refuse":
            raise ValueError("; ".join(problems) + ". To start all the same, add --preflight warn")
        for problem in problems:
            self.say(f"warning: {problem}")

    def say(self, text: str) -> None:
        """Once, on stderr."""
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr)

    def check_start(self, folder: Path) -> None:
        """Before anything is loaded: write permission."""
        if not self.on:
            return
        reason = machine.write_problem(folder) if self.accelerator.is_main_process else None
        self.settle([f"output_dir {str(folder)!r} cannot be written ({reason}); choose another output_dir"] if reason else [])

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the loading of the model: when the weights alone do not fit onto the card, say what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            smaller = "tune lora" if self.config.tune == "full" else "base_dtype bf16 with mixed_precision bf16, or a larger card"
            raise ValueError(f"the weights do not fit onto {self.accelerator.device} ({brief(error)}); use {smaller}") from error

    def check_model(
        self, objective: Objective, backbone: Backbone, module: nn.Module, pixels: Pictures, folder: Path, resume: Path | None
    ) -> None:
        """After loading and before anything is drawn or trained: memory and disk."""
        objective.check_images(self.config.train_batch_size * self.accelerator.num_processes * len(pixels.slots))
        if not self.on:
            return
        budget = machine.device_memory(self.accelerator.device)
        costs = RunCosts(self.config, objective, backbone, module, pixels, self.accelerator, budget)
        self.costs = costs
        problems = self._memory(costs)
        if self.accelerator.is_main_process:
            finished = json.loads((resume / "trainer_state.json").read_text())["step"] if resume else 0
            problems += self._disk(costs, folder, finished)
        self.settle(problems)

    def _memory(self, costs: RunCosts) -> list[str]:
        parts, free = costs.parts(), costs.budget
        needed = sum(parts.values())
        self.found["memory"] = {"bytes": needed, "is_upper_bound": costs.is_bound, "available": free, **parts}
        if costs.is_bound:
            self.say(f"memory: less than {words(needed)} of {words(free)}")
            return []
        tflop = self.found["tflop_per_pair_and_step"] = costs.flops_per_pair / 1e12
        listed = ", ".join(f"{name} {words(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
        kernels = self.found["kernels_per_micro_batch"] = costs.kernels
        self.say(
            f"memory: about {words(needed)} of {words(free)} ({listed}); {tflop:.3g} TFLOP per pair and step, "
            f"{kernels:,} kernels per micro-batch"
        )
        larger = larger_micro_batch(self.config, parts, lambda config: sum(costs.parts(config).values()), free)
        if larger:
            change, size = larger
            self.found["larger_micro_batch"] = {**change, "bytes": size}
            self.say(f"fits too, with the same pairs per update in fewer passes: {as_flags(change)} ({words(size)})")
        problems = []
        if needed > free:
            problems.append(f"training takes about {words(needed)} of memory ({listed}) and there are {words(free)}; {self.advice(free)}")
        if self.on_gpu and costs.host_bytes > (ram := machine.ram()):
            problems.append(
                f"cached latents and a checkpoint take {words(costs.host_bytes)} of RAM and there are {words(ram)}; use tune lora"
            )
        return problems

    def advice(self, budget: float) -> str:
        """What to change so that the run takes at most `budget` bytes."""
        costs = self.costs
        assert costs is not None
        found = remedies(
            self.config,
            self.accelerator.mixed_precision,
            costs.counts,
            lambda config, counts: sum(costs.parts(config, counts).values()),
            budget,
            self.on_gpu,
        )
        if not found:
            path: Any = costs.objective.path
            fewer = f", steps_at_once ({path.steps_at_once}) or num_steps ({path.num_steps})" if costs.objective.kept_latents else ""
            return f"no batch size, checkpointing or optimizer makes it fit: lower resolution{fewer}, or use a device with more memory"
        return "use " + ", or ".join(f"{as_flags(changes)} ({words(size)})" for changes, size in found)

    def _disk(self, costs: RunCosts, folder: Path, first_step: int) -> list[str]:
        config, counts = self.config, costs.counts
        each, number = checkpoint_bytes(config, counts), num_checkpoints(config, first_step)
        export = export_bytes(config, counts)
        needed, free = number * each + export, machine.free_disk(folder)
        self.found["disk"] = {"bytes": needed, "free": free, "checkpoint": each, "checkpoints": number, "export": export}
        what = f"{number} checkpoint{'s' * (number > 1)} of {words(each)} and {words(export)} at the end"
        self.say(f"disk: {what}, {words(free)} free")
        if needed <= free:
            return []
        keep = int((free - export) // each) - 1  # one more is there while the newest is written
        advice = f"add --checkpoints_total_limit {keep}, or" if 0 < keep < number - 1 else ""
        return [f"output_dir {str(folder)!r}: {what} do not fit into {words(free)}; {advice} choose an output_dir on a larger disk"]

    def optimizer_bytes(self) -> int:
        """State that the optimizer makes at the first step."""
        assert self.costs is not None
        return optimizer_bytes(self.config.optimizer, self.costs.counts)


def brief(error: BaseException) -> str:
    """The first sentence of a library's message."""
    return str(error).strip().splitlines()[0].split(". ")[0][:160]
