"""The settings of `diffpref train-reward-model`. Names that alignment runs have too mean the same there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffpref.training.config import TrainConfig
from diffpref.training.settings import names_of


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Defaults are those of PickScore v1: 128 pairs per update, a rate of 3e-6 that decays linearly over 4000 updates."""

    pretrained_model_name_or_path: str | None = None
    """CLIP model to start from, in transformers' or open_clip's layout: a folder, a hub id or a weight file."""
    clip_config: str | None = None
    """A config.json of transformers' CLIPModel: start from a model of this size with random weights instead."""
    tokenizer_name: str | None = None
    """Folder or hub id of the tokenizer of a model with random weights; others bring their own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast dtype of the towers; weights, cosines and losses stay in float32."""
    export_dtype: Literal["float32", "float16"] = "float32"
    """Dtype of the saved weights."""

    train_data_dir: str | None = None
    """Local preference data: a file or folder in one of the forms of docs/data.md."""
    dataset_name: str | None = None
    """Preference pairs by hub id; give this or train_data_dir."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set that has several."""
    data_format: str = "auto"
    """Form of a row (pairs, chosen_rejected, votes, ranked, hpd) or of the files (parquet, jsonl, webdataset, folder); auto looks."""
    split: str = "train"
    """Split to train on."""
    caption_column: str | None = None
    """Column of the prompts, if it is not found under a known name."""
    image_0_column: str | None = None
    """Column of the first image, of the better one for chosen_rejected, or of the list of images."""
    image_1_column: str | None = None
    """Column of the second image, or of the worse one."""
    label_column: str | None = None
    """Column with the probability that the first image is better, or with the ranks of a list."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Which pairs a ranked list of images gives: every pair of different rank, or the best against the worst."""
    cache_dir: str | None = None
    """Where hub data sets, copies of parquet files and the results of the image check are kept."""
    max_train_samples: int | None = None
    """Use only the first pairs of the data."""
    held_out_pairs: int = 500
    """Pairs kept out of training, split by prompt, on which the best model is chosen; 0 exports the last one."""
    tie_policy: Literal["drop", "keep", "error"] = "keep"
    """What happens to ties: kept with probability 0.5, dropped and counted, or an error."""
    check_images: bool = True
    """Decode every image once before training, so that bad rows are rejected, counted and listed at the start."""
    dataloader_num_workers: int = 4
    """Threads that decode and resize pictures beside the model; does not change what is seen."""

    max_train_steps: int = 4000
    """Optimizer steps."""
    train_batch_size: int = 16
    """Pairs per process and forward pass."""
    gradient_accumulation_steps: int = 8
    """Forward passes per optimizer step."""
    learning_rate: float = 3e-6
    """Rate of AdamW."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule, counted in optimizer steps."""
    lr_warmup_steps: int = 500
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    output_dir: str | None = None
    """Run folder, and the scorer itself; outputs/reward-model-<time> when not given."""
    seed: int = 0
    """Seed of the order of the pairs, the held-out prompts and random weights."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = 2
    """Keep this many checkpoints; the oldest goes after the newest is complete."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the newest complete one of output_dir with "latest"."""
    validation_steps: int = 100
    """Optimizer steps between looks at the held-out pairs."""

    def __post_init__(self) -> None:
        _check_model(self)
        if not (self.train_data_dir or self.dataset_name):
            raise ValueError("train_data_dir and dataset_name are both missing; give the pairs to learn from with one of them")
        for name in ("dataloader_num_workers", "validation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        self.shared()

    def shared(self) -> TrainConfig:
        """The settings that alignment runs have too, for the parts of a run that are the same. Raises ValueError for their ranges."""
        names = set(names_of(TrainConfig)) & set(names_of(RewardModelConfig)) - {"pretrained_model_name_or_path", "validation_steps"}
        return TrainConfig(**{name: getattr(self, name) for name in names})


def _check_model(config: RewardModelConfig) -> None:
    given = (config.pretrained_model_name_or_path, config.clip_config)
    if (given[0] is None) == (given[1] is None):
        raise ValueError(
            f"pretrained_model_name_or_path is {given[0]!r} and clip_config is {given[1]!r}; give one of them: a CLIP model to start from, "
            "or the size of a new one (diffpref testbed scorer trains the testbed's)"
        )
    if (config.clip_config is None) != (config.tokenizer_name is None):
        raise ValueError(
            f"clip_config is {config.clip_config!r} and tokenizer_name is {config.tokenizer_name!r}; a model with random weights needs "
            "both, a pretrained one brings its tokenizer"
        )
