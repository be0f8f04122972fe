"""Reward models computed once more from the tensors of a released file, one line after another, without the library's classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
State = Mapping[str, Tensor]


def crop_input(image: Image.Image, size: int, torchvision: bool = False) -> Tensor:
    """(1, 3, S, S): shorter side to `size`, centre crop; RGB before it, or after it with offsets that are rounded."""
    image = image if torchvision else image.convert("RGB")
    width, height = image.size
    factor = size / min(width, height)
    width, height = (size if side == min(width, height) else math.floor(side * factor + 1e-9) for side in (width, height))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))
    margins = [(height - size) / 2, (width - size) / 2]
    top, left = (round(m) if torchvision else math.floor(m) for m in margins)
    window = torch.tensor(pixels[top : top + size, left : left + size]).permute(2, 0, 1) / 255
    return ((window - MEAN) / STD)[None]


def pad_input(image: Image.Image, size: int, antialias: bool = True) -> Tensor:
    """(1, 3, S, S): longer side to `size` as floats, in the middle of a black square."""
    pixels = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    height, width = pixels.shape[2:]
    small = [max(1, round(side * size / max(height, width))) for side in (height, width)]
    if (height, width) != tuple(small):
        pixels = F.interpolate(pixels, small, mode="bicubic", antialias=antialias)
    square = torch.zeros(1, 3, size, size)
    top, left = (size - small[0]) // 2, (size - small[1]) // 2
    square[:, :, top : top + small[0], left : left + small[1]] = pixels
    return (square - MEAN) / STD


def norm(x: Tensor, state: State, name: str, eps: float = 1e-5) -> Tensor:
    """Layer normalisation, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """x W^T + b."""
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(1))


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over (1, L, D), head by head."""
    out = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        out.append((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v)
    return torch.cat(out, -1)


def erf_gelu(x: Tensor) -> Tensor:
    """The exact GELU."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation."""
    return x * torch.sigmoid(1.702 * x)


def clip_block(x: Tensor, state: State, name: str, heads: int, act: Callable[[Tensor], Tensor], bias: Tensor | float) -> Tensor:
    """A block in open_clip's layout."""
    h = norm(x, state, f"{name}.ln_1")
    q, k, v = (h @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]).chunk(3, -1)
    x = x + linear(attention(q, k, v, heads, bias), state, f"{name}.attn.out_proj")
    return x + linear(act(linear(norm(x, state, f"{name}.ln_2"), state, f"{name}.mlp.c_fc")), state, f"{name}.mlp.c_proj")


def clip_image_states(state: State, pixels: Tensor, heads: int, act: Callable[[Tensor], Tensor], layers: int) -> Tensor:
    """States of all image tokens (1, L, D) before the last norm, from open_clip's layout."""
    kernel = state["visual.conv1.weight"]
    patches = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"][None, None], patches], 1) + state["visual.positional_embedding"]
    x = norm(x, state, "visual.ln_pre")
    for i in range(layers):
        x = clip_block(x, state, f"visual.transformer.resblocks.{i}", heads, act, 0.0)
    return x


def clip_image(state: State, pixels: Tensor, heads: int, act: Callable[[Tensor], Tensor], layers: int) -> Tensor:
    """Projected image feature (D,)."""
    return norm(clip_image_states(state, pixels, heads, act, layers)[0, 0], state, "visual.ln_post") @ state["visual.proj"]


def clip_text_states(state: State, ids: list[int], heads: int, act: Callable[[Tensor], Tensor], layers: int) -> Tensor:
    """Projected states of all text tokens (L, D)."""
    x = state["token_embedding.weight"][ids][None] + state["positional_embedding"][: len(ids)]
    bias = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(layers):
        x = clip_block(x, state, f"transformer.resblocks.{i}", heads, act, bias)
    return norm(x[0], state, "ln_final") @ state["text_projection"]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """a.b / |a||b|."""
    return (a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt()


def blip_states(state: State, pixels: Tensor, ids: list[int], vision_layers: int, text_layers: int, heads: tuple[int, int]) -> Tensor:
    """The [CLS] state (D,) of BLIP's text encoder after attending to the image, from BLIP's layout."""
    v = {name.removeprefix("blip.visual_encoder."): value for name, value in state.items()}
    patches = F.conv2d(pixels, v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=v["patch_embed.proj.weight"].shape[-1])
    x = torch.cat([v["cls_token"], patches.flatten(2).transpose(1, 2)], 1) + v["pos_embed"]
    for i in range(vision_layers):
        q, k, value = linear(norm(x, v, f"blocks.{i}.norm1", 1e-6), v, f"blocks.{i}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, value, heads[0]), v, f"blocks.{i}.attn.proj")
        x = x + linear(erf_gelu(linear(norm(x, v, f"blocks.{i}.norm2", 1e-6), v, f"blocks.{i}.mlp.fc1")), v, f"blocks.{i}.mlp.fc2")
    image = norm(x, v, "norm", 1e-6)

    t = {name.removeprefix("blip.text_encoder."): value for name, value in state.items()}
    x = t["embeddings.word_embeddings.weight"][ids][None] + t["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, t, "embeddings.LayerNorm", 1e-12)
    for i in range(text_layers):
        for part, context in (("attention", None), ("crossattention", image)):
            name = f"encoder.layer.{i}.{part}"
            source = x if context is None else context
            q = linear(x, t, f"{name}.self.query")
            k, value = (linear(source, t, f"{name}.self.{kind}") for kind in ("key", "value"))
            out = linear(attention(q, k, value, heads[1]), t, f"{name}.output.dense")
            x = norm(x + out, t, f"{name}.output.LayerNorm", 1e-12)
        name = f"encoder.layer.{i}"
        out = linear(erf_gelu(linear(x, t, f"{name}.intermediate.dense")), t, f"{name}.output.dense")
        x = norm(x + out, t, f"{name}.output.LayerNorm", 1e-12)
    return x[0, 0]


def head(x: Tensor, state: State, prefix: str, positions: tuple[int, ...], act: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The reward head on (D,): a scalar."""
    for i in positions:
        x = linear(x, state, f"{prefix}{i}")
        x = act(x) if act and i != positions[-1] else x
    return x[0]
