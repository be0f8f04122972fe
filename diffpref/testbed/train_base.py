"""Train the testbed's base model: text encoders and UNet of a small SDXL, jointly and from scratch, on rendered scenes."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpref.testbed.parallel import AVERAGE_EVERY, average_parameters, run_parallel
from diffpref.testbed.tokenizer import MODEL_MAX_LENGTH, write_tokenizer
from diffpref.testbed.train_vae import LATENT_CHANNELS, cosine, to_signal
from diffpref.testbed.world import IMAGE_SIZE, render, sample_scenes

BATCH = 64
LEARNING_RATE = 2e-3
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.98
"""Applied at every averaging of the processes, i.e. every 8 steps."""
EMPTY_PROMPT_SHARE = 0.1
TIME_IDS = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)


@dataclass
class Networks:
    """The parts that are trained together."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection

    def module(self) -> nn.ModuleList:
        return nn.ModuleList([self.unet, self.text_encoder, self.text_encoder_2])


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of SD and SDXL, with spacing that begins at pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def new_networks(vocab_size: int) -> Networks:
    """Random small SDXL networks: 96 text features (32 + 64), pooled 64, UNet of 64 and 128 channels."""
    shared = {
        "vocab_size": vocab_size,
        "num_hidden_layers": 2,
        "max_position_embeddings": MODEL_MAX_LENGTH,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }
    first = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, pad_token_id=vocab_size - 1, **shared)
    second = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, projection_dim=64, num_attention_heads=4, hidden_act="gelu", pad_token_id=0, **shared
    )
    encoders = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    for encoder in encoders:
        nn.init.normal_(encoder.get_input_embeddings().weight, std=0.1)
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
        norm_num_groups=16,
    )
    return Networks(unet, *encoders)


def encode_text(networks: Networks, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (N, L) of both tokenizers to prompt_embeds (N, L, 96) and pooled (N, 64), as the SDXL pipeline does."""
    first = networks.text_encoder(ids, output_hidden_states=True)
    second = networks.text_encoder_2(ids_2, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


@dataclass
class TrainingSet:
    """Latents (N, 8, 8, 8) and token ids (N, L) of rendered scenes."""

    latents: Tensor
    ids: Tensor
    ids_2: Tensor


def make_training_set(vae: AutoencoderKL, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], seed: int, num_images: int) -> TrainingSet:
    """Render `num_images` scenes and encode pictures and captions."""
    rng = np.random.default_rng(seed)
    latents, captions = [], []
    for start in range(0, num_images, 500):
        scenes = sample_scenes(rng, min(500, num_images - start))
        pixels = torch.from_numpy((render(scenes) * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
        with torch.no_grad():
            latents += [vae.encode(to_signal(c)).latent_dist.mode() for c in pixels.split(100)]
        captions += scenes.captions()
    ids = [tokenize(t, captions) for t in tokenizers]
    return TrainingSet(torch.cat(latents), *ids)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Padded token ids (N, L)."""
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=MODEL_MAX_LENGTH, return_tensors="pt").input_ids


def train_base(vae_folder: Path, out: Path, num_steps: int, num_images: int, seed: int, num_processes: int) -> None:
    """Train on `num_images` scenes and save the pipeline as fp16 safetensors to `out`; `num_steps` steps in each process."""
    vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32)
    tokenizers = write_tokenizer(out / "tokenizer", "<|endoftext|>"), write_tokenizer(out / "tokenizer_2", "!")
    data = make_training_set(vae, tokenizers, seed + 7, num_images)
    for tensor in (data.latents, data.ids, data.ids_2):
        tensor.share_memory_()
    run_parallel(_work, num_processes, data, vae_folder, out, num_steps, seed)


def _work(rank: int, num_processes: int, data: TrainingSet, vae_folder: Path, out: Path, num_steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    networks = new_networks(len(CLIPTokenizer.from_pretrained(out / "tokenizer")))
    module = networks.module()
    average = copy.deepcopy(networks)
    scheduler = new_scheduler()
    draws = torch.Generator().manual_seed(seed * 1000 + rank)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    start, recent = time.time(), 0.0
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, num_steps, 100, 0.02)
        loss = _loss(networks, data, scheduler, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += (loss.item() - recent) / (step % 250 + 1)
        if (step + 1) % AVERAGE_EVERY == 0 or step + 1 == num_steps:
            average_parameters(module)
            _update_average(average.module(), module, min(EMA_DECAY, (1 + step / 8) / (10 + step / 8)))
        if rank == 0 and (step + 1) % 250 == 0:
            print(f"unet step {step + 1}/{num_steps} loss {recent:.4f} {time.time() - start:.0f} s", flush=True)
            recent = 0.0
        if rank == 0 and ((step + 1) % 1000 == 0 or step + 1 == num_steps):
            save_pipeline(average, vae_folder, out)


def _loss(networks: Networks, data: TrainingSet, scheduler: DDIMScheduler, draws: torch.Generator) -> Tensor:
    """Noise regression with min-SNR weights on a random batch; some prompts are replaced by zeros for guidance."""
    index = torch.randint(len(data.latents), (BATCH,), generator=draws)
    x_0 = data.latents[index]
    embeds, pooled = encode_text(networks, data.ids[index], data.ids_2[index])
    keep = (torch.rand(BATCH, generator=draws) >= EMPTY_PROMPT_SHARE).float()
    noise = torch.randn(x_0.shape, generator=draws)
    t = torch.randint(0, 1000, (BATCH,), generator=draws)
    added = {"text_embeds": pooled * keep[:, None], "time_ids": torch.tensor(TIME_IDS).float().repeat(BATCH, 1)}
    prediction = networks.unet(scheduler.add_noise(x_0, noise, t), t, embeds * keep[:, None, None], added_cond_kwargs=added).sample
    alpha = scheduler.alphas_cumprod[t]
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return (weight * (prediction - noise).pow(2).mean((1, 2, 3))).mean()


def _update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for a, p in zip(average.parameters(), module.parameters(), strict=True):
            a.lerp_(p, 1 - decay)


def save_pipeline(networks: Networks, vae_folder: Path, out: Path) -> None:
    """Write a complete SDXL pipeline in fp16 to `out`."""
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float16),
        text_encoder=copy.deepcopy(networks.text_encoder).half(),
        text_encoder_2=copy.deepcopy(networks.text_encoder_2).half(),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(out / "tokenizer_2"),
        unet=copy.deepcopy(networks.unet).half(),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(out)
    _classic_keys(out / "text_encoder" / "model.safetensors")


def _classic_keys(path: Path) -> None:
    """Name the text encoder's weights as released checkpoints do: transformers 5 leaves the prefix out, 4 needs it."""
    weights = load_file(path)
    named = {name if name.startswith("text_model.") else f"text_model.{name}": x for name, x in weights.items()}
    save_file(named, path, metadata={"format": "pt"})
