"""An aligned model and its base as a scorer of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffpref.core.types import Conditioning
from diffpref.data.images import prepare_images
from diffpref.inference.checkpoints import Candidate, open_candidate, parse_candidates
from diffpref.models.backbone import Backbone, as_backbone, load_backbone, on_token_ids, text_encoders
from diffpref.scorers.implicit import ImplicitReward, implicit_scorer
from diffpref.scorers.weights import sha256


@dataclass(frozen=True)
class ImplicitScorer:
    """The implicit reward with the contract of a reward model: pictures of any size in, and a record to stand beside the numbers."""

    version: str
    """The aligned model, by the name of its folder or file."""
    convention: str
    checksum: str
    """SHA-256 of the aligned model's weights."""
    side: int
    """Pixels of the squares that pictures are resized to and cut out of the middle of, as in training."""
    score: Callable[[np.ndarray, Sequence[str]], Tensor] = field(repr=False)
    name: str = "implicit"
    batch_size: int = 8

    def __call__(self, images: Sequence[Image.Image] | np.ndarray, prompts: Sequence[str]) -> Tensor:
        """N RGB pictures, or uint8 (N, H, W, 3), and N prompts -> float32 (N,). Raises ValueError for unequal counts."""
        if len(images) != len(prompts):
            raise ValueError(f"{self.name}: {len(images)} images and {len(prompts)} prompts; every image needs its own prompt")
        found = [torch.zeros(0)]
        for start in range(0, len(images), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(images)))
            squares = np.stack([_square(images[i], self.side) for i in rows])
            found.append(self.score(squares, [prompts[i] for i in rows]).float().cpu())
        return torch.cat(found)


def _square(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """uint8 (side, side, 3)."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    pixels, _ = prepare_images([picture], (side, side))
    return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def load_implicit_scorer(
    base: str,
    aligned: str | None = None,
    lora: str | None = None,
    num_draws: int = 10,
    seed: int = 0,
    resolution: int | None = None,
    device: torch.device | str = "cpu",
) -> ImplicitScorer:
    """The implicit reward of an aligned model, or of a LoRA file or folder, relative to its base.

    base: a diffusers folder, a hub id or a single file whose configs can be had. aligned: also a UNet-only folder or state dict.
    resolution: side in pixels, the model's own if None. Raises ValueError unless exactly one of aligned and lora is given, and
    for what cannot be loaded.
    """
    if (aligned is None) == (lora is None):
        raise ValueError(f"aligned is {aligned!r} and lora is {lora!r}; give one of them")
    source = str(aligned or lora)
    candidate = Candidate("policy", lora, "lora") if lora else parse_candidates([f"policy={aligned}"], (1.0,))[0]
    reference, policy = load_backbone(base), as_backbone(open_candidate(base, None, None, candidate), source)
    for backbone in (reference, policy):
        backbone.pipeline.to(device)
        backbone.denoiser.eval()
    modules = [policy.denoiser, reference.denoiser]
    if not same_text_encoders(policy, reference):  # then each encodes the prompts itself
        (policy, modules[0]), (reference, modules[1]) = on_token_ids(policy), on_token_ids(reference)
    predict = [b.predictor(module) for b, module in zip((policy, reference), modules, strict=True)]
    reward = ImplicitReward(predict[0], predict[1], reference.process, seed, num_draws)
    side = resolution or reference.default_resolution

    def encode_images(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return reference.encode_moments(pixels)[:, 0]

    return ImplicitScorer(
        version=Path(source).name,
        convention=f"mean of reference error - policy error over {num_draws} draws of level and noise, seed {seed}, {side} x {side} pixels",
        checksum=weights_checksum(source),
        side=side,
        score=implicit_scorer(reward, encode_images, lambda texts: with_time_ids(reference, texts, side)),
    )


def weights_checksum(source: str) -> str:
    """SHA-256 of a file, or of the weights in a folder; of a pipeline those of its UNet. "hub" for what is not on this machine."""
    path = Path(source)
    if path.is_file():
        return sha256(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth")) if path.is_dir() else []
    return sha256(*files) if files else "hub"


def same_text_encoders(a: Backbone, b: Backbone) -> bool:
    """Whether two models of one family turn prompts into the same conditioning: equal weights."""
    states = [{f"{i}.{n}": x for i, part in enumerate(text_encoders(m)) for n, x in part.state_dict().items()} for m in (a, b)]
    return states[0].keys() == states[1].keys() and all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def with_time_ids(backbone: Backbone, prompts: Sequence[str], side: int) -> Conditioning:
    """Text conditioning (N, 1, ...) of uncropped square pictures of `side` pixels."""
    cond = backbone.encode_prompts(prompts)
    if not backbone.uses_time_ids:
        return cond
    time_ids = torch.tensor([side, side, 0, 0, side, side]).float().expand(len(prompts), 1, 6)
    return replace(cond, time_ids=time_ids)
