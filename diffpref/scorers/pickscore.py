"""PickScore v1 (Kirstain et al., 2023, arXiv:2305.01569): a CLIP ViT-H/14 trained on the choices of Pick-a-Pic users.

    pickscore = exp(logit_scale) * cos(image, text)        about 17 to 24

The softmax of the scores over the images of one prompt is the predicted preference. `pickscore_cos` is the cosine alone,
about 0.2, which some published scripts print under the same name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.scorers.clip_towers import TRANSFORMERS_FILES, VIT_H, VIT_H_REPO, load_clip_model, load_towers
from diffpref.scorers.preprocessing import ShortestSideCrop
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, read_json, sha256

REPO = "yuvalkirstain/PickScore_v1"


def load_pickscore(weights: str | None = None, device: torch.device | str = "cpu", *, scaled: bool = True) -> Scorer:
    """PickScore from its hub repository, a local copy of it, or its model.safetensors; see WeightSource.

    scaled: multiply by exp(logit_scale), as papers quote it. Raises ValueError for files that are missing or do not fit.
    """
    name = "pickscore" if scaled else "pickscore_cos"
    source = WeightSource(name, weights, REPO)
    path = source.weights(TRANSFORMERS_FILES)
    towers = load_towers(source, load_clip_model(source, path, VIT_H), VIT_H_REPO, device)

    def reward(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = towers.cosine(pixels, prompts)
        return towers.scale * cosine if scaled else cosine

    formula = "exp(logit_scale) * cosine" if scaled else "cosine"
    return Scorer(
        name=name,
        version=version_of(source),
        convention=f"{formula}; Pillow bicubic resize of the shorter side, centre crop; float32",
        checksum=sha256(path),
        preprocessing=ShortestSideCrop(towers.image_size),
        reward=reward,
        device=torch.device(device),
    )


def version_of(source: WeightSource) -> str:
    """v1, unless the weights are those of `diffpref train-reward-model`, which leaves reward_model.json beside them."""
    own = source.beside(["reward_model.json"])
    return f"own model, step {read_json(own).get('step')}" if own else "v1"
