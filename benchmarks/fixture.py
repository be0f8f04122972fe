"""Pipelines of random weights in the SDXL layout, and pairs of pictures, from fixed seeds: what the benchmarks train.

    python benchmarks/fixture.py --folder FOLDER --size mid --pairs 200

tiny is for tests. mid has 97 M parameters in the UNet and an autoencoder that costs about as large a share of a step as SDXL's does.
deep has SDXL's numbers of transformer layers and widths of text, which some trainers have written into their code, in narrow layers.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFilter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.training.run_folder import write_json

WORDS = ("red", "blue", "green", "small", "large", "old", "new", "city", "forest", "river", "cat", "dog", "house", "car", "bridge", "night")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "blocks": (32, 64, 64),
        "unet_layers": 1,
        "depth": (1, 1, 1),
        "heads": (2, 4, 4),
        "text": (32, 32),
        "text_layers": (2, 2),
        "vae": (8, 16, 16, 16),
        "time": 32,
        "tokens": 77,
    },
    "mid": {
        "blocks": (128, 256, 512),
        "unet_layers": 2,
        "depth": (1, 1, 1),
        "heads": (2, 4, 8),
        "text": (128, 128),
        "text_layers": (4, 4),
        "vae": (56, 104, 104, 104),
        "time": 32,
        "tokens": 77,
    },
    "deep": {
        "blocks": (64, 128, 256),
        "unet_layers": 2,
        "depth": (1, 2, 10),
        "heads": (1, 2, 4),
        "text": (768, 1280),
        "text_layers": (12, 2),
        "vae": (56, 104, 104, 104),
        "time": 256,
        "tokens": 77,
    },
}


def new_unet(size: str) -> UNet2DConditionModel:
    """The network that is trained, of three levels, two of them with attention."""
    s = SIZES[size]
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=s["blocks"],
        layers_per_block=s["unet_layers"],
        cross_attention_dim=sum(s["text"]),
        attention_head_dim=list(s["heads"]),
        transformer_layers_per_block=list(s["depth"]),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=s["time"],
        projection_class_embeddings_input_dim=6 * s["time"] + s["text"][1],
    )


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder for the small vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_model(folder: Path, size: str) -> None:
    """A complete pipeline in diffusers' layout."""
    s = SIZES[size]
    tokenizers = []
    for name, pad in (("one", "<|endoftext|>"), ("two", "!")):
        write_tokenizer(folder / "vocabulary" / name, pad)
        tokenizers.append(CLIPTokenizer.from_pretrained(folder / "vocabulary" / name, model_max_length=s["tokens"], pad_token=pad))
    torch.manual_seed(0)
    first, second = (text_config(*parts) for parts in zip(tokenizers, s["text"], s["text_layers"], strict=True))
    vae = AutoencoderKL(
        block_out_channels=s["vae"],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    StableDiffusionXLPipeline(
        unet=new_unet(size),
        vae=vae,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type="epsilon", steps_offset=1
        ),
    ).save_pretrained(folder / "model")


def picture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of soft colours and discs, side x side pixels."""
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(coarse)
    for _ in range(4):
        x, y, r = (int(v) for v in rng.integers(0, side, 3))
        draw.ellipse([x, y, x + r // 2 + 4, y + r // 2 + 4], fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    buffer = io.BytesIO()
    coarse.filter(ImageFilter.GaussianBlur(0.7)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_pairs(folder: Path, pairs: int, side: int) -> None:
    """Pairs with the columns of Pick-a-Pic v2 and no ties; also the better pictures alone, with captions beside them."""
    rng = np.random.default_rng(0)
    for name in ("pickapic", "better"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    labels = rng.integers(0, 2, pairs)
    pictures = {name: [picture(rng, side) for _ in range(pairs)] for name in ("jpg_0", "jpg_1")}
    captions = [" ".join(rng.choice(WORDS, 8)) for _ in range(pairs)]
    columns: dict[str, Any] = {
        **pictures,
        "label_0": [float(x) for x in labels],
        "label_1": [float(1 - x) for x in labels],
        "caption": captions,
        "model_0": ["m0"] * pairs,
        "model_1": ["m1"] * pairs,
        "are_different": [True] * pairs,
        "has_label": [True] * pairs,
    }
    pq.write_table(pa.table(columns), folder / "pickapic" / "train-00000-of-00001.parquet", row_group_size=50)
    for i, (label, caption) in enumerate(zip(labels, captions, strict=True)):
        (folder / "better" / f"{i:05d}.jpg").write_bytes(pictures["jpg_0" if label else "jpg_1"][i])
        (folder / "better" / f"{i:05d}.txt").write_text(caption)


def make(folder: Path, size: str, pairs: int, side: int) -> dict[str, Any]:
    """Write what is not there yet; facts of the fixture with a digest of its files."""
    if not (folder / "facts.json").exists():
        write_model(folder, size)
        write_pairs(folder, pairs, side)
        digest = hashlib.sha256()
        for path in sorted((folder / "model").rglob("*.safetensors")) + sorted((folder / "pickapic").iterdir()):
            digest.update(path.read_bytes())
        with torch.device("meta"):
            parameters = sum(p.numel() for p in new_unet(size).parameters())
        facts = {"size": size, "pairs": pairs, "side": side, "unet_parameters": parameters, "sha256": digest.hexdigest()}
        write_json(folder / "facts.json", facts)
    return json.loads((folder / "facts.json").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    print(json.dumps(make(args.folder, args.size, args.pairs, args.side)))
