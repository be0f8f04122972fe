"""What training changes, apart from the number of the step: everything that a resumed run needs to go on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffpref.core.policy import blend
from diffpref.data.loader import PairPixels
from diffpref.models.lora import trainable_state
from diffpref.sources.rollouts import RolloutState
from diffpref.training import checkpoint
from diffpref.training.config import TrainConfig
from diffpref.training.device import effective_learning_rate
from diffpref.training.ema import Ema, evaluation_mode, exchanged
from diffpref.training.objective import Objective
from diffpref.training.optim import move_schedule, new_optimizer, new_schedule
from diffpref.training.reliability import Reliability
from diffpref.training.run_costs import Pictures
from diffpref.training.sharding import collected
from diffpref.training.stopping import EarlyStopping


@dataclass
class TrainingState:
    """Weights, optimizer, schedule, and where they are asked for: moving average, loss scale, best validation, moving reference, and

    the reliability of annotators."""

    trainable: dict[str, Tensor]
    optimizer: torch.optim.Optimizer  # not the one that accelerate wraps around it
    scheduler: LambdaLR
    ema: Ema | None  # on the main process only, which validates and exports
    early_stopping: EarlyStopping | None
    scaler: Any  # of fp16 losses, else None
    reference: dict[str, Tensor] | None  # the weights of a reference that moves, on their devices
    reliability: Reliability | None
    data_key: int = 0
    """How often the run went back to a checkpoint; each time the draws after it become others."""
    rollout: RolloutState | None = None  # of a run that samples its own pairs

    @classmethod
    def start(
        cls, config: TrainConfig, module: nn.Module, accelerator: Accelerator, objective: Objective, pictures: Pictures
    ) -> TrainingState:
        """The state before the first step. `module` is on its device. Raises ValueError for a rate that the schedule cannot have."""
        trainable = trainable_state(module)
        optimizer = new_optimizer(config, trainable.values(), effective_learning_rate(config, accelerator))
        ema = Ema.start(config.ema_decay, trainable) if config.use_ema and accelerator.is_main_process else None
        early = None
        if config.early_stopping_patience is not None:
            scorer = str(config.validation_scorer).partition("=")[0]
            keys = {"implicit_accuracy": "eval/implicit_accuracy", "scorer": f"eval/{scorer}/mean"}
            early = EarlyStopping(config.early_stopping_patience, keys[config.early_stopping_metric])
        moving = {name: p.detach().clone() for name, p in trainable.items()} if config.reference_update_steps else None
        reliability = Reliability.start(objective.method, pictures) if isinstance(pictures, PairPixels) else None
        rollout = RolloutState() if objective.source else None
        schedule = new_schedule(config, optimizer)
        return cls(trainable, optimizer, schedule, ema, early, accelerator.scaler, moving, reliability, rollout=rollout)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """For a checkpoint, by file; call it while the trained weights are in place, and of a sharded run in every process."""
        found: dict[str, Mapping[str, Tensor]] = {
            "weights": {name: collected(p) for name, p in self.trainable.items()},
            "optimizer": checkpoint.optimizer_tensors(self.trainable, self.optimizer),
        }
        found |= {"ema": self.ema.average} if self.ema else {}
        found |= {"rollout": pairs} if self.rollout and (pairs := self.rollout.tensors()) else {}
        found |= {"reference": self.reference} if self.reference else {}
        return found | ({"reliability": {"eta": self.reliability.eta}} if self.reliability else {})

    def numbers(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        found: dict[str, Any] = {
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "optimizer": checkpoint.optimizer_numbers(self.trainable, self.optimizer),
        }
        if self.data_key:
            found["data_key"] = self.data_key
        if self.scaler is not None:
            found["scaler"] = self.scaler.state_dict()
        if self.ema:
            found["ema"] = {"updates": self.ema.updates}
        if self.early_stopping:
            found["early_stopping"] = self.early_stopping.state()
        if self.rollout:
            found["rollout"] = self.rollout.numbers()
        return found

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Load a checkpoint into the existing parameters. Raises ValueError unless it has exactly the model's trainable tensors."""
        checkpoint.restore(self.trainable, self.optimizer, tensors, numbers.get("optimizer"))
        self.data_key = int(numbers.get("data_key", 0))
        move_schedule(self.scheduler, self.optimizer, numbers["scheduler"]["last_epoch"])
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(numbers["scaler"])
        if self.ema:
            self.ema.restore(tensors["ema"], numbers["ema"]["updates"])
        if self.early_stopping:
            self.early_stopping.restore(numbers["early_stopping"])
        if self.reliability:
            self.reliability.eta = tensors["reliability"]["eta"]
        for name, x in (self.reference or {}).items():
            x.copy_(tensors["reference"][name])
        if self.rollout:
            self.rollout.restore(numbers["rollout"], tensors.get("rollout", {}))

    def follow(self, config: TrainConfig, step: int, device: torch.device) -> None:
        """After optimizer step `step`, counted from 1: move what follows the policy. Every process must call it."""
        if self.reference and config.reference_update_steps and step % config.reference_update_steps == 0:
            blend(self.reference, self.trainable, config.reference_decay)
        if self.reliability:
            self.reliability.update(device)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within the block the parameters hold what is validated and exported: the moving average, or the optimizer's own."""
        with exchanged(self.trainable, self.ema.average) if self.ema else evaluation_mode(self.trainable, self.optimizer):
            yield
