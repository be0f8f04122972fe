"""CycleReward (Bahng et al., 2025, arXiv:2506.02095): BLIP with a GELU head, trained on cycle consistency instead of people.

    cycle_reward = head(h)        unbounded, only comparable within a prompt

Three releases: combo, trained on both directions and recommended by the authors, t2i (text to image) and i2t. The first 128
tokens of the prompt are read.
"""

from __future__ import annotations

import torch

from diffpref.scorers.blip_reward import load_blip_reward
from diffpref.scorers.preprocessing import ShortestSideCrop
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, sha256

HOMEPAGE = "https://github.com/hjbahng/cyclereward/releases/tag/v1.0.0"
FILES = {"combo": "CycleReward-Combo.pth", "t2i": "CycleReward-T2I.pth", "i2t": "CycleReward-I2T.pth"}


def load_cycle_reward(release: str, weights: str | None = None, device: torch.device | str = "cpu") -> Scorer:
    """CycleReward "combo", "t2i" or "i2t" from a folder with the released file, the file itself, or a conversion on the hub.

    BERT's vocab.txt is taken from beside it if it is there, else from the hub. Raises ValueError for files that are missing or
    do not fit; the released files are not on the hub.
    """
    name = "cycle_reward" if release == "combo" else f"cycle_reward_{release}"
    source = WeightSource(name, weights, None, HOMEPAGE)
    path = source.weights([FILES[release], "model.safetensors"])
    blip = load_blip_reward(source, path, max_length=128, device=device, gelu=True)
    return Scorer(
        name=name,
        version=f"{release} v1.0.0",
        convention="raw reward; Pillow bicubic resize of the shorter side, centre crop; 128 tokens; float32",
        checksum=sha256(path),
        preprocessing=ShortestSideCrop(blip.image_size, torchvision=True),
        reward=blip.reward,
        device=torch.device(device),
    )
