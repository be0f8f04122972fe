"""What training a step-aware preference model needs beside the settings of a reward model, and the published values of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffpref.training.settings import Settings

PUBLISHED: Settings = {
    "learning_rate": 3e-6,
    "adam_weight_decay": 0.3,
    "train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "max_train_steps": 8000,
    "lr_warmup_steps": 500,
    "lr_scheduler": "linear",
    "seed": 42,
}
"""Of the SD1.5 model: 64 pairs per update. For SDXL the authors use learning_rate 1e-6 and max_train_steps 7000."""


@dataclass(frozen=True, kw_only=True)
class StepAwareConfig:
    """Where the estimates come from that the model learns to judge."""

    diffusion_model_name_or_path: str | None = None
    """Frozen diffusion model of the SD or SDXL family whose estimates are judged: the model to be aligned later."""
    diffusion_guidance_scale: float = 5.0
    """Classifier-free guidance of its predictions; use that of the later sampling."""
    decode_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which estimates are decoded; SDXL's own autoencoder overflows in fp16."""
    resolution: int | None = None
    """Side in pixels at which pictures are noised; the diffusion model's own when not given."""
    relabel_scorer: str | None = None
    """Scorer, as name or name=weights, that replaces the labels by its own verdict on the pictures, as in the authors' SDXL recipe."""
    relabel_gap: float = 0.1
    """With relabel_scorer: a smaller difference of the two preference probabilities is a tie; 0 makes none."""

    def __post_init__(self) -> None:
        if self.diffusion_model_name_or_path is None:
            raise ValueError("diffusion_model_name_or_path is missing; give the SD or SDXL model whose estimates are to be judged")
        if not 0 <= self.relabel_gap < 1:
            raise ValueError(f"relabel_gap is {self.relabel_gap}; it is a difference of probabilities in [0, 1), 0.1 in the release")
        if self.relabel_scorer is None and self.relabel_gap != StepAwareConfig.relabel_gap:
            raise ValueError(f"relabel_gap is {self.relabel_gap}, but nothing is relabelled; add relabel_scorer or leave it out")
