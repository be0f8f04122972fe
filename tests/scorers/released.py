"""Every scorer as a small model with random weights, saved under the file names and in the key layout of its release."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpref.testbed.tokenizer import write_tokenizer

CLIP_WIDTHS = {"vision": 40, "text": 32, "projection": 24}
"""Vision heads are 20 wide and text heads 16, so that a confusion of the two shows."""
IMAGE_SIZE, LAYERS = 28, 2
MPS_LENGTH = 160
"""Tokens of MPS's text tower; longer than its condition, as in the release, so that its padding takes part."""
CLIP_HEADS, BLIP_HEADS = 2, (2, 3)
"""Of vision and text tower; BLIP's are 64 wide."""
BLIP_SIDE = 32
BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "green", "circle", "square", "photo", "on", "##s", "&")


def random_tensors(shapes: dict[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights of about unit effect: norms near 1, matrices scaled by their width."""
    maker = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(tuple(shape), generator=maker)
        is_norm = len(shape) == 1 and name.endswith("weight")
        made[name] = 1 + 0.2 * value if is_norm else value * (0.3 if len(shape) < 2 else 1.2 / np.sqrt(np.prod(shape[1:])))
    return made


def open_clip_state(vocabulary: int, length: int, seed: int = 0, side: int = IMAGE_SIZE) -> dict[str, Tensor]:
    """A CLIP in open_clip's key layout."""
    vision, text, projection = CLIP_WIDTHS.values()
    patches = (side // 14) ** 2
    shapes: dict[str, Sequence[int]] = {
        "positional_embedding": (length, text),
        "text_projection": (text, projection),
        "token_embedding.weight": (vocabulary, text),
        "ln_final.weight": (text,),
        "ln_final.bias": (text,),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (patches + 1, vision),
        "visual.proj": (vision, projection),
        "visual.conv1.weight": (vision, 3, 14, 14),
    }
    shapes |= {f"visual.{n}.{k}": (vision,) for n in ("ln_pre", "ln_post") for k in ("weight", "bias")}
    for prefix, width in (("visual.", vision), ("", text)):
        for i in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{i}"
            shapes |= {f"{block}.{n}.{k}": (width,) for n in ("ln_1", "ln_2") for k in ("weight", "bias")}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for name, rows, columns in (("attn.out_proj", 1, 1), ("mlp.c_fc", 2, 1), ("mlp.c_proj", 1, 2)):
                shapes |= {f"{block}.{name}.weight": (rows * width, columns * width), f"{block}.{name}.bias": (rows * width,)}
    return random_tensors(shapes, seed) | {"logit_scale": torch.tensor(3.0)}


def clip_config(vocabulary: int, length: int, act: str, side: int = IMAGE_SIZE) -> dict[str, Any]:
    """The config.json that describes it."""
    vision, text, projection = CLIP_WIDTHS.values()
    shared = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_act": act, "projection_dim": projection}
    return {
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {
            **shared,
            **{"hidden_size": text, "intermediate_size": 2 * text, "vocab_size": vocabulary, "max_position_embeddings": length},
            **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        },
        "vision_config": {**shared, "hidden_size": vision, "intermediate_size": 2 * vision, "image_size": side, "patch_size": 14},
    }


def hf_state(open_clip: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in transformers' layout, with the position indices that old releases saved."""
    text, vision = "text_model", "vision_model"
    made = {
        "logit_scale": open_clip["logit_scale"],
        "text_projection.weight": open_clip["text_projection"].T,
        "visual_projection.weight": open_clip["visual.proj"].T,
        f"{text}.embeddings.position_embedding.weight": open_clip["positional_embedding"],
        f"{text}.embeddings.token_embedding.weight": open_clip["token_embedding.weight"],
        f"{text}.embeddings.position_ids": torch.arange(len(open_clip["positional_embedding"]))[None],
        f"{vision}.embeddings.class_embedding": open_clip["visual.class_embedding"],
        f"{vision}.embeddings.position_embedding.weight": open_clip["visual.positional_embedding"],
        f"{vision}.embeddings.patch_embedding.weight": open_clip["visual.conv1.weight"],
    }
    for kind in ("weight", "bias"):
        made[f"{text}.final_layer_norm.{kind}"] = open_clip[f"ln_final.{kind}"]
        made[f"{vision}.pre_layrnorm.{kind}"] = open_clip[f"visual.ln_pre.{kind}"]
        made[f"{vision}.post_layernorm.{kind}"] = open_clip[f"visual.ln_post.{kind}"]
        for ours, theirs in ((text, "transformer"), (vision, "visual.transformer")):
            for i in range(LAYERS):
                here, there = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
                made[f"{here}.layer_norm1.{kind}"] = open_clip[f"{there}.ln_1.{kind}"]
                made[f"{here}.layer_norm2.{kind}"] = open_clip[f"{there}.ln_2.{kind}"]
                made[f"{here}.self_attn.out_proj.{kind}"] = open_clip[f"{there}.attn.out_proj.{kind}"]
                made[f"{here}.mlp.fc1.{kind}"] = open_clip[f"{there}.mlp.c_fc.{kind}"]
                made[f"{here}.mlp.fc2.{kind}"] = open_clip[f"{there}.mlp.c_proj.{kind}"]
                fused = open_clip[f"{there}.attn.in_proj_{kind}"]
                width = len(fused) // 3
                for part, rows in (("q", 0), ("k", 1), ("v", 2)):
                    made[f"{here}.self_attn.{part}_proj.{kind}"] = fused[rows * width : (rows + 1) * width]
    return {name: value.contiguous().clone() for name, value in made.items()}


def blip_state(seed: int, positions: Sequence[int]) -> dict[str, Tensor]:
    """A BLIP reward model in the layout of ImageReward, its head's linear layers at `positions`."""
    vision, text = (64 * heads for heads in BLIP_HEADS)
    v, t = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, Sequence[int]] = {
        f"{v}.cls_token": (1, 1, vision),
        f"{v}.pos_embed": (1, (BLIP_SIDE // 16) ** 2 + 1, vision),
        f"{v}.patch_embed.proj.weight": (vision, 3, 16, 16),
        f"{v}.patch_embed.proj.bias": (vision,),
        f"{v}.norm.weight": (vision,),
        f"{v}.norm.bias": (vision,),
        f"{t}.embeddings.word_embeddings.weight": (len(BERT_WORDS) + 2, text),
        f"{t}.embeddings.position_embeddings.weight": (130, text),
        f"{t}.embeddings.LayerNorm.weight": (text,),
        f"{t}.embeddings.LayerNorm.bias": (text,),
        "blip.vision_proj.weight": (8, vision),
        "blip.text_proj.weight": (8, text),
    }
    for i in range(LAYERS):
        blocks = {"attn.qkv": (3 * vision, vision), "attn.proj": (vision, vision)}
        blocks |= {"mlp.fc1": (2 * vision, vision), "mlp.fc2": (vision, 2 * vision)}
        shapes |= {f"{v}.blocks.{i}.{n}.{k}": (vision,) for n in ("norm1", "norm2") for k in ("weight", "bias")}
        shapes |= {f"{v}.blocks.{i}.{n}.weight": shape for n, shape in blocks.items()}
        shapes |= {f"{v}.blocks.{i}.{n}.bias": shape[:1] for n, shape in blocks.items()}
        layer = f"{t}.encoder.layer.{i}"
        linears = {"intermediate.dense": (2 * text, text), "output.dense": (text, 2 * text)}
        for part, source in (("attention", text), ("crossattention", vision)):
            linears |= {f"{part}.self.query": (text, text), f"{part}.output.dense": (text, text)}
            linears |= {f"{part}.self.{kind}": (text, source) for kind in ("key", "value")}
            shapes |= {f"{layer}.{part}.output.LayerNorm.{k}": (text,) for k in ("weight", "bias")}
        shapes |= {f"{layer}.output.LayerNorm.{k}": (text,) for k in ("weight", "bias")}
        shapes |= {f"{layer}.{n}.weight": shape for n, shape in linears.items()}
        shapes |= {f"{layer}.{n}.bias": shape[:1] for n, shape in linears.items()}
    state = random_tensors(shapes, seed) | {f"{t}.embeddings.position_ids": torch.arange(130)[None]}
    return state | head_state("mlp.layers.", text, positions, seed)


def head_state(prefix: str, width: int, positions: Sequence[int], seed: int) -> dict[str, Tensor]:
    """A reward head."""
    widths = (width, 1024, 128, 64, 16, 1)
    shapes = {f"{prefix}{p}.weight": (widths[i + 1], widths[i]) for i, p in enumerate(positions)}
    return random_tensors(shapes, seed + 1) | {f"{prefix}{p}.bias": torch.full((widths[i + 1],), 0.1) for i, p in enumerate(positions)}


def mps_clip_state(vocabulary: int, length: int) -> dict[str, Tensor]:
    """The CLIP in it, in open_clip's layout.

    Text features lie near a line, the tokens of the condition at one end and whole words at the other, so that words are
    hidden from the image.
    """
    state = open_clip_state(vocabulary, length, seed=4)
    state["text_projection"][:, 1:] *= 0.1
    end = 8 * state["text_projection"][:, 0] / state["text_projection"][:, 0].norm()
    words = torch.zeros(vocabulary, 1, dtype=torch.bool)
    words[[545, 548, 554, 555, 578, 587, 603, 607]] = True  # background, blue, cir, circle, green, large, red, square
    state["token_embedding.weight"] += torch.where(words, -end, end)
    return state


def mps_state(vocabulary: int, length: int) -> dict[str, Tensor]:
    """MPS in the layout of its module, with the prefix and the constants that a conversion keeps. Heads are 8 wide."""
    width, inner, head = CLIP_WIDTHS["projection"], 32, 8
    shapes: dict[str, Sequence[int]] = {}
    for i in range(LAYERS):
        first, second = f"layers.{i}.0.fn", f"layers.{i}.1.fn"
        shapes |= {f"{first}.norm.weight": (width,), f"{second}.norm.weight": (width,)}
        shapes |= {f"{first}.to_q.weight": (inner, width), f"{first}.to_kv.weight": (2 * head, width)}
        shapes |= {f"{first}.to_out.weight": (width, inner), f"{first}.ff.0.weight": (8 * width, width)}
        shapes |= {f"{first}.ff.2.weight": (width, 4 * width), f"{second}.ff_out.1.weight": (width, 4 * width)}
        shapes |= {
            f"{second}.fused_attn_ff_proj.weight": (inner + 2 * head + 8 * width, width),
            f"{second}.attn_out.weight": (width, inner),
        }
    cross = random_tensors(shapes, 5)
    cross |= {f"layers.{i}.{part}.fn.norm.bias": torch.zeros(width) for i in range(LAYERS) for part in (0, 1)}
    cross |= {f"layers.{i}.1.fn.rotary_emb.inv_freq": 10000 ** (-torch.arange(0, head, 2) / head) for i in range(LAYERS)}
    clip = hf_state(mps_clip_state(vocabulary, length))
    return {f"mps.model.{n}": v for n, v in clip.items()} | {f"mps.cross_model.{n}": v for n, v in cross.items()}


def spm_state(vocabulary: int, length: int) -> dict[str, Tensor]:
    """A step-aware preference model: the CLIP of PickScore, and layers that modulate its vision tower by the timestep."""
    width, vision = CLIP_WIDTHS["vision"], "model.vision_model"
    shapes: dict[str, Sequence[int]] = {"model.t_embedder.mlp.0.weight": (width, 256), "model.t_embedder.mlp.2.weight": (width, width)}
    shapes |= {f"{vision}.encoder.layers.{i}.adaLN_modulation.1.weight": (6 * width, width) for i in range(LAYERS)}
    shapes[f"{vision}.adaLN_modulation.1.weight"] = (2 * width, width)
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in list(shapes.items())}
    clip = hf_state(open_clip_state(vocabulary, length, seed=8))
    return {f"model.{name}": value for name, value in clip.items()} | random_tensors(shapes, 14)


def write_released(name: str, folder: Path) -> Path:
    """Save the files of scorer `name` to `folder` and return it. Weights are seeded by the scorer."""
    folder.mkdir(parents=True)
    if name == "image_reward" or name.startswith("cycle_reward"):
        (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))
        cycle_file = {"": "Combo", "_t2i": "T2I", "_i2t": "I2T"}.get(name.removeprefix("cycle_reward"))
        state = blip_state(1, (0, 2, 4, 6, 7)) if name == "image_reward" else blip_state(2, (0, 2, 4, 6, 8))
        torch.save(state, folder / ("ImageReward.pt" if name == "image_reward" else f"CycleReward-{cycle_file}.pth"))
        return folder
    tokenizer = write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    for file in ("vocab.json", "merges.txt"):  # what the hub repositories hold; the rest is written by newer libraries
        shutil.move(folder / "tokenizer" / file, folder / file)
    shutil.rmtree(folder / "tokenizer")
    size = (len(tokenizer), tokenizer.model_max_length)
    by_openai = name in ("clip_vitl_cos", "clipscore", "aesthetic")
    config = clip_config(*size, "quick_gelu" if by_openai else "gelu")
    if name == "mps":
        config["text_config"]["max_position_embeddings"] = MPS_LENGTH
    (folder / "config.json").write_text(json.dumps(config))
    if name == "mps":
        save_file(mps_state(len(tokenizer), MPS_LENGTH), folder / "model.safetensors")
    elif name.startswith("hps"):
        halved = {key: value.half() for key, value in open_clip_state(*size, seed=6).items()}
        version = "v2.1" if "2.1" in name else "v2"
        torch.save({"epoch": 0, "state_dict": halved}, folder / f"HPS_{version}_compressed.pt")
    elif name.startswith("spm"):
        family = {"spm_sd15": "sd-v1-5", "spm_sdxl": "sdxl"}[name]
        torch.save(spm_state(*size), folder / f"{family}_step-aware_preference_model.bin")
    elif name == "clip_vith_cos":
        torch.save(open_clip_state(*size, seed=7), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(hf_state(open_clip_state(*size, seed=13 if name == "clipscore" else 8)), folder / "model.safetensors")
    if name == "aesthetic":
        torch.save(head_state("layers.", CLIP_WIDTHS["projection"], (0, 2, 4, 6, 7), 9), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder
