"""The attention kernel of the UNet. torch's own needs nothing; xformers is tried before a run relies on it."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def check_xformers(dtype: torch.dtype) -> None:
    """Run one small forward and backward pass. Raises ValueError, with the remedy, where xformers cannot train.

    diffusers only looks whether the package is there; a build for another torch then fails in the middle of the first step.
    """
    if not torch.cuda.is_available():
        raise ValueError("attention is xformers, which needs a GPU; use attention sdpa")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ValueError(
            f"attention is xformers, which cannot be imported ({error}); install it with pip install diffpref[xformers], or use sdpa"
        ) from error
    query = torch.ones(1, 8, 2, 64, device="cuda", dtype=dtype, requires_grad=True)  # (batch, tokens, heads, width)
    try:
        memory_efficient_attention(query, query, query).sum().backward()
        torch.cuda.synchronize()
    except (NotImplementedError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"attention is xformers, which does not run on this machine with this torch ({reason}); "
            "install the release built for it, or use attention sdpa"
        ) from error


def use_xformers(denoiser: UNet2DConditionModel) -> None:
    """Every attention layer of the UNet through xformers; call `check_xformers` before."""
    denoiser.enable_xformers_memory_efficient_attention()
