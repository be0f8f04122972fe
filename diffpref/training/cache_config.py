"""The settings of `diffpref cache` beside those of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What `diffpref cache` takes beside the settings of the run, whose latent_cache is the folder that it makes."""

    stored_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the stored latents and embeddings: fp32 trains exactly as without a cache, the others take half the disk."""
    check_sums: bool = False
    """Read every file of the folder again, and make anew those whose bytes have changed."""
