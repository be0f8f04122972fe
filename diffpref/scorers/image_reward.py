"""ImageReward v1.0 (Xu et al., 2023, arXiv:2304.05977): BLIP with an affine head, trained on ranked generations.

    image_reward = (head(h) - 0.16717362830052426) / 1.0333394966054072        about -2 to 2

The first 35 tokens of the prompt are read. Differs from the release: float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.scorers.blip_reward import load_blip_reward
from diffpref.scorers.preprocessing import ShortestSideCrop
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, sha256

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw reward over the authors' data."""


def load_image_reward(weights: str | None = None, device: torch.device | str = "cpu") -> Scorer:
    """ImageReward from its hub repository, a folder with ImageReward.pt, or the file itself.

    BERT's vocab.txt is taken from beside it if it is there, else from the hub. Raises ValueError for files that are missing or
    do not fit.
    """
    source = WeightSource("image_reward", weights, REPO)
    path = source.weights([FILE, "model.safetensors"])
    blip = load_blip_reward(source, path, max_length=35, device=device, gelu=False)

    def reward(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return (blip.reward(pixels, prompts) - MEAN) / STD

    return Scorer(
        name="image_reward",
        version="v1.0",
        convention="standardised reward; Pillow bicubic resize of the shorter side, centre crop; 35 tokens; float32",
        checksum=sha256(path),
        preprocessing=ShortestSideCrop(blip.image_size, torchvision=True),
        reward=reward,
        device=torch.device(device),
    )
