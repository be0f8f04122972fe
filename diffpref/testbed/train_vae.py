"""Train the testbed's autoencoder: 64x64 pixels to 8x8 latents with 8 whitened channels."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffpref.testbed.parallel import AVERAGE_EVERY, average_parameters, run_parallel
from diffpref.testbed.world import render, sample_scenes

LATENT_CHANNELS = 8
BATCH = 16
KL_WEIGHT = 2e-5
LEARNING_RATE = 2e-3


def new_vae() -> AutoencoderKL:
    """A random KL autoencoder of factor 8 with 8 latent channels, under a million parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=True,
    )
    with torch.no_grad():  # start with little sampling noise, or the decoder learns to ignore the latents
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    return vae


def render_set(seed: int, num_images: int) -> Tensor:
    """Rendered scenes as uint8 (N, 3, 64, 64), in chunks to bound memory."""
    rng = np.random.default_rng(seed)
    chunks = []
    for start in range(0, num_images, 500):
        images = render(sample_scenes(rng, min(500, num_images - start)))
        chunks.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(chunks)


def to_signal(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def cosine(step: int, num_steps: int, warmup: int, floor: float) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of the image gradients, which keeps outlines sharp."""
    gap = output - target
    edges = gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean()
    return gap.abs().mean() + gap.pow(2).mean() + 0.5 * edges


def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in decibels, decoding the posterior mean of uint8 images."""
    values = []
    with torch.no_grad():
        for chunk in images.split(50):
            x = to_signal(chunk)
            gap = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x
            values.append(-10 * (gap.pow(2).mean((1, 2, 3)) / 4).log10())
    return float(torch.cat(values).mean())


def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold mean and standard deviation per channel into the 1x1 convolutions: the latents get unit variance, the images stay."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_signal(c)).latent_dist.mode() for c in images.split(50)])
        mean, sd = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        into, out = vae.quant_conv, vae.post_quant_conv
        out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
        out.weight *= sd[None, :, None, None]
        half = LATENT_CHANNELS
        into.weight[:half] /= sd[:, None, None, None]
        into.bias[:half] = (into.bias[:half] - mean) / sd
        into.bias[half:] -= 2 * sd.log()


def train_vae(out: Path, num_steps: int, num_images: int, seed: int, num_processes: int) -> None:
    """Train and save to `out`; each of the processes takes `num_steps` steps of `BATCH` images."""
    images = render_set(seed, num_images).share_memory_()
    run_parallel(_work, num_processes, images, out, num_steps, seed)


def _work(rank: int, num_processes: int, images: Tensor, out: Path, num_steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    vae = new_vae()
    draws = torch.Generator().manual_seed(seed * 1000 + rank)
    torch.manual_seed(seed * 1000 + rank)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    held_out = render_set(seed + 1, 200)
    start = time.time()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, num_steps, 50, 0.02)
        index = torch.randint(len(images), (BATCH,), generator=draws)
        x = to_signal(images[index])
        if torch.rand((), generator=draws) < 0.5:
            x = x.flip(3)
        if torch.rand((), generator=draws) < 0.5:
            x = x.flip(2)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            output = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float().pow(2) + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = reconstruction_loss(output.float(), x) + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % AVERAGE_EVERY == 0 or step + 1 == num_steps:
            average_parameters(vae)
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == num_steps):
            print(
                f"vae step {step + 1}/{num_steps} loss {loss.item():.4f} psnr {psnr(vae, held_out):.2f} dB {time.time() - start:.0f} s",
                flush=True,
            )
    if rank == 0:
        whiten(vae, images[:2000])
        vae.half().save_pretrained(out)


def refine_decoder(folder: Path, num_steps: int, num_images: int, seed: int, num_processes: int) -> None:
    """Train the decoder of a finished autoencoder on, towards the least squared error; its latents stay as they are."""
    images = render_set(seed + 2, num_images).share_memory_()
    run_parallel(_refine, num_processes, images, folder, num_steps, seed)


def _refine(rank: int, num_processes: int, images: Tensor, folder: Path, num_steps: int, seed: int) -> None:
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_signal(c)).latent_dist.mode() for c in images.split(50)])
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    draws = torch.Generator().manual_seed(seed * 1000 + 500 + rank)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE / 2, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    held_out = render_set(seed + 1, 200)
    start = time.time()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE / 2 * cosine(step, num_steps, 50, 0.01)
        index = torch.randint(len(images), (BATCH,), generator=draws)
        with torch.autocast("cpu", torch.bfloat16):
            output = vae.decode(latents[index]).sample
        gap = output.float() - to_signal(images[index])
        (4 * gap.pow(2).mean() + 0.1 * gap.abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % AVERAGE_EVERY == 0 or step + 1 == num_steps:
            average_parameters(decoder)
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == num_steps):
            print(f"decoder step {step + 1}/{num_steps} psnr {psnr(vae, held_out):.2f} dB {time.time() - start:.0f} s", flush=True)
    if rank == 0:
        vae.half().save_pretrained(folder)
