"""CLIP score (Hessel et al., 2021, arXiv:2104.08718) in the three conventions in use; they are never comparable.

clip_vith_cos    cos, ViT-H/14 of LAION-2B with the preprocessing of HPS: the "CLIP" column of the Diffusion-DPO paper
clip_vitl_cos    cos, OpenAI's ViT-L/14 with its own preprocessing
clipscore        100 * max(cos, 0), the same model: torchmetrics' convention. The paper's weight 2.5 is not in it
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.scorers.clip_towers import (
    OPEN_CLIP_FILES,
    TRANSFORMERS_FILES,
    VIT_H,
    VIT_H_REPO,
    VIT_L,
    VIT_L_REPO,
    load_clip_model,
    load_towers,
    open_clip_text,
)
from diffpref.scorers.preprocessing import LongestSidePad, ShortestSideCrop
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, sha256


def load_clip_vith(weights: str | None = None, device: torch.device | str = "cpu") -> Scorer:
    """The cosine of ViT-H/14 from its hub repository, a local copy, or a file in either key layout.

    Raises ValueError for files that are missing or do not fit, and without ftfy.
    """
    name = "clip_vith_cos"
    clean = open_clip_text(name)
    source = WeightSource(name, weights, VIT_H_REPO)
    path = source.weights((*TRANSFORMERS_FILES, *OPEN_CLIP_FILES))
    towers = load_towers(source, load_clip_model(source, path, VIT_H), VIT_H_REPO, device, clean)
    return Scorer(
        name=name,
        version="ViT-H-14 laion2B-s32B-b79K",
        convention="cosine; bicubic float resize of the longer side, black padding; float32",
        checksum=sha256(path),
        preprocessing=LongestSidePad(towers.image_size),
        reward=towers.cosine,
        device=torch.device(device),
    )


def load_clip_vitl(weights: str | None = None, device: torch.device | str = "cpu", *, rectified: bool = False) -> Scorer:
    """The cosine of OpenAI's ViT-L/14, or with `rectified` 100 * max(cosine, 0), from the hub, a local copy, or a file.

    Raises ValueError for files that are missing or do not fit.
    """
    name = "clipscore" if rectified else "clip_vitl_cos"
    source = WeightSource(name, weights, VIT_L_REPO)
    path = source.weights(TRANSFORMERS_FILES)
    towers = load_towers(source, load_clip_model(source, path, VIT_L), VIT_L_REPO, device)

    def reward(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = towers.cosine(pixels, prompts)
        return 100 * cosine.clamp(min=0) if rectified else cosine

    formula = "100 * max(cosine, 0)" if rectified else "cosine"
    return Scorer(
        name=name,
        version="openai ViT-L-14",
        convention=f"{formula}; Pillow bicubic resize of the shorter side, centre crop; float32",
        checksum=sha256(path),
        preprocessing=ShortestSideCrop(towers.image_size),
        reward=reward,
        device=torch.device(device),
    )
