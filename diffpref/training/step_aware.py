"""Training the step-aware preference model of SPO (core/preference.py has the criterion, scorers/step_aware.py the model).

both pictures of a pair -> latents -> x_t with one t ~ U{0..T-1} and one noise -> guided prediction of the frozen diffusion model
-> estimate of the clean latent -> decoded, clamped, resized -> scores at t, cross entropy against the label
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from diffpref.core.policy import guided
from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning
from diffpref.data.images import decode_image
from diffpref.data.pairs import PairDataset
from diffpref.models.backbone import Backbone, as_backbone, load_pipeline
from diffpref.scorers import scorer_from
from diffpref.scorers.clip_towers import ClipTowers
from diffpref.scorers.preprocessing import Preprocessing, ShortestSideCrop, normalise
from diffpref.scorers.step_aware import StepAwareClip, released_state
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_model import load_reward_model, save_reward_model
from diffpref.training.reward_pairs import RewardBatch
from diffpref.training.step_aware_config import StepAwareConfig

if TYPE_CHECKING:
    from diffpref.scorers.scorer import Scorer

LEVELS = (0, 251, 501, 701, 951)
"""Timesteps at which held-out pairs are looked at, the authors' own."""


class StepAwareModel(nn.Module):
    """A step-aware CLIP as one module; calling it scores pairs."""

    def __init__(self, towers: ClipTowers, seed: int, recompute: bool) -> None:
        super().__init__()
        self.model = StepAwareClip(towers.model).start(seed)
        self.model.recompute = recompute
        self.towers = towers

    def forward(self, pixels: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Normalised estimates (G, K, 3, S, S) at int64 timesteps (G,) and G prompts to scaled scores (G, K), float32, with gradients."""
        clip, images = self.towers.model, pixels.shape[1]
        texts = clip.text_projection(clip.text_model(input_ids=self.towers.token_ids(prompts, "longest")).pooler_output)
        seen = self.model.image_features(pixels.flatten(0, 1), timesteps.repeat_interleave(images))
        cosine = (F.normalize(seen.float(), dim=-1).unflatten(0, (-1, images)) * F.normalize(texts.float(), dim=-1)[:, None]).sum(-1)
        return self.towers.scale * cosine

    def save(self, folder: Path, dtype: str) -> None:
        """Write the scorer into `folder`: a PickScore folder whose model.safetensors has the released step-aware layout."""
        save_reward_model(self.towers, folder, dtype, released_state(self.model))


@dataclass(frozen=True)
class EstimateView:
    """Pictures as a diffusion model estimates them at a noise level; every draw belongs to (seed, pair, visit)."""

    backbone: Backbone
    preprocessing: Preprocessing  # to the resolution of the diffusion model
    resolution: int
    size: int  # side of the scorer's pictures
    guidance_scale: float
    seed: int
    decode_dtype: torch.dtype = torch.float32
    levels: tuple[int | None, ...] = LEVELS

    def __call__(self, batch: RewardBatch, level: int | None = None) -> tuple[Tensor, ...]:
        """Normalised estimates (G, 2, 3, S, S) and their timesteps (G,)."""
        pixels, timesteps = self.estimates(batch, level)
        seen = normalise(ShortestSideCrop(self.size).pixels(pixels.flatten(0, 1)))
        return seen.unflatten(0, pixels.shape[:2]), timesteps

    @torch.no_grad()
    def estimates(self, batch: RewardBatch, level: int | None = None) -> tuple[Tensor, Tensor]:
        """Pixels (G, 2, 3, H, W) in [0, 1] and timesteps (G,), which the two pictures of a pair share, as they do the noise."""
        backbone, process = self.backbone, self.backbone.process
        device = backbone.denoiser.device
        groups = len(batch.pair_ids)
        draws = PairRandom(self.seed, tuple(batch.pair_ids), tuple(batch.visits))
        moments = backbone.encode_moments(batch.pixels.flatten(0, 1).to(device) / 127.5 - 1).unflatten(0, (groups, 2))
        mean, sd = moments.unbind(2)
        latents = mean + sd * draws.normal("posterior", mean.shape[1:]).to(mean)
        t = draws.integers("timestep", process.num_timesteps) if level is None else torch.full((groups,), level)
        t_pair = t.to(device)[:, None].expand(groups, 2)
        noise = draws.normal("noise", latents.shape[2:]).to(latents)[:, None].expand_as(latents)
        x_t = process.add_noise(latents, noise, t_pair)
        predict = guided(backbone.predictor(backbone.denoiser), backbone.null_prompt(), self.guidance_scale)
        estimate = process.x_0(x_t, predict(x_t, t_pair, self._conditioning(batch.prompts)).to(x_t.dtype), t_pair)
        pixels = backbone.decode(estimate.flatten(0, 1), self.decode_dtype).clamp(0, 1)
        return pixels.unflatten(0, (groups, 2)), t_pair[:, 0]

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """(G, 2, ...); sizes are those of uncropped pictures."""
        cond = self.backbone.encode_prompts(prompts).map(lambda x: x.expand(-1, 2, *x.shape[2:]))
        if not self.backbone.uses_time_ids:
            return cond
        side = float(self.resolution)
        sizes = torch.tensor([side, side, 0, 0, side, side], device=self.backbone.denoiser.device)
        return dataclasses.replace(cond, time_ids=sizes.expand(len(prompts), 2, 6))


def load_step_aware(config: RewardModelConfig, own: StepAwareConfig, accelerator: Accelerator) -> tuple[StepAwareModel, EstimateView]:
    """The model that training starts from, and what it sees. Raises ValueError for models that are missing or cannot be used."""
    base, device = str(own.diffusion_model_name_or_path), accelerator.device
    half = config.mixed_precision == "bf16" and device.type == "cuda"
    try:
        backbone = as_backbone(load_pipeline(base, dtype=torch.bfloat16 if half else torch.float32), base)
    except ValueError as error:
        raise ValueError(str(error).replace("pretrained_model_name_or_path", "diffusion_model_name_or_path")) from error
    backbone.process.check_passage("of noised pairs", backbone.process.num_timesteps - 1)
    resolution = own.resolution or backbone.default_resolution
    if resolution % backbone.pixel_factor:
        raise ValueError(f"resolution is {resolution}; {base!r} needs a multiple of {backbone.pixel_factor}")
    backbone.pipeline.to(device)
    towers = load_reward_model(dataclasses.replace(config, gradient_checkpointing=False), device).towers
    model = StepAwareModel(towers, config.seed, config.gradient_checkpointing).to(device)
    view = EstimateView(
        backbone,
        ShortestSideCrop(resolution),
        resolution,
        towers.image_size,
        own.diffusion_guidance_scale,
        config.seed,
        {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[own.decode_dtype],
    )
    return model, view


def relabelled(
    parts: tuple[PairDataset, PairDataset | None], own: StepAwareConfig | None, accelerator: Accelerator
) -> tuple[PairDataset, PairDataset | None]:
    """The pairs with labels by relabel_scorer: 1 or 0 where the two probabilities differ by more than relabel_gap, else 1/2.

    As they are when there is no such scorer.
    """
    if own is None or own.relabel_scorer is None:
        return parts
    try:
        scorer = scorer_from(str(own.relabel_scorer), accelerator.device)
    except ValueError as error:
        raise ValueError(f"relabel_scorer {own.relabel_scorer!r}: {error}") from error
    pairs, held_out = parts
    return _relabelled(pairs, scorer, own.relabel_gap), None if held_out is None else _relabelled(held_out, scorer, own.relabel_gap)


def _relabelled(pairs: PairDataset, scorer: Scorer, gap: float) -> PairDataset:
    verdicts = []
    for start in range(0, len(pairs), 256):
        rows = [pairs.row(i) for i in range(start, min(start + 256, len(pairs)))]
        pictures = [decode_image(data) for row in rows for data in (row.image_0, row.image_1)]
        scores = scorer(pictures, [prompt for prompt in pairs.prompts[start : start + len(rows)] for _ in (0, 1)]).unflatten(0, (-1, 2))
        verdicts.append(verdict(scores, gap))
    return dataclasses.replace(pairs, p0=torch.cat(verdicts).double().numpy())


def verdict(scores: Tensor, gap: float) -> Tensor:
    """Labels (G,) from scores (G, 2): 1 or 0 where |softmax_0 - softmax_1| > gap, 1/2 elsewhere."""
    difference = torch.tanh((scores[:, 0] - scores[:, 1]) / 2)
    return torch.where(difference.abs() > gap, (difference > 0).to(scores.dtype), torch.full_like(difference, 0.5))
