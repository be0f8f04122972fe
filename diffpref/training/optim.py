"""Optimizer and schedule of a run."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from diffpref.training.config import TrainConfig


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


def new_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The learning rate over optimizer steps; never prepared by accelerate, which would step it once per process."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
