"""Optimizer and schedule of a run. All but AdamW and Adafactor come from packages that are imported when they are asked for."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from diffpref.training.config import TrainConfig
from diffpref.training.optimizers import Rounding, adafactor, adamw

_PACKAGES = {"adamw_8bit": "bitsandbytes", "adamw_4bit": "torchao", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
"""What an optimizer needs beside torch and transformers."""
_COMPILERS = ("g++", "gcc", "clang++", "clang", "cl")


def check_optimizer(config: TrainConfig) -> list[str]:
    """What the user should know about the choice of optimizer and averaging, in lines; call it before a model is loaded.

    Raises ValueError for a package that is missing, and for settings that would be ignored or work against the optimizer.
    """
    if config.optimizer in _PACKAGES:
        _package(config.optimizer)
    if config.optimizer == "adamw_4bit" and not any(map(shutil.which, _COMPILERS)):
        raise ValueError("optimizer is adamw_4bit, whose step is compiled, but there is no C compiler; install gcc, or use adamw_8bit")
    if config.optimizer == "schedule_free":
        if not config.lr_scheduler.startswith("constant"):
            raise ValueError(
                f"lr_scheduler is {config.lr_scheduler}, but schedule_free averages in place of decay; use constant_with_warmup or constant"
            )
        if config.use_ema:
            raise ValueError("use_ema is true, but schedule_free validates and exports an average of its own; drop use_ema")
    if config.optimizer == "adafactor":
        unused = [n for n in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(config, n) != getattr(TrainConfig, n)]
        if unused:
            raise ValueError(f"{unused[0]} is {getattr(config, unused[0])}, but optimizer adafactor has no such setting; leave it out")
    lines = []
    if config.tune == "full" and config.base_dtype == "bf16":
        lines.append(
            "tune full with base_dtype bf16: weights are kept in bf16 and rounded stochastically, other numerics than float32 weights"
        )
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        lines.append(f"prodigy finds the rate itself and multiplies it by learning_rate, which is {config.learning_rate:g}; 1.0 is usual")
    if config.use_ema:
        lines.append(f"validated and exported is the moving average of the weights (use_ema, ema_decay {config.ema_decay:g})")
    if config.optimizer == "schedule_free":
        lines.append("validated and exported is the average of the weights that schedule_free keeps")
    return lines


def new_optimizer(config: TrainConfig, trainable: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trained tensors at the effective learning rate. All but AdamW's own settings are the papers'."""
    common: dict[str, Any] = {"lr": rate, "weight_decay": config.adam_weight_decay}
    adam = common | {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "adafactor":  # the rate is ours, as in the published SDXL runs
        return Rounding(trainable, adafactor, config.seed, **common)
    if config.optimizer == "adamw" and config.base_dtype != "fp32" and config.tune == "full":
        return Rounding(trainable, adamw, config.seed, **adam)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trainable, fused=True, **adam)
    package = _package(config.optimizer)
    if config.optimizer == "adamw_8bit":
        return package.optim.AdamW8bit(trainable, **adam)
    if config.optimizer == "adamw_4bit":
        return importlib.import_module("torchao.optim").AdamW4bit(trainable, **adam)
    if config.optimizer == "schedule_free":
        optimizer = package.AdamWScheduleFree(trainable, **adam)
        optimizer.train()  # it starts in the other mode, and steps in this one only
        return optimizer
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay
        return package.Prodigy(trainable, use_bias_correction=True, safeguard_warmup=True, **adam)


def _package(optimizer: str) -> ModuleType:
    try:
        return importlib.import_module(_PACKAGES[optimizer])
    except ImportError as error:
        raise ValueError(
            f"optimizer is {optimizer}, which needs {_PACKAGES[optimizer]} ({error}); pip install diffpref[optim], or use adamw"
        ) from error


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def new_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The learning rate over optimizer steps; never prepared by accelerate, which would step it once per process.

    Raises ValueError for a rate that the polynomial schedule cannot lower to its end of 1e-7.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except ValueError as error:
        raise ValueError(
            f"lr_scheduler is {config.lr_scheduler} and the rate is {optimizer.defaults['lr']:g}: {error}; raise learning_rate"
        ) from error


def move_schedule(scheduler: LambdaLR, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Put the schedule and the optimizer's rates where they stand after `step` optimizer steps."""
    scheduler.last_epoch = step
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)  # a tensor where the optimizer wants one, as torchao's do
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
