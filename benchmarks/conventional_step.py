"""Diffusion-DPO as it is usually written, stated again in one page: everything is computed in every step.

    python benchmarks/under_clock.py --limit 10 benchmarks/conventional_step.py --model FOLDER/model --pairs_file FILE.parquet

Both pictures are decoded and encoded by the autoencoder, the prompt by both text encoders, activations are recomputed in the backward
pass, and four numbers are fetched from the device per micro-batch.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from bare_step import ATTENTION, DTYPES, errors
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor


def pixels(data: bytes, side: int, mirrored: bool) -> Tensor:
    """A picture as (3, side, side) in [-1, 1]."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture = picture.resize((side, side), Image.Resampling.BILINEAR) if picture.size != (side, side) else picture
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    return x.flip(-1) if mirrored else x


def batches(path: Path, pairs: int, side: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Without end: pictures (2 pairs, 3, side, side), the better ones first, and their prompts."""
    rows = pq.read_table(path).to_pylist()
    for start in itertools.count(0, pairs):
        chosen = [rows[i % len(rows)] for i in range(start, start + pairs)]
        better, worse = [], []
        for row in chosen:
            order = ("jpg_0", "jpg_1") if row["label_0"] == 1 else ("jpg_1", "jpg_0")
            mirrored = random.random() < 0.5
            for into, column in zip((better, worse), order, strict=True):
                into.append(pixels(row[column], side, mirrored))
        yield torch.stack(better + worse), [row["caption"] for row in chosen]


@torch.no_grad()
def prepared(pipeline: Any, pictures: Tensor, prompts: list[str], side: int) -> dict[str, Tensor]:
    """Latents, noise and text of one micro-batch, all computed now."""
    device = pipeline.unet.device
    latents = pipeline.vae.encode(pictures.to(device)).latent_dist.sample() * pipeline.vae.config.scaling_factor
    noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
    t = torch.randint(0, 1000, (len(latents) // 2,), device=device).repeat(2)
    hidden = []
    for tokenizer, encoder in ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)):
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out = encoder(ids.to(device), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
    return {
        "x_t": pipeline.scheduler.add_noise(latents, noise, t),
        "t": t,
        "embeds": torch.cat(hidden, -1).repeat(2, 1, 1),
        "pooled": out[0].repeat(2, 1),
        "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * len(latents), device=device).float(),
        "noise": noise,
    }


def main() -> None:
    """Steps without end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs_file", type=Path, required=True)
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="no", help="of the networks but the autoencoder, as is usual")
    parser.add_argument("--max_train_steps", type=int, default=10**9)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.precision]
    pipeline.vae.requires_grad_(False)
    for part in (pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False).to(dtype)
    unet, reference = pipeline.unet, None
    if args.tune == "lora":
        unet.requires_grad_(False).to(dtype)
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=ATTENTION))
        for p in unet.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    else:
        reference = copy.deepcopy(unet).requires_grad_(False)
    unet.enable_gradient_checkpointing()
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    autocast = torch.autocast(unet.device.type, dtype, enabled=args.precision != "no")
    for _, (pictures, prompts) in zip(range(args.max_train_steps), batches(args.pairs_file, args.pairs, args.resolution), strict=False):
        x = prepared(pipeline, pictures, prompts, args.resolution)
        with autocast:
            own = errors(unet, x)
        with torch.no_grad(), autocast:
            if reference is None:
                unet.disable_adapters()
            known = errors(reference or unet, x)
            if reference is None:
                unet.enable_adapters()
        better, worse = (own - known).chunk(2)
        loss = -F.logsigmoid(-2500 * (better - worse)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logged = (loss.item(), own.mean().item(), known.mean().item(), (better < worse).float().mean().item())
        assert all(np.isfinite(logged))


if __name__ == "__main__":
    main()
