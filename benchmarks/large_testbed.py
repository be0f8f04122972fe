"""The testbed with a model of about 100 M parameters on pictures of 128 pixels: base model, pairs, and the core rows of the leaderboard.

    python benchmarks/large_testbed.py --folder FOLDER --part base        then pairs, then one row after the other: row-diffusion_dpo ...

The shipped autoencoder serves, because it is convolutional: 128 pixels are 16 x 16 latents. Scenes are the testbed's, drawn twice as fine,
and the true reward reads them at 64 pixels. Each row is trained with true labels and, as its control, with shuffled ones, and judged on the
test prompts with the base model's seeds. One part is one short process, so that all can be continued at any time; the base model's
training ends after --seconds with {"unfinished": ...}, and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTokenizer

from diffpref.evaluation.generate import Images, generate
from diffpref.evaluation.stats import count_wins
from diffpref.locations import asset
from diffpref.models.backbone import load_pipeline
from diffpref.models.lora import LORA_FILE
from diffpref.testbed import train_base
from diffpref.testbed.measure import seeds_for
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.reward import reward
from diffpref.testbed.sampling import GUIDANCE, STEPS
from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.testbed.train_vae import to_signal
from diffpref.testbed.world import IMAGE_SIZE, Scenes, render, sample_scenes
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective

FINE = 2
RATE = 3e-4  # of the base model
SIDE = FINE * IMAGE_SIZE
SAVE_STEPS = 500
ROWS = {
    "sft": ({}, 5e-5),
    "diffusion_dpo": ({"beta": 600.0}, 2e-4),
    "inpo": ({"beta": 600.0}, 2e-4),
    "mapo": ({"snr": 0.5}, 2e-4),
}
"""Method -> its settings and its rate; those of the small testbed with a lower rate, fixed before the first run."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything."""

    channels: tuple[int, ...] = (128, 256, 448)
    depth: int = 2  # transformer blocks per attention, and residual blocks per level
    scenes: int = 40_000
    batch: int = 128
    steps: int = 4000
    pairs: int = 4000
    updates: int = 200
    pairs_per_update: int = 32
    prompts: int = 500


TINY = Budget((32, 64), 1, 24, 4, 3, 12, 2, 2, 6)


def drawn(scenes: Scenes) -> np.ndarray:
    """uint8 (N, 128, 128, 3): each picture as four of the testbed's, shifted by half a pixel, so that every shape stays where it is."""
    fine = np.empty((len(scenes.x), SIDE, SIDE, 3), np.float32)
    for row in range(FINE):
        for column in range(FINE):  # pixel centres at a quarter and three quarters of the coarse ones
            shift = {"x": scenes.x - (column - 0.5) / FINE, "y": scenes.y - (row - 0.5) / FINE}
            fine[:, row::FINE, column::FINE] = render(dataclasses.replace(scenes, **shift))
    return (fine * 255).round().astype(np.uint8)


def coarse(images: Images) -> Images:
    """At the size that the reward reads: means of 2 x 2 pixels."""
    n = len(images)
    return images.reshape(n, IMAGE_SIZE, FINE, IMAGE_SIZE, FINE, 3).astype(np.float32).mean((2, 4)).round().astype(np.uint8)


def new_unet(budget: Budget) -> UNet2DConditionModel:
    """The testbed's layout, wider and deeper: 100 M parameters."""
    levels = len(budget.channels)
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        block_out_channels=budget.channels,
        layers_per_block=budget.depth,
        attention_head_dim=tuple(max(1, c // 64) for c in budget.channels),
        transformer_layers_per_block=budget.depth,
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
        norm_num_groups=16,
    )


@torch.no_grad()
def training_set(tokenizers: list[CLIPTokenizer], budget: Budget, device: torch.device, file: Path) -> train_base.TrainingSet:
    """Latents and token ids of rendered scenes, on the device; kept in the file, because drawing them takes minutes."""
    if file.exists():
        return train_base.TrainingSet(*torch.load(file, weights_only=True, map_location=device))
    vae = vae_of_testbed().to(device)
    rng, latents, captions = np.random.default_rng(8), [], []
    for start in range(0, budget.scenes, 200):
        scenes = sample_scenes(rng, min(200, budget.scenes - start))
        pixels = to_signal(torch.from_numpy(drawn(scenes)).permute(0, 3, 1, 2).to(device))
        latents.append(vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)
        captions += scenes.captions()
    ids = [train_base.tokenize(t, captions).to(device) for t in tokenizers]
    torch.save([torch.cat(latents), *ids], file.with_suffix(".half"))
    file.with_suffix(".half").replace(file)
    return train_base.TrainingSet(torch.cat(latents), *ids)


def vae_of_testbed() -> AutoencoderKL:
    """The shipped autoencoder."""
    return AutoencoderKL.from_pretrained(asset("testbed", "pipeline"), subfolder="vae", torch_dtype=torch.float32)


def part_base(folder: Path, budget: Budget, seconds: float) -> dict[str, Any]:
    """Train UNet and text encoders together from scratch, as the small testbed's are."""
    start, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizers = [write_tokenizer(folder / "vocabulary" / n, pad) for n, pad in (("one", "<|endoftext|>"), ("two", "!"))]
    data = training_set(tokenizers, budget, device, folder / "scenes.pt")
    torch.manual_seed(1)
    networks = train_base.new_networks(len(tokenizers[0]))
    networks.unet = new_unet(budget)
    losses = fit(networks, data, budget, device, folder / "training.pt", start + seconds)
    if len(losses) < budget.steps:
        return {"unfinished": f"{len(losses)} of {budget.steps} steps"}
    pipeline = StableDiffusionXLPipeline(
        vae=vae_of_testbed(),
        text_encoder=networks.text_encoder,
        text_encoder_2=networks.text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=networks.unet,
        scheduler=train_base.new_scheduler(),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder / "model")
    parameters = sum(p.numel() for p in networks.unet.parameters())
    return {"unet_parameters": parameters, "seconds": time.perf_counter() - start, "losses": losses[::50]}


def fit(
    networks: train_base.Networks, data: train_base.TrainingSet, budget: Budget, device: torch.device, file: Path, end: float
) -> list[float]:
    """Train in place and leave the moving average of the weights; the loss of every step that has been taken.

    file: what the next call goes on from, written every SAVE_STEPS steps and when the clock has reached `end`.
    """
    module = networks.module().to(device)
    average = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=budget.steps, pct_start=0.1)
    alphas = train_base.new_scheduler().alphas_cumprod.to(device)
    losses: list[torch.Tensor] = []
    if file.exists():
        kept = torch.load(file, weights_only=True, map_location=device)
        for part, state in ((module, kept["module"]), (optimizer, kept["optimizer"]), (schedule, kept["schedule"])):
            part.load_state_dict(state)
        average, losses = kept["average"], list(kept["losses"])
    for step in range(len(losses), budget.steps):
        torch.manual_seed(step)  # so that a run which was cut off takes the steps of one which was not
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = noise_regression(networks, data, alphas, budget.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(module.parameters()), 1 - min(0.999, (1 + step) / (10 + step)))
        losses.append(loss.detach())
        is_over = time.perf_counter() > end
        if is_over or (step + 1) % SAVE_STEPS == 0 or step + 1 == budget.steps:
            states = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**states, "average": average, "losses": torch.stack(losses)}, file.with_suffix(".half"))
            file.with_suffix(".half").replace(file)
        if is_over:
            break
    with torch.no_grad():
        for p, value in zip(module.parameters(), average, strict=True):
            p.copy_(value)
    return torch.stack(losses).tolist()


def noise_regression(networks: train_base.Networks, data: train_base.TrainingSet, alphas: torch.Tensor, batch: int) -> torch.Tensor:
    """Min-SNR weighted regression of the noise; a tenth of the prompts is zeros, for guidance."""
    x_0 = data.latents[index := torch.randint(len(data.latents), (batch,), device=data.latents.device)]
    embeds, pooled = train_base.encode_text(networks, data.ids[index], data.ids_2[index])
    keep = (torch.rand(batch, device=x_0.device) >= train_base.EMPTY_PROMPT_SHARE).float()
    noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (batch,), device=x_0.device)
    a = alphas[t][:, None, None, None]
    sizes = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], device=x_0.device).float().repeat(batch, 1)
    added = {"text_embeds": pooled * keep[:, None], "time_ids": sizes}
    noisy = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    prediction = networks.unet(noisy, t, embeds * keep[:, None, None], added_cond_kwargs=added).sample
    snr = (a / (1 - a)).flatten()
    weight = snr.clamp(max=train_base.MIN_SNR_GAMMA) / snr
    return (weight * (prediction.float() - noise).square().mean((1, 2, 3))).mean()


def sampled(folder: Path, prompts: list[str], sample: int, lora: Path | None = None) -> Images:
    """Pictures of the base model, or with an adapter, by the testbed's sampling."""
    pipeline = load_pipeline(str(folder / "model"))
    if lora:
        pipeline.load_lora_weights(str(lora), weight_name=LORA_FILE, use_safetensors=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "batch_size": 50}
    return generate(pipeline, prompts, seeds_for(len(prompts), sample), **options)


def part_pairs(folder: Path, budget: Budget) -> dict[str, Any]:
    """Two pictures of the base model per prompt, the true reward's choice between them, and the same pairs with shuffled labels."""
    prompts = draw_prompts("pairs", budget.pairs).texts
    pictures = [sampled(folder, prompts, sample) for sample in (0, 1)]
    scores = np.stack([reward(coarse(images), prompts) for images in pictures])
    first = (scores[0] > scores[1]).astype(float)
    labels = {"true": first, "shuffled": np.random.default_rng(0).permutation(first)}
    encoded = [[jpeg(image) for image in images] for images in pictures]
    for name, label in labels.items():
        (folder / "pairs" / name).mkdir(parents=True, exist_ok=True)
        columns = {"caption": prompts, "jpg_0": encoded[0], "jpg_1": encoded[1], "label_0": label, "label_1": 1 - label}
        pq.write_table(pa.table(columns), folder / "pairs" / name / "train.parquet")
    return {"pairs": len(prompts), "mean_reward": float(scores.mean()), "mean_difference": float(np.abs(scores[0] - scores[1]).mean())}


def jpeg(image: np.ndarray) -> bytes:
    """As the small testbed's pairs are stored."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def part_row(method: str, folder: Path, budget: Budget) -> dict[str, Any]:
    """Win rates over the base model on the test prompts, trained on true and on shuffled labels."""
    settings, rate = ROWS[method]
    prompts = draw_prompts("test", budget.prompts).texts
    base = reward(coarse(sampled(folder, prompts, 0)), prompts)
    found: dict[str, Any] = {"base_reward": float(base.mean())}
    for labels in ("true", "shuffled"):
        out = folder / "runs" / f"{method}-{labels}-{time.time_ns()}"
        config = TrainConfig(
            method=method,
            pretrained_model_name_or_path=str(folder / "model"),
            train_data_dir=str(folder / "pairs" / labels),
            cache_dir=str(folder / "tables"),
            output_dir=str(out),
            resolution=SIDE,
            lora_targets="all",
            learning_rate=rate,
            lr_scheduler="linear",
            lr_warmup_steps=10,
            train_batch_size=budget.pairs_per_update,
            gradient_accumulation_steps=1,
            max_train_steps=budget.updates,
            no_hflip=True,
            cache_latents=True,
            preflight="off",
        )
        align(config, build_objective(method, settings))
        aligned = reward(coarse(sampled(folder, prompts, 0, out)), prompts)
        wins, count = count_wins(base, aligned)
        shutil.rmtree(out)
        found[labels] = {"win_rate": wins / count, "prompts": count, "reward": float(aligned.mean())}
    return found


NAMES = ("base", "pairs", *(f"row-{method}" for method in ROWS))


def main() -> None:
    """Do one part and print its result as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--part", choices=NAMES, required=True)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of the base model's training, before it is kept for the next call"
    )
    parser.add_argument("--tiny", action="store_true", help="a few steps of a few parameters: a test of this program")
    args = parser.parse_args()
    budget = TINY if args.tiny else Budget()
    if args.part == "base":
        found = part_base(args.folder, budget, args.seconds)
    elif args.part == "pairs":
        found = part_pairs(args.folder, budget)
    else:
        found = part_row(args.part.removeprefix("row-"), args.folder, budget)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
