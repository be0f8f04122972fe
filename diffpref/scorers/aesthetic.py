"""LAION's aesthetic predictor v2 (sac+logos+ava1, linear MSE): CLIP ViT-L/14 image features and an affine head.

    aesthetic = head(image feature of unit length)        about 4 to 7 of 10; the prompt is ignored

The head is five linear layers without activations between them. The original runs CLIP in half precision on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.scorers.clip_towers import TRANSFORMERS_FILES, VIT_L, VIT_L_REPO, image_features, load_clip_model
from diffpref.scorers.preprocessing import ShortestSideCrop
from diffpref.scorers.reward_head import load_head
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, read_state_dict, sha256, under

FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
REPO = "trl-lib/ddpo-aesthetic-predictor"
"""A copy of the head on the hub, under the second file name."""
HOMEPAGE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"


def load_aesthetic(weights: str | None = None, device: torch.device | str = "cpu") -> Scorer:
    """The aesthetic predictor from the hub, from a folder with the head, or from the head's file.

    CLIP's model.safetensors is taken from beside the head if it is there, else from the hub. Raises ValueError for files that
    are missing or do not fit.
    """
    source = WeightSource("aesthetic", weights, REPO, HOMEPAGE)
    path = source.weights(FILES)
    head = load_head(under(read_state_dict(path), "layers."), f"aesthetic: {path}").to(device)
    clip_path = source.companion(TRANSFORMERS_FILES, VIT_L_REPO)
    clip = load_clip_model(source, clip_path, VIT_L).to(device)

    def reward(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return head(image_features(clip, pixels))[:, 0]

    return Scorer(
        name="aesthetic",
        version="v2 sac+logos+ava1-l14-linearMSE",
        convention="affine head on the unit CLIP ViT-L/14 image feature; Pillow bicubic resize of the shorter side, centre crop; float32",
        checksum=sha256(path, clip_path),
        preprocessing=ShortestSideCrop(clip.config.vision_config.image_size, torchvision=True),
        reward=reward,
        device=torch.device(device),
        uses_prompts=False,
    )
