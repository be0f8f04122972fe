"""The tensors that travel between stages. Everything is laid out as (G, K, ...).

G  groups: one prompt (or one prompt and user) each
K  images in a group, best first: K = 2 is a pair, K > 2 a ranking, K = 1 unpaired
C h w  channels, height and width of a latent
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffpref.core.random import PairRandom


@dataclass(frozen=True)
class Conditioning:
    """Everything the denoiser sees besides x_t and t."""

    prompt_embeds: Tensor | None = None  # (G, K, L, D); None where token_ids are given, which the trained model encodes itself
    pooled_prompt_embeds: Tensor | None = None  # (G, K, P), SDXL
    time_ids: Tensor | None = None  # (G, K, 6) in pixels, SDXL
    token_ids: Tensor | None = None  # (G, K, E, L) int64 for E text encoders; a row of -1 is an empty prompt encoded as zeros
    user_embeds: Tensor | None = None  # (G, K, U, D) of the user, or of what else a picture should serve; zeros where unknown

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `fn` to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: fn(x) for name, x in present.items() if x is not None})


@dataclass(frozen=True)
class PathStep:
    """A place on the diffusion path where a perfect policy would have predicted `target`."""

    x_t: Tensor  # (G, K, C, h, w)
    timesteps: Tensor  # (G, K) int64 in [0, T)
    target: Tensor  # (G, K, C, h, w), in the model's own parameterisation
    weight: Tensor  # (G, K), multiplies the mean squared error
    log_snr: Tensor | None = None  # (G, K) log(alpha^2 / sigma^2) at the timesteps
    guidance_scale: float = 1.0  # policy and reference are compared under this classifier-free guidance
    reference: Tensor | None = None  # (G, K, C, h, w) what the reference predicts here, if the path has asked it already
    shared_input: tuple[bool, ...] = ()  # (G,) whether all images of a group have one x_t and timestep; none of them when empty

    def first(self, images: int) -> PathStep:
        """The same place for the first `images` images of every group."""
        tensors: dict[str, Any] = {f.name: x[:, :images] for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class PreferenceBatch:
    """What a source yields, whether it read it from disk or sampled it."""

    latents: Tensor  # (G, K, C, h, w), scaled by the VAE factor; of an on-policy source where its last step ended
    cond: Conditioning
    relevance: Tensor  # (G, K) float32; for pairs the probability that this image is the better one
    pair_ids: tuple[str, ...]  # (G,)
    visits: tuple[int, ...]  # (G,), how often the pair was seen before
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # by scorer (G, K), higher is better
    weight: Tensor | None = None  # (G,), multiplies the loss of a group
    reference_error: Tensor | None = None  # (G, K), the reference's error at the step of this visit, computed beforehand
    steps: tuple[PathStep, ...] = ()  # what an on-policy source has recorded

    @property
    def group_shape(self) -> torch.Size:
        """(G, K)."""
        return self.relevance.shape

    def first(self, images: int | None) -> PreferenceBatch:
        """The same groups with their first `images` images only, all of them for None."""
        if images is None or images >= self.relevance.shape[1]:
            return self
        return replace(
            self,
            latents=self.latents[:, :images],
            cond=self.cond.map(lambda x: x[:, :images]),
            relevance=self.relevance[:, :images],
            scores={name: score[:, :images] for name, score in self.scores.items()},
            reference_error=None if self.reference_error is None else self.reference_error[:, :images],
            steps=tuple(step.first(images) for step in self.steps),
        )

    def random(self, seed: int) -> PairRandom:
        """The draws that belong to these pairs at these visits."""
        return PairRandom(seed, self.pair_ids, self.visits)


@dataclass(frozen=True)
class Evaluation:
    """Predictions of policy and reference at the same step."""

    step: PathStep
    policy: Tensor  # (G, K, C, h, w), carries gradient
    reference: Tensor | None  # (G, K, C, h, w), no gradient; None if the method needs none
    reference_error: Tensor | None = None  # (G, K), stands for the reference's mean squared error where that is None


@dataclass(frozen=True)
class LossOutput:
    """What a method returns."""

    per_group: Tensor  # (G,)
    metrics: dict[str, Tensor]  # scalars, detached
    confidence: Tensor | None = None  # (G,) detached, probability that each label is right, for methods that estimate it


Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t (G, K, C, h, w), timesteps (G, K), conditioning) -> prediction (G, K, C, h, w)."""

Loss = Callable[[PreferenceBatch, Sequence[Evaluation]], LossOutput]
"""What a method computes, and what a guard wraps."""
