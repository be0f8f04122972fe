"""Every scorer against its formula, computed from the released tensors in plain torch, on pictures of odd shapes and modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizerFast

from diffpref.scorers import SCORERS, scorer_from
from diffpref.scorers.mps import near_condition
from tests.scorers import straight_line as plain
from tests.scorers.released import (
    BERT_WORDS,
    BLIP_HEADS,
    BLIP_SIDE,
    CLIP_HEADS,
    IMAGE_SIZE,
    LAYERS,
    MPS_LENGTH,
    mps_clip_state,
    open_clip_state,
    spm_state,
)

Released = Callable[[str], Path]
PROMPTS = ("a red circle on a blue background", "two circles", "a large green square")
LONG = "a red circle " * 70
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
    "attributes, position, number, location, word, things."
)


def clip_ids(folder: Path, prompt: str, length: int = 24) -> list[int]:
    return CLIPTokenizerFast.from_pretrained(folder)(prompt, truncation=True, max_length=length).input_ids


def cosine(folder: Path, seed: int, prompt: str, pixels: Tensor, act: Callable[[Tensor], Tensor], half: bool = False) -> Tensor:
    """From the weights in open_clip's layout, whatever layout the file has."""
    ids = clip_ids(folder, prompt)
    state = open_clip_state(max(ids) + 1, 24, seed)
    state = {name: value.half().float() for name, value in state.items()} if half else state
    image = plain.clip_image(state, pixels, CLIP_HEADS, act, LAYERS)
    text = plain.clip_text_states(state, ids, CLIP_HEADS, act, LAYERS)
    return plain.cosine(image, text[-1])


def pickscore(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return math.exp(3.0) * pickscore_cos(folder, image, prompt)


def pickscore_cos(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return cosine(folder, 8, prompt, plain.crop_input(image, IMAGE_SIZE), plain.erf_gelu)


def hps(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return cosine(folder, 6, prompt, plain.pad_input(image, IMAGE_SIZE), plain.erf_gelu, half=True)


def hps_no_antialias(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return cosine(folder, 6, prompt, plain.pad_input(image, IMAGE_SIZE, antialias=False), plain.erf_gelu, half=True)


def clip_vith(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return cosine(folder, 7, prompt, plain.pad_input(image, IMAGE_SIZE), plain.erf_gelu)


def clip_vitl(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return cosine(folder, 8, prompt, plain.crop_input(image, IMAGE_SIZE), plain.quick_gelu)


def clipscore(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    return 100 * torch.clamp(cosine(folder, 13, prompt, plain.crop_input(image, IMAGE_SIZE), plain.quick_gelu), min=0)


def aesthetic(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    state = open_clip_state(max(clip_ids(folder, prompt)) + 1, 24, 8)
    feature = plain.clip_image(state, plain.crop_input(image, IMAGE_SIZE, True), CLIP_HEADS, plain.quick_gelu, LAYERS)
    head = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    return plain.head(feature / feature.pow(2).sum().sqrt(), head, "layers.", (0, 2, 4, 6, 7), None)


def blip(state: dict[str, Tensor], image: Image.Image, prompt: str, length: int) -> Tensor:
    words = prompt.split()[: length - 2]
    ids = [2, *(BERT_WORDS.index(word) if word in BERT_WORDS else 1 for word in words), 3]
    ids[1:-1] = [i for word, one in zip(words, ids[1:-1], strict=True) for i in ((9, 13) if word == "circles" else (one,))]
    return plain.blip_states(state, plain.crop_input(image, BLIP_SIDE, True), ids, LAYERS, LAYERS, BLIP_HEADS)


def image_reward(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    raw = plain.head(blip(state, image, prompt, 35), state, "mlp.layers.", (0, 2, 4, 6, 7), None)
    return (raw - 0.16717362830052426) / 1.0333394966054072


def cycle_reward(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    state = torch.load(next(folder.glob("CycleReward-*.pth")), weights_only=True)
    return plain.head(blip(state, image, prompt, 128), state, "mlp.layers.", (0, 2, 4, 6, 8), plain.erf_gelu)


def mps(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    ids, condition_ids = (clip_ids(folder, text, MPS_LENGTH) for text in (prompt, CONDITION))
    end = max(ids)
    assert len(condition_ids) < MPS_LENGTH, "the condition is cut: its padding is not tested"
    clip = mps_clip_state(end + 1, MPS_LENGTH)
    text, condition = (
        plain.clip_text_states(clip, i + [end] * (MPS_LENGTH - len(i)), CLIP_HEADS, plain.erf_gelu, LAYERS) for i in (ids, condition_ids)
    )
    nearest = torch.stack([(token * condition).sum(-1).max() for token in text])
    mask = torch.where(nearest / nearest.max() > 0.01, 0.0, -torch.inf)
    assert 0 < mask.isinf().sum() < MPS_LENGTH, "the mask of this prompt hides nothing or everything: it tests nothing"

    state = {n.removeprefix("mps.cross_model."): v for n, v in load_file(folder / "model.safetensors").items()}
    pixels = plain.crop_input(image, IMAGE_SIZE)
    tokens = plain.clip_image_states(clip, pixels, CLIP_HEADS, plain.erf_gelu, LAYERS) @ clip["visual.proj"]
    for i in range(LAYERS):
        tokens = cross_layer(tokens, text[None], mask, state, f"layers.{i}")
    return math.exp(3.0) * plain.cosine(text[len(ids) - 1], tokens[0, 0])


def cross_layer(tokens: Tensor, text: Tensor, mask: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Heads are 8 wide, four of them; keys and values have one."""

    def swiglu(x: Tensor) -> Tensor:
        return x[..., :96] * F.silu(x[..., 96:])

    def rotate(x: Tensor) -> Tensor:
        turned = x.clone()
        for position in range(x.shape[1]):
            for pair in range(4):
                angle = position * 10000 ** (-2 * pair / 8)
                a, b = x[0, position, pair], x[0, position, pair + 4]
                turned[0, position, pair] = a * math.cos(angle) - b * math.sin(angle)
                turned[0, position, pair + 4] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    x = plain.norm(tokens, state, f"{name}.0.fn.norm")
    key, value = plain.linear(text, state, f"{name}.0.fn.to_kv").split(8, -1)
    query = plain.linear(x, state, f"{name}.0.fn.to_q")
    out = plain.attention(query, key.repeat(1, 1, 4), value.repeat(1, 1, 4), 4, mask)
    hidden = swiglu(plain.linear(x, state, f"{name}.0.fn.ff.0"))
    tokens = tokens + plain.linear(out, state, f"{name}.0.fn.to_out") + plain.linear(hidden, state, f"{name}.0.fn.ff.2")

    x = plain.linear(plain.norm(tokens, state, f"{name}.1.fn.norm"), state, f"{name}.1.fn.fused_attn_ff_proj")
    query, key, value, hidden = x.split([32, 8, 8, 192], -1)
    query = torch.cat([rotate(q) for q in query.split(8, -1)], -1)
    out = plain.attention(query, rotate(key).repeat(1, 1, 4), value.repeat(1, 1, 4), 4)
    return tokens + plain.linear(out, state, f"{name}.1.fn.attn_out") + plain.linear(swiglu(hidden), state, f"{name}.1.fn.ff_out.1")


def spm(folder: Path, image: Image.Image, prompt: str) -> Tensor:
    """The modulated vision tower at timestep 0, written out in transformers' layout."""
    ids = clip_ids(folder, prompt)
    state = spm_state(max(ids) + 1, 24)
    vision = "model.vision_model"

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    time = torch.cat([torch.ones(1, 128), torch.zeros(1, 128)], 1)  # cosines and sines of 0
    time = silu(plain.linear(silu(plain.linear(time, state, "model.t_embedder.mlp.0")), state, "model.t_embedder.mlp.2"))
    pixels = plain.crop_input(image, IMAGE_SIZE)
    patches = F.conv2d(pixels, state[f"{vision}.embeddings.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{vision}.embeddings.class_embedding"][None, None], patches], 1)
    x = plain.norm(x + state[f"{vision}.embeddings.position_embedding.weight"], state, f"{vision}.pre_layrnorm")
    for i in range(LAYERS):
        layer = f"{vision}.encoder.layers.{i}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = plain.linear(time, state, f"{layer}.adaLN_modulation.1").chunk(6, -1)
        h = plain.norm(x, state, f"{layer}.layer_norm1") * (1 + scale_1) + shift_1
        q, k, v = (plain.linear(h, state, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        x = x + gate_1 * plain.linear(plain.attention(q, k, v, CLIP_HEADS), state, f"{layer}.self_attn.out_proj")
        h = plain.norm(x, state, f"{layer}.layer_norm2") * (1 + scale_2) + shift_2
        x = x + gate_2 * plain.linear(plain.erf_gelu(plain.linear(h, state, f"{layer}.mlp.fc1")), state, f"{layer}.mlp.fc2")
    shift, scale = plain.linear(time, state, f"{vision}.adaLN_modulation.1").chunk(2, -1)
    pooled = plain.norm(x[0, 0], state, f"{vision}.post_layernorm") * (1 + scale[0]) + shift[0]
    text = plain.clip_text_states(open_clip_state(max(ids) + 1, 24, 8), ids, CLIP_HEADS, plain.erf_gelu, LAYERS)
    return math.exp(3.0) * plain.cosine(state["model.visual_projection.weight"] @ pooled, text[-1])


EXPECTED: dict[str, Callable[[Path, Image.Image, str], Tensor]] = {
    **{"aesthetic": aesthetic, "clip_vith_cos": clip_vith, "clip_vitl_cos": clip_vitl, "clipscore": clipscore},
    **{"cycle_reward": cycle_reward, "cycle_reward_i2t": cycle_reward, "cycle_reward_t2i": cycle_reward, "image_reward": image_reward},
    **{"hpsv2": hps, "hpsv2.1": hps, "hpsv2.1_no_antialias": hps_no_antialias, "hpsv2_no_antialias": hps_no_antialias},
    **{"mps": mps, "pickscore": pickscore, "pickscore_cos": pickscore_cos, "spm_sd15": spm, "spm_sdxl": spm},
}


@pytest.mark.parametrize("name", SCORERS)
def test_score_is_the_formula(name: str, released: Released, pictures: tuple[Image.Image, ...]) -> None:
    prompts = [PROMPTS[i % 3] for i in range(len(pictures))]
    found = scorer_from(f"{name}={released(name)}")(pictures, prompts)
    wanted = torch.stack([EXPECTED[name](released(name), image, prompt) for image, prompt in zip(pictures, prompts, strict=True)])
    assert wanted.std() > 0.01, "the pictures score alike: this tests nothing"
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "image_reward", "cycle_reward", "mps"])
def test_long_prompt_is_cut_at_the_length_of_the_release(name: str, released: Released, pictures: tuple[Image.Image, ...]) -> None:
    found = scorer_from(f"{name}={released(name)}")(pictures[:1], [LONG])
    torch.testing.assert_close(found[0], EXPECTED[name](released(name), pictures[0], LONG), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["hpsv2.1", "clip_vith_cos"])
def test_prompts_are_repaired_as_open_clip_does(name: str, released: Released, pictures: tuple[Image.Image, ...]) -> None:
    found = scorer_from(f"{name}={released(name)}")(pictures[:1], ["A  Red \u201ccircle\u201d\n< &amp;amp; ring "])
    wanted = EXPECTED[name](released(name), pictures[0], 'a red "circle" < & ring')
    torch.testing.assert_close(found[0], wanted, rtol=2e-5, atol=2e-5)


def test_mask_of_mps_is_relative_to_its_own_prompt() -> None:
    condition = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[[1.0, -9.0], [0.02, 0.0], [0.005, 0.0]], [[0.0, 100.0], [0.0, 0.5], [3.0, 0.0]]])
    assert near_condition(tokens, condition).tolist() == [[True, True, False], [True, False, True]]


def test_aesthetic_head_is_affine(released: Released) -> None:
    from diffpref.scorers.reward_head import load_head
    from diffpref.scorers.weights import read_state_dict, under

    path = released("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    head = load_head(under(read_state_dict(path), "layers."), "aesthetic")
    x, y = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(x) + head(y), head(x + y) + head(torch.zeros(1, 24)), rtol=1e-4, atol=1e-4)
