"""What is looked at while training: accuracy on held-out pairs by noise level, and pictures beside the base model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffpref.core.types import Predict, PreferenceBatch
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import PairDataset
from diffpref.evaluation.generate import Images, contact_sheet, generate
from diffpref.models.backbone import Backbone
from diffpref.scorers.implicit import ImplicitReward, pair_accuracy
from diffpref.sources.dataset import Encoder, from_disk
from diffpref.training.config import TrainConfig

PICTURE_STEPS = 20
PICTURE_GUIDANCE = 5.0


@dataclass
class Validation:
    """Pictures in validation/step_<n>.png, base above and policy below, and accuracy on held-out pairs if there are any."""

    folder: Path
    pipeline: DiffusionPipeline
    prompts: list[str]
    base_pictures: Images
    accuracy: HeldOut | None = None

    @classmethod
    def start(cls, config: TrainConfig, folder: Path, pipeline: DiffusionPipeline, held_out: PairDataset | None) -> Validation:
        """Draw the base pictures; call it while the UNet still is the base model, before a checkpoint is loaded into it."""
        prompts = list(config.validation_prompts) or (list(dict.fromkeys(held_out.prompts)) if held_out else [])
        prompts = prompts[: config.num_validation_images]
        return cls(folder / "validation", pipeline, prompts, _pictures(pipeline, prompts))

    def draw(self, step: int) -> None:
        """Write step_<n>.png."""
        if self.prompts:
            self.folder.mkdir(exist_ok=True)
            sheet = contact_sheet([self.base_pictures, _pictures(self.pipeline, self.prompts)], _enlarge(self.base_pictures))
            sheet.save(self.folder / f"step_{step}.png")


def _pictures(pipeline: DiffusionPipeline, prompts: list[str]) -> Images:
    if not prompts:
        return np.zeros((0, 1, 1, 3), np.uint8)
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    pictures = generate(
        pipeline, prompts, range(len(prompts)), num_inference_steps=PICTURE_STEPS, guidance_scale=PICTURE_GUIDANCE, batch_size=4
    )
    pipeline.unet.train(was_training)
    return pictures


def _enlarge(pictures: Images) -> int:
    """Whole factor that makes small pictures about 128 pixels wide."""
    return max(1, 128 // pictures.shape[2])


@dataclass
class HeldOut:
    """Implicit accuracy on pairs that are never trained on."""

    reward: ImplicitReward
    batches: list[PreferenceBatch]

    @classmethod
    def build(cls, backbone: Backbone, reference: Predict, pixels: PairPixels, encoder: Encoder, batch_size: int) -> HeldOut:
        """Encode the held-out pairs once; ties have no right answer and are left out."""
        wanted = [i for i, p in enumerate(pixels.pairs.p0) if p != 0.5]
        chunks = pixels.chunks(wanted, batch_size)
        policy = backbone.predictor(backbone.denoiser)
        return cls(ImplicitReward(policy, reference, backbone.process), list(from_disk(pixels, lambda: chunks, encoder)))

    def __call__(self) -> dict[str, Any]:
        gains = torch.cat([self.reward.gains(batch).cpu() for batch in self.batches])
        overall, buckets = pair_accuracy(gains)
        return {
            "eval/implicit_accuracy": overall,
            "eval/implicit_accuracy_by_noise": buckets,
            "eval/num_pairs": len(gains),
            "eval/gain_chosen": float(gains[:, 0].mean()),
            "eval/gain_rejected": float(gains[:, 1].mean()),
        }
