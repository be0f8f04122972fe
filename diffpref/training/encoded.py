"""When a run needs neither autoencoder nor text encoders: everything that they would make lies in its latent_cache."""

from __future__ import annotations

from pathlib import Path

import torch

from diffpref.core.types import Conditioning
from diffpref.data.cache import LatentStore
from diffpref.models.family import read_index
from diffpref.training.config import TrainConfig


def encoded_before(config: TrainConfig) -> Conditioning | None:
    """The empty prompt (1, 1, ...) of a run whose pictures and prompts are all stored; None for a run that has to encode something.

    It has to where pictures are drawn for validation, text encoders are trained or changed by a LoRA, and for models that do not lie in a
    folder. Raises ValueError for a folder that is no complete cache.
    """
    source = str(config.pretrained_model_name_or_path)
    changed = config.train_text_encoder or config.start_lora or config.pretrained_vae_model_name_or_path
    if config.latent_cache is None or config.validation_steps or changed or not Path(source).is_dir():
        return None
    store = LatentStore.open(str(config.latent_cache))
    try:
        stored = store.prompt("")
    except ValueError:  # of a cache from before it was always stored
        return None
    return stored.map(torch.zeros_like) if read_index(source, None).get("force_zeros_for_empty_prompt") else stored
