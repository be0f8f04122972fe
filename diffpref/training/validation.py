"""What is looked at while training: accuracy on held-out pairs by noise level, and pictures beside the base model's.

Both use the weights that will be exported: the moving average or the optimizer's own, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffpref.core.policy import adapters_off
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Predict, PreferenceBatch
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import PairDataset
from diffpref.evaluation.generate import Images, contact_sheet, generate
from diffpref.models.execution import eager
from diffpref.models.lora import adapted_parts
from diffpref.models.pipeline import needs_picture
from diffpref.scorers import scorer_from
from diffpref.scorers.implicit import ImplicitReward, pair_accuracy
from diffpref.sources.dataset import MicroBatches
from diffpref.training.config import TrainConfig

PICTURE_STEPS = 20
PICTURE_GUIDANCE = 5.0
SHEET_COLUMNS = 8
"""Pictures in a row of the sheet; the scorer sees all of them."""

Scorer = Callable[[Images, Sequence[str]], Tensor]
"""(uint8 pictures (N, H, W, 3), N prompts) -> float32 (N,), higher is better."""


@dataclass
class Validation:
    """Pictures in validation/step_<n>.png, base above and policy below, their scores, and accuracy on held-out pairs."""

    folder: Path
    pipeline: DiffusionPipeline
    prompts: list[str]
    base_pictures: Images
    scorer: tuple[str, Scorer] | None = None  # with its name in the log
    base_score: float = 0.0
    accuracy: HeldOut | None = None

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        folder: Path,
        pipeline: DiffusionPipeline,
        held_out: PairDataset | None,
        scorer: tuple[str, Scorer] | None,
    ) -> Validation:
        """Draw and score the base pictures; call it while the UNet still is the base model and computes as it will in training.

        An adapter that the run starts from is switched off meanwhile. A refiner draws none: it needs a picture to start with.
        """
        if needs_picture(pipeline) and (config.validation_prompts or scorer):
            raise ValueError(
                f"validation_prompts or validation_scorer are given, but {config.pretrained_model_name_or_path!r} improves pictures and "
                "draws none from prompts; leave them out and use held_out_pairs"
            )
        prompts = list(config.validation_prompts) or (list(dict.fromkeys(held_out.prompts)) if held_out else [])
        prompts = [] if needs_picture(pipeline) else prompts[: config.num_validation_images]
        made = cls(folder / "validation", pipeline, prompts, np.zeros((0, 1, 1, 3), np.uint8), scorer)
        with ExitStack() as off:
            for part in adapted_parts(pipeline).values():
                off.enter_context(adapters_off(part))
            made.base_pictures = made.draw()
        made.base_score = made._score(made.base_pictures)
        return made

    def draw(self) -> Images:
        """One picture per prompt, uint8 (N, H, W, 3), by the pipeline as it is now; the same seeds every time."""
        if not self.prompts:
            return self.base_pictures
        was_training = self.pipeline.unet.training
        self.pipeline.unet.eval()
        with eager(self.pipeline.unet):
            pictures = generate(
                self.pipeline,
                self.prompts,
                range(len(self.prompts)),
                num_inference_steps=PICTURE_STEPS,
                guidance_scale=PICTURE_GUIDANCE,
                batch_size=4,
            )
        self.pipeline.unet.train(was_training)
        return pictures

    def look(self, step: int) -> tuple[dict[str, Any], Images]:
        """Draw, score and write step_<n>.png; (scores, pictures)."""
        pictures = self.draw()
        if not len(pictures):
            return {}, pictures
        self.folder.mkdir(exist_ok=True)
        rows = [self.base_pictures[:SHEET_COLUMNS], pictures[:SHEET_COLUMNS]]
        contact_sheet(rows, _enlarge(pictures)).save(self.folder / f"step_{step}.png")
        if self.scorer is None:
            return {}, pictures
        name = f"eval/{self.scorer[0]}"
        return {f"{name}/mean": self._score(pictures), f"{name}/base_mean": self.base_score}, pictures

    def _score(self, pictures: Images) -> float:
        """Mean score of the pictures."""
        if self.scorer is None:
            return 0.0
        return float(self.scorer[1](pictures, self.prompts).float().mean())


def load_scorer(spec: str | None, device: torch.device) -> tuple[str, Scorer] | None:
    """(name for the log, scorer) of a validation_scorer: a name, or name=weights; None for none.

    Raises ValueError when there is no such scorer or it cannot be loaded.
    """
    if spec is None:
        return None
    try:
        return spec.partition("=")[0], scorer_from(spec, device)
    except ValueError as error:
        raise ValueError(f"validation_scorer {spec!r}: {error}") from error


def _enlarge(pictures: Images) -> int:
    """Whole factor that makes small pictures about 128 pixels wide."""
    return max(1, 128 // pictures.shape[2])


@dataclass
class HeldOut:
    """Implicit accuracy on pairs that are never trained on."""

    reward: ImplicitReward
    batches: list[PreferenceBatch]

    @classmethod
    def build(
        cls,
        policy: Predict,
        reference: Predict,
        process: DdpmProcess,
        pixels: PairPixels,
        source: Callable[[MicroBatches], Iterator[PreferenceBatch]],
        batch_size: int,
    ) -> HeldOut:
        """Take the held-out pairs from `source` once; ties have no right answer and are left out.

        policy, reference: of the bare modules, as one process alone asks them.
        """
        wanted = [i for i, p in enumerate(pixels.pairs.p0) if p != 0.5]
        chunks = pixels.chunks(wanted, batch_size)
        return cls(ImplicitReward(policy, reference, process), list(source(lambda: chunks)))

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
