"""The settings of a training run: one flat set of names for flags, YAML keys, the stored config and the docs.

Later wins: dataclass defaults, then the YAML file, then flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything but the method's own hyper-parameters, which live in its class."""

    method: str = "diffusion_dpo"
    """Training objective: diffusion_dpo or sft."""

    pretrained_model_name_or_path: str | None = None
    """Base model: a diffusers folder or hub id of the SD or SDXL family."""
    revision: str | None = None
    """Git revision of a hub model."""
    variant: str | None = None
    """Weight variant of the model files, such as fp16."""
    tune: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter (the reference is the model without it) or all UNet weights (the reference is a frozen copy)."""
    rank: int = 16
    """Rank of the LoRA adapter."""
    lora_alpha: float | None = None
    """Scale numerator of the adapter; the rank when not given, so that the scale is 1."""
    lora_targets: str = "attention"
    """UNet layers that get an adapter: attention, all, or layer names separated by commas."""

    train_data_dir: str | None = None
    """Local preference pairs: a parquet file, a folder of parquet files or a saved datasets folder, in the Pick-a-Pic schema."""
    dataset_name: str | None = None
    """Preference pairs by hub id; give this or train_data_dir."""
    split: str = "train"
    """Split to train on."""
    cache_dir: str | None = None
    """Where hub datasets are kept."""
    max_train_samples: int | None = None
    """Use only the first pairs of the data."""
    held_out_pairs: int = 0
    """Pairs kept out of training for the implicit accuracy, split by prompt."""
    tie_policy: Literal["drop", "keep", "error"] = "drop"
    """What happens to ties: dropped and counted, kept with probability 0.5, or an error."""
    label_noise_prob: float = 0.0
    """Probability that a label is flipped before training, fixed per pair: 0.5 is the random-label control, 1.0 the inverted one."""
    check_images: bool = True
    """Decode every image once before training, so that bad rows are rejected, counted and listed at the start."""
    resolution: int | None = None
    """Side of the training pictures in pixels; the model's own when not given."""
    random_crop: bool = False
    """Crop at random (shared by the pair) instead of at the centre."""
    no_hflip: bool = False
    """Do not mirror pairs at random; needed when left and right matter to the preference."""
    proportion_empty_prompts: float = 0.0
    """Share of pairs whose prompt is replaced by the empty one, drawn once per pair and visit."""
    cache_latents: bool = False
    """Encode all pictures and prompts once and keep them in memory; not with random_crop."""
    dataloader_num_workers: int = 0
    """Processes that decode pictures; does not change what is seen."""

    max_train_steps: int = 2000
    """Optimizer steps."""
    train_batch_size: int = 1
    """Pairs per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-5
    """Rate of the optimizer, as it is used: nothing is multiplied in."""
    lr_scheduler: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = "constant_with_warmup"
    """Schedule, counted in optimizer steps."""
    lr_warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 25 % more time."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast dtype of the UNet's forward passes; the launcher's when not given. Weights and losses stay in float32."""

    output_dir: str | None = None
    """Run folder; outputs/<method>-<time> when not given."""
    seed: int = 0
    """Seed of every draw: order, noise, timesteps, flips, adapter initialisation."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Keep this many checkpoints; the oldest goes after the newest is complete."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the newest complete one of output_dir with "latest"."""
    validation_steps: int | None = None
    """Optimizer steps between held-out accuracy and validation pictures; none when not given."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the validation pictures; the first held-out prompts when not given."""
    num_validation_images: int = 4
    """Pictures per validation, the base model's beside the policy's."""
    merge_lora: bool = False
    """After a LoRA run also write the complete pipeline with the adapter merged into its weights."""
    report_to: str = "none"
    """Tracker beside metrics.jsonl: none, tensorboard, wandb or all."""

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.cache_latents and self.random_crop:
            raise ValueError("cache_latents is true together with random_crop: a cached latent has one crop; switch one of them off")
        if self.cache_latents and self.dataloader_num_workers:
            raise ValueError(
                f"dataloader_num_workers is {self.dataloader_num_workers}, but cache_latents decodes nothing while training; drop one"
            )
        if self.validation_steps and not (self.validation_prompts or self.held_out_pairs):
            raise ValueError(
                f"validation_steps is {self.validation_steps}, but there is nothing to validate with: "
                "add held_out_pairs or validation_prompts"
            )
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm is 0, which would remove every gradient; use a positive norm, for example 1.0")
        if self.train_data_dir and self.dataset_name:
            raise ValueError(
                f"train_data_dir {self.train_data_dir!r} and dataset_name {self.dataset_name!r} are both given; keep the one to train on"
            )

    @property
    def data_source(self) -> str | None:
        """The folder or hub id of the pairs."""
        return self.train_data_dir or self.dataset_name


_AT_LEAST = {
    "rank": 1,
    "max_train_steps": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "validation_steps": 1,
    "max_train_samples": 1,
    "held_out_pairs": 0,
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 0,
    "num_validation_images": 1,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "resolution": 1,
}


def _check_ranges(config: TrainConfig) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:  # also true of nan
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for name in ("proportion_empty_prompts", "label_noise_prob"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a share between 0 and 1")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}; it must be a non-negative integer below 2**63")
