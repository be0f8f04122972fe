"""The floor of a step of Diffusion-DPO: reference forward, policy forward, backward and optimizer on tensors that are there already.

    python benchmarks/under_clock.py --limit 10 benchmarks/bare_step.py --model FOLDER/model --tune lora

Nothing is read, drawn, encoded, logged or saved. What a training script needs beyond this is its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def inputs(unet: UNet2DConditionModel, pairs: int, resolution: int, device: torch.device) -> dict[str, Tensor]:
    """What the network and the loss need for `pairs` pairs: random, in the shapes of training."""
    c, images, side = unet.config, 2 * pairs, resolution // 8
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    made = {
        "x_t": torch.randn(images, 4, side, side),
        "t": torch.randint(0, 1000, (pairs,)).repeat(2),
        "embeds": torch.randn(images, 77, c.cross_attention_dim),
        "pooled": torch.randn(images, pooled),
        "time_ids": torch.full((images, 6), float(resolution)),
        "noise": torch.randn(images, 4, side, side),
    }
    return {name: x.to(device) for name, x in made.items()}


def errors(unet: UNet2DConditionModel, x: dict[str, Tensor]) -> Tensor:
    """Mean squared error of every picture."""
    added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
    prediction = unet(x["x_t"], x["t"], x["embeds"], added_cond_kwargs=added).sample
    return F.mse_loss(prediction.float(), x["noise"], reduction="none").mean((1, 2, 3))


def main() -> None:
    """Steps without end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="no")
    parser.add_argument("--max_train_steps", type=int, default=10**9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet").to(device).eval()
    reference = None
    if args.tune == "lora":
        unet.requires_grad_(False).to(DTYPES[args.precision])
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=ATTENTION))
        for p in unet.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    else:
        reference = copy.deepcopy(unet).requires_grad_(False)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    batches = [inputs(unet, args.pairs, args.resolution, device) for _ in range(8)]
    autocast = torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "no")
    for x, _ in zip(itertools.cycle(batches), range(args.max_train_steps), strict=False):
        with autocast:
            with torch.no_grad():
                if reference is None:
                    unet.disable_adapters()
                known = errors(reference or unet, x)
            if reference is None:
                unet.enable_adapters()
            better, worse = (errors(unet, x) - known).chunk(2)
        F.softplus(2500 * (better - worse)).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
