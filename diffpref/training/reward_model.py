"""A CLIP as a reward model in training: new or from released weights, its scores, and the folder that it is saved to.

    score = exp(logit_scale) cos(image, text)

The folder has PickScore's layout (config.json, model.safetensors, the tokenizer, preprocessor_config.json), so that the scorer
`pickscore=FOLDER` and transformers' CLIPModel and AutoProcessor load it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpref.scorers.clip_towers import TRANSFORMERS_FILES, VIT_H, VIT_H_REPO, ClipTowers, load_clip_model, load_towers
from diffpref.scorers.weights import WeightSource, read_json
from diffpref.training.reward_config import RewardModelConfig

_WEIGHTS = "model.safetensors"
_SHARD = "20GB"  # one file, as scorers expect it


class RewardModel(nn.Module):
    """The towers as one module; calling it scores pairs."""

    def __init__(self, towers: ClipTowers) -> None:
        super().__init__()
        self.clip = towers.model
        self.towers = towers

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Normalised pixels (G, K, 3, S, S) and G prompts to scaled scores (G, K) in float32, with gradients."""
        texts = self.clip.text_projection(self.clip.text_model(input_ids=self.towers.token_ids(prompts, "longest")).pooler_output)
        images = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels.flatten(0, 1)).pooler_output)
        # Under autocast the towers answer in half precision, in which cosines of good and bad images would often be equal.
        images = F.normalize(images.float(), dim=-1).unflatten(0, pixels.shape[:2])
        return self.towers.scale * (images * F.normalize(texts.float(), dim=-1)[:, None]).sum(-1)

    def save(self, folder: Path, dtype: str) -> None:
        """Write the scorer into `folder`, see `save_reward_model`."""
        save_reward_model(self.towers, folder, dtype)


def load_reward_model(config: RewardModelConfig, device: torch.device | str) -> RewardModel:
    """The model that training starts from, float32, all weights trainable. Raises ValueError for files that are missing or unfit."""
    if config.clip_config is None:
        source = WeightSource("pretrained_model_name_or_path", config.pretrained_model_name_or_path, None)
        model = load_clip_model(source, source.weights(TRANSFORMERS_FILES), VIT_H)
    else:
        source = WeightSource("tokenizer_name", config.tokenizer_name, None)
        model = new_clip_model(Path(config.clip_config), config.seed)
    towers = load_towers(source, model, VIT_H_REPO, device)
    towers.model.requires_grad_(True).train()
    if config.gradient_checkpointing:
        towers.model.gradient_checkpointing_enable()
    return RewardModel(towers)


def new_clip_model(config_file: Path, seed: int) -> Any:
    """A CLIPModel of the size in `config_file` with random weights. Raises ValueError for a file that describes none."""
    from transformers import CLIPConfig, CLIPModel

    if not config_file.is_file():
        raise ValueError(f"clip_config {str(config_file)!r} is not a file; give the config.json of a CLIPModel")
    found = read_json(config_file)
    if "vision_config" not in found or "text_config" not in found:
        raise ValueError(f"clip_config {str(config_file)!r} has no vision_config or no text_config; give the config.json of a CLIPModel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig.from_dict(found)).float()


def save_reward_model(towers: ClipTowers, folder: Path, dtype: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the scorer into `folder`, complete or not at all; the files that are there already are replaced.

    weights: what model.safetensors holds in place of the towers.
    """
    hidden = folder / f".tmp-export-{os.getpid()}"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        copy.deepcopy(towers.model).to("cpu", getattr(torch, dtype)).save_pretrained(hidden, max_shard_size=_SHARD)
        if weights is not None:
            save_file({name: x.detach().to("cpu", getattr(torch, dtype)).contiguous() for name, x in weights.items()}, hidden / _WEIGHTS)
        towers.tokenizer.save_pretrained(hidden)
        towers.tokenizer.backend_tokenizer.model.save(str(hidden))  # vocab.json and merges.txt, for transformers before version 5
        (hidden / "preprocessor_config.json").write_text(json.dumps(preprocessor(towers.image_size), indent=2))
        for part in sorted(hidden.iterdir(), key=lambda p: p.name == _WEIGHTS):
            part.replace(folder / part.name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def preprocessor(size: int) -> dict[str, Any]:
    """How the scorer prepares images, in the words of transformers' CLIPImageProcessor: resize, crop the centre, normalise."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
