"""What the user branch adds to a UNet forward: FLOPs at the real shapes on tensors without memory, CPU time with random weights.

    python benchmarks/user_attention.py [--user_rank 16]         # FLOPs, SD1.5 at 512 and SDXL at 1024 pixels
    python benchmarks/user_attention.py --time sd15 --side 64    # and seconds on this machine

Rows: without a user, with keys and values computed anew (the first step of a sampling run, and every step of training), and with those
that were kept (every other step of a sampling run). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffpref.models.configs import new_part
from diffpref.models.user_attention import UserStates, add_user_attention
from diffpref.models.user_lora import add_user_lora

SIDES = {"sd15": 64, "sdxl": 128}
TOKENS = 4


def inputs(unet: Any, side: int, device: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of a forward pass of one picture."""
    config = unet.config
    x = torch.zeros(1, config.in_channels, side, side, device=device)
    text = torch.zeros(1, 77, config.cross_attention_dim, device=device)
    added = {}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        cond = {"text_embeds": torch.zeros(1, pooled, device=device), "time_ids": torch.zeros(1, 6, device=device)}
        added = {"added_cond_kwargs": cond}
    return (x, torch.full((1,), 500, device=device), text), added


def states(unet: Any, device: str, kept: dict[str, Any] | None) -> dict[str, Any]:
    """The argument that hands TOKENS user tokens to the branch."""
    tokens = torch.ones(1, 1, TOKENS, unet.config.cross_attention_dim, device=device)
    return {"cross_attention_kwargs": {"user": UserStates(tokens, kept=kept)}}


def add_branch(unet: Any, rank: int) -> None:
    """The user branch, and updates of a rank above 0."""
    add_user_attention(unet, unet.config.cross_attention_dim, 0)
    if rank:
        add_user_lora(unet, unet.config.cross_attention_dim, rank, 0)


@torch.no_grad()
def flops(family: str, rank: int) -> dict[str, Any]:
    """FLOPs of a forward pass (two per multiply-add), and what the branch adds, in per cent."""
    unet: Any = new_part(family, "unet", device="meta")
    args, added = inputs(unet, SIDES[family], "meta")

    def count(**user: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            unet(*args, **added, **user)
        return int(counter.get_total_flops())

    base = count()
    weights = sum(p.numel() for p in unet.parameters())
    add_branch(unet, rank)
    unet.to("meta")
    branch = sum(p.numel() for p in unet.parameters()) - weights
    kept: dict[str, Any] = {}
    anew = count(**states(unet, "meta", kept))
    later = count(**states(unet, "meta", kept))
    return {
        "family": family,
        "latent_side": SIDES[family],
        "base_tflop": base / 1e12,
        "added_per_cent": 100 * (anew / base - 1),
        "added_per_cent_kept": 100 * (later / base - 1),
        "weights_added_per_cent": 100 * branch / weights,
    }


@torch.no_grad()
def seconds(family: str, side: int, repeats: int, rank: int) -> dict[str, Any]:
    """CPU seconds of a forward pass, the least of `repeats`, the three kinds in turn."""
    torch.set_num_threads(1)
    unet: Any = new_part(family, "unet").eval()
    add_branch(unet, rank)
    args, added = inputs(unet, side, "cpu")
    kept: dict[str, Any] = {}
    kinds = {"base": {}, "user": states(unet, "cpu", None), "user, kept": states(unet, "cpu", kept)}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats + 1):  # the first round warms up and fills what is kept
        for name, user in kinds.items():
            start = time.process_time()
            unet(*args, **added, **user)
            found[name].append(time.process_time() - start)
    least = {name: min(times[1:]) for name, times in found.items()}
    return {"family": family, "latent_side": side, "cpu_seconds": least} | {
        f"{name}, per cent": 100 * (least[name] / least["base"] - 1) for name in ("user", "user, kept")
    }


def main() -> None:
    """Count, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", choices=tuple(SIDES), help="also measure this family on the CPU")
    parser.add_argument("--side", type=int, default=64, help="latent side of the measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--user_rank", type=int, default=0, help="rank of the updates beside the branch")
    options = parser.parse_args()
    rank = options.user_rank
    result: dict[str, Any] = {"tokens": TOKENS, "user_rank": rank, "flops": [flops(family, rank) for family in SIDES]}
    if options.time:
        result["time"] = seconds(options.time, options.side, options.repeats, rank)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
