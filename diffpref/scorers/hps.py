"""HPSv2 and HPSv2.1 (Wu et al., 2023, arXiv:2306.09341): a CLIP ViT-H/14 trained on ranked generations.

    hps = cos(image, text)        about 0.2 to 0.35, without logit_scale; tables print 100 times that

The picture is resized in floating point so that its longer side fits, and padded with black: nothing is cropped, and a stock
CLIP preprocessing gives other numbers. Whether the resize antialiases changed with torchvision 0.17; numbers published before
may be those of the variants `..._no_antialias`. Differs from the release: transparency is dropped instead of failing, a
picture that needs no resize is padded too, and there is no half precision, whose steps of 2e-4 make ties.
"""

from __future__ import annotations

import torch

from diffpref.scorers.clip_towers import VIT_H, VIT_H_REPO, load_clip_model, load_towers, open_clip_text
from diffpref.scorers.preprocessing import LongestSidePad
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, sha256

REPO = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
NAMES = {"2.0": "hpsv2", "2.1": "hpsv2.1"}


def load_hps(version: str, weights: str | None = None, device: torch.device | str = "cpu", *, antialias: bool = True) -> Scorer:
    """HPS of version "2.0" or "2.1" from its hub repository, a folder with the checkpoint, or the checkpoint itself.

    The tokenizer comes from the hub unless vocab.json and merges.txt of any CLIP lie beside the checkpoint. Raises ValueError
    for files that are missing or do not fit, and without ftfy.
    """
    name = NAMES[version] + ("" if antialias else "_no_antialias")
    clean = open_clip_text(name)
    source = WeightSource(name, weights, REPO)
    path = source.weights([FILES[version]])
    towers = load_towers(source, load_clip_model(source, path, VIT_H), VIT_H_REPO, device, clean)
    resize = "bicubic float resize" + ("" if antialias else " without antialiasing")
    return Scorer(
        name=name,
        version=f"v{version}",
        convention=f"cosine; {resize} of the longer side, black padding; float32",
        checksum=sha256(path),
        preprocessing=LongestSidePad(towers.image_size, antialias),
        reward=towers.cosine,
        device=torch.device(device),
    )
