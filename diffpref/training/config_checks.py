"""Settings of a run that contradict each other: ValueError with names, values and remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports this file
    from diffpref.training.config import TrainConfig


def check_cache(config: TrainConfig) -> None:
    """Settings that contradict kept or stored latents."""
    for name in ("cache_latents", "latent_cache"):
        if not getattr(config, name):
            continue
        if config.random_crop:
            raise ValueError(f"{name} is {getattr(config, name)} together with random_crop: a cached latent has one crop; drop one of them")
        if config.dataloader_num_workers and name == "cache_latents":
            raise ValueError(
                f"dataloader_num_workers is {config.dataloader_num_workers}, but {name} decodes nothing while training; drop one"
            )


def check_base_dtype(config: TrainConfig) -> None:
    """What cannot be computed with weights in half precision."""
    if config.base_dtype == "fp32":
        return
    where = f"base_dtype is {config.base_dtype}, but "
    if config.use_dora:
        raise ValueError(f"{where}use_dora is true, which divides by the weights' norms in float32; use base_dtype fp32, or plain LoRA")
    if config.tune != "full":
        return
    if config.base_dtype == "fp16":
        raise ValueError(f"{where}tune is full, and updates are lost in fp16; use base_dtype bf16, which is rounded stochastically")
    if config.optimizer not in ("adamw", "adafactor"):
        raise ValueError(f"{where}tune is full and optimizer {config.optimizer} rounds to the nearest; use adafactor or adamw")
    for name, value in {"use_ema": config.use_ema, "reference_decay": config.reference_decay}.items():
        if value:
            raise ValueError(f"{where}{name} is {value}, whose small moves are lost in bf16 weights; leave it out, or use base_dtype fp32")


def check_compile(config: TrainConfig) -> None:
    """Settings that contradict compiled blocks, or that would be ignored without them."""
    if not config.compile:
        if config.compile_backend != "inductor":
            raise ValueError(f"compile_backend is {config.compile_backend!r}, but nothing is compiled; add compile or leave it out")
        return
    if config.gradient_checkpointing == "selective":
        raise ValueError(
            "gradient_checkpointing is selective together with compile, which chooses what to keep within a block; use off or full"
        )
    if config.use_dora:
        raise ValueError("use_dora is true together with compile: the reference would need a graph of its own; drop one of them")


def check_packing(config: TrainConfig) -> None:
    """Settings under which there are no frozen float32 weights to be packed, or that packed layers would not follow."""
    if not config.pack_weights:
        return
    for name, fits in {
        "tune": "lora",
        "base_dtype": "fp32",
        "compile": False,
        "shard": "no",
        "aspect_ratio_buckets": False,
        "channels_last": False,
    }.items():
        if getattr(config, name) != fits:
            raise ValueError(
                f"pack_weights is true together with {name} {getattr(config, name)}; "
                f"it is for frozen weights in float32 on a CPU: use {name} {str(fits).lower()}, or leave pack_weights out"
            )
    if config.gradient_checkpointing == "selective":
        raise ValueError("gradient_checkpointing is selective together with pack_weights, whose products it does not know; use off or full")


def check_hub(config: TrainConfig) -> None:
    """Settings of the hub without an upload, and a token that trackers would store."""
    for name in ("hub_model_id", "hub_token"):
        if getattr(config, name) is not None and not config.push_to_hub:
            raise ValueError(f"{name} is given, but push_to_hub is false, so that it would be ignored; add --push_to_hub, or drop it")
    trackers = {name.strip() for name in config.report_to.split(",")} - {"none", "tensorboard"}
    if config.hub_token is not None and trackers:
        raise ValueError(
            f"hub_token is given together with report_to {config.report_to!r}: such trackers store the command with the token in it; "
            "log in with `hf auth login` or set HF_TOKEN in place of hub_token"
        )


def check_validation(config: TrainConfig) -> None:
    """Scorer and early stopping need validations with something to measure."""
    patience, by_scorer = config.early_stopping_patience, config.early_stopping_metric == "scorer"
    if config.validation_scorer and not config.validation_steps:
        raise ValueError(f"validation_scorer is {config.validation_scorer!r}, but nothing is validated; add validation_steps")
    if by_scorer and patience is None:
        raise ValueError("early_stopping_metric is scorer, but nothing stops early; add early_stopping_patience or leave it out")
    if patience is None:
        return
    if not config.validation_steps:
        raise ValueError(f"early_stopping_patience is {patience}, but nothing is validated; add validation_steps")
    if by_scorer and not config.validation_scorer:
        raise ValueError("early_stopping_metric is scorer, but there is none; add validation_scorer")
    if not by_scorer and not config.held_out_pairs:
        raise ValueError(
            f"early_stopping_patience is {patience} and early_stopping_metric implicit_accuracy, but no pairs are held out; "
            "add held_out_pairs, or use early_stopping_metric scorer"
        )
