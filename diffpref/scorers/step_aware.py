"""The step-aware preference model of SPO (Liang et al., 2024, arXiv:2406.04314): a PickScore that knows how noisy a picture was.

    score = exp(logit_scale) * cos(image at timestep t, text)

    e_t   = W2 silu(W1 [cos(t f), sin(t f)]),   f_i = exp(-ln(10000) i / 128),  i = 0..127
    block: h += g1 * Attn(LN1(h) (1 + sc1) + sh1);   h += g2 * MLP(LN2(h) (1 + sc2) + sh2);   (sh1, sc1, g1, sh2, sc2, g2) = A silu(e_t)
    final: pooled (1 + scale) + shift,   (shift, scale) = B silu(e_t)

The pictures are estimates of the clean picture, decoded from what a diffusion model predicts at t. All of A and B is 0 at the
start of training but the two gates, which are 1: the model then is PickScore at every t. The text tower is CLIP's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffpref.scorers.clip_towers import VIT_H, VIT_H_REPO, ClipTowers, load_towers
from diffpref.scorers.preprocessing import ShortestSideCrop, normalise
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, fill, read_json, read_state_dict, sha256

REPO = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
RELEASED: Mapping[str, str] = {
    "spm_sd15": "sd-v1-5_step-aware_preference_model.bin",
    "spm_sdxl": "sdxl_step-aware_preference_model.bin",
}
"""Names of the released models and their files in REPO; a model of one's own is `spm=FOLDER`."""
FREQUENCIES = 128
_POSITIONS = "position_ids"


class StepAwareClip(nn.Module):
    """A CLIPModel of transformers with a modulated vision tower. Its state dict has the released names."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        width, layers = clip.config.vision_config.hidden_size, clip.config.vision_config.num_hidden_layers
        self.clip = clip
        self.time_in, self.time_out = nn.Linear(2 * FREQUENCIES, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(layers))
        self.final = nn.Linear(width, 2 * width)
        self.recompute = False
        """Recompute a block's activations in the backward pass."""

    @torch.no_grad()
    def start(self, seed: int) -> StepAwareClip:
        """Give the added layers the weights that training starts with; returns the model itself."""
        generator = torch.Generator().manual_seed(seed)
        for p in (*self.blocks.parameters(), *self.final.parameters(), self.time_in.bias, self.time_out.bias):
            p.zero_()
        for layer in (self.time_in, self.time_out):
            layer.weight.copy_(0.02 * torch.randn(layer.weight.shape, generator=generator))
        for block in self.blocks:
            block.get_parameter("bias").view(6, -1)[[2, 5]] = 1.0  # the gates
        return self

    def image_features(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
        """Normalised pictures (N, 3, S, S) and int64 timesteps (N,) to features (N, D), not of unit length."""
        vision = self.clip.vision_model
        time = F.silu(self.time_out(F.silu(self.time_in(timestep_features(timesteps).to(self.time_in.weight.dtype)))))
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer, modulation in zip(vision.encoder.layers, self.blocks, strict=True):
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(_block, layer, modulation, hidden, time, use_reentrant=False)
            else:
                hidden = _block(layer, modulation, hidden, time)
        shift, scale = self.final(time).chunk(2, -1)
        return self.clip.visual_projection(vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift)


def _block(layer: Any, modulation: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
    """One layer of CLIP's vision tower, modulated by the timestep. hidden: (N, L, W), time: (N, W)."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(time)[:, None].chunk(6, -1)
    seen = layer.layer_norm1(hidden) * (1 + scale_1) + shift_1
    hidden = hidden + gate_1 * layer.self_attn(hidden_states=seen, attention_mask=None)[0]
    return hidden + gate_2 * layer.mlp(layer.layer_norm2(hidden) * (1 + scale_2) + shift_2)


def timestep_features(timesteps: Tensor) -> Tensor:
    """Timesteps (N,) to [cos(t f), sin(t f)], float32 (N, 256), f falling from 1 to about 1e-4."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(FREQUENCIES, dtype=torch.float64) / FREQUENCIES).to(timesteps.device)
    angles = timesteps.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def released_name(name: str) -> str:
    """The name of a weight of StepAwareClip in the released files."""
    part, _, rest = name.partition(".")
    if part == "clip":
        return f"model.{rest}"
    if part in ("time_in", "time_out"):
        return f"model.t_embedder.mlp.{0 if part == 'time_in' else 2}.{rest}"
    if part == "final":
        return f"model.vision_model.adaLN_modulation.1.{rest}"
    number, _, kind = rest.partition(".")
    return f"model.vision_model.encoder.layers.{number}.adaLN_modulation.1.{kind}"


def released_state(model: StepAwareClip) -> dict[str, Tensor]:
    """The weights under their released names."""
    return {released_name(name): value for name, value in model.state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class StepAwareScorer:
    """A step-aware preference model, ready to score estimates of the clean picture; higher is better."""

    name: str
    version: str
    convention: str
    """What the number is."""
    checksum: str
    """SHA-256 of the weight file."""
    model: StepAwareClip = field(repr=False)
    towers: ClipTowers = field(repr=False)
    """CLIP's text tower and tokenizer; its vision tower without the modulation."""

    @property
    def record(self) -> dict[str, str]:
        """What has to stand beside every number of this scorer."""
        return {"name": self.name, "version": self.version, "convention": self.convention, "checksum": self.checksum}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
        """Score (N, 3, H, W) in about [0, 1], each for its prompt, as pictures estimated at `timestep`: float32 (N,).

        Resized so that the shorter side fits, cropped at the centre and clamped to [0, 1] after that.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            return self.of_prepared(normalise(ShortestSideCrop(self.towers.image_size).pixels(pixels.float())), prompts, timestep)

    def of_prepared(self, pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
        """Score normalised pictures (N, 3, S, S): (N,). Differentiable."""
        timesteps = torch.full((len(pixels),), timestep, device=pixels.device)
        images = F.normalize(self.model.image_features(pixels, timesteps), dim=-1)
        return self.towers.scale * (images * self.towers.text_features(prompts)).sum(-1)


def load_step_aware(spec: str, device: torch.device | str = "cpu") -> StepAwareScorer:
    """A step-aware scorer: spm_sd15 or spm_sdxl (released; "name=place" for a local copy), or spm=FOLDER for one of one's own.

    Raises ValueError for other names, and for files that are missing or do not fit.
    """
    name, _, place = spec.partition("=")
    if name not in (*RELEASED, "spm") or (name == "spm" and not place):
        raise ValueError(f"{spec!r} is no step-aware scorer; accepted: {', '.join(RELEASED)}, or spm=FOLDER")
    source = WeightSource(name, place or None, REPO)
    path = source.weights((*([RELEASED[name]] if name in RELEASED else []), "model.safetensors"))
    model = read_step_aware(source, read_state_dict(path), f"{name}: {path}").to(device)
    own = source.beside(["reward_model.json"])
    return StepAwareScorer(
        name=name,
        version=f"own model, step {read_json(own).get('step')}" if own else "released",
        convention="exp(logit_scale) * cosine of the estimated picture at a timestep; bicubic resize, centre crop; float32",
        checksum=sha256(path),
        model=model,
        towers=load_towers(source, model.clip, VIT_H_REPO, device),
    )


def load_spm(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Scorer:
    """A released step-aware model, or a local copy or one's own in its layout, as a scorer of finished pictures: timestep 0."""
    judge = load_step_aware(f"{name}={weights}" if weights else name, device)

    def reward(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return judge.of_prepared(pixels, prompts, 0)

    return Scorer(
        name=name,
        version=judge.version,
        convention="exp(logit_scale) * cosine at timestep 0; Pillow bicubic resize of the shorter side, centre crop; float32",
        checksum=judge.checksum,
        preprocessing=ShortestSideCrop(judge.towers.image_size),
        reward=reward,
        device=torch.device(device),
    )


def read_step_aware(source: WeightSource, state: Mapping[str, Tensor], what: str) -> StepAwareClip:
    """The model of a state dict in the released layout, frozen, float32. `what` is named in errors.

    The sizes are those of the config.json beside the weights, or of CLIP ViT-H/14. Raises ValueError for missing, unexpected and
    misshapen weights, and for position indices other than 0, 1, 2, ...
    """
    from transformers import CLIPConfig, CLIPModel

    beside = source.beside(["config.json"])
    found = read_json(beside) if beside else {}
    with torch.device("meta"):
        model = StepAwareClip(CLIPModel(CLIPConfig.from_dict(found) if "vision_config" in found else CLIPConfig(**VIT_H)))
    for name, value in state.items():
        if name.endswith(_POSITIONS) and not torch.equal(value.flatten(), torch.arange(value.numel())):
            raise ValueError(f"{what}: {name} is not 0, 1, 2, ...; it is another model's file")
    own = {released_name(name): name for name in model.state_dict()}
    if not any("adaLN_modulation" in name for name in state):
        raise ValueError(
            f"{what} has no modulation by the timestep (adaLN_modulation): it is a plain CLIP or PickScore; "
            f"use pickscore={source.place}, or train a step-aware model from it with diffpref train-step-aware-scorer"
        )
    fill(model, {own.get(name, name): value for name, value in state.items()}, what)
    return model
