"""The original one-file layout of SD and SDXL checkpoints, as their authors published them and as other tools read them.

One state dict holds the UNet under `model.diffusion_model.`, the autoencoder under `first_stage_model.` and the text encoders
under `cond_stage_model.` (SD) or `conditioner.embedders.` (SDXL). Blocks are numbered through in place of being nested. CLIP
ViT-L keeps the names of transformers; OpenCLIP (SD2, SDXL's second encoder) joins q, k and v into `in_proj` and stores its
projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_SD, OPEN_CLIP_SD = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OPEN_CLIP_REFINER = "conditioner.embedders.0.model."
V_PREDICTION_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
"""Empty tensors by which single files say that their UNet predicts v, and that their schedule ends in pure noise."""

State = dict[str, Tensor]
Rule = tuple[str, Callable[[re.Match[str]], str]]
"""A pattern for the beginning of a name, and what replaces it."""


@torch.no_grad()
def to_original_layout(pipeline: DiffusionPipeline) -> State:
    """All weights of an SD or SDXL pipeline, base or refiner, under their original names: detached, contiguous, dtypes kept.

    Works for any width and depth. The markers `v_pred` and `ztsnr` are added where the scheduler says so. Raises ValueError for
    a weight that the layout has no place for, such as an adapter that was not merged.
    """
    unet = {UNET + name: x for name, x in _renamed(pipeline.unet, _unet_rules(pipeline.unet), "unet").items()}
    vae = {}
    for name, x in _renamed(pipeline.vae, _vae_rules(len(pipeline.vae.config.block_out_channels)), "vae").items():
        was_convolution = ".attn_1." in name and name.endswith("weight") and x.ndim == 2
        vae[VAE + name] = x[:, :, None, None] if was_convolution else x
    state = unet | vae | _text_encoders(pipeline)
    config = pipeline.scheduler.config
    if config.prediction_type == "v_prediction":
        state[V_PREDICTION_KEY] = torch.empty(0)
    if config.get("rescale_betas_zero_snr"):
        state[ZERO_SNR_KEY] = torch.empty(0)
    return {name: x.detach().contiguous() for name, x in state.items()}


def _renamed(module: nn.Module, rules: Sequence[Rule], part: str) -> State:
    """The weights of a module with the beginning of each name replaced by the first rule that matches it."""
    state = {}
    for name, x in module.state_dict().items():
        original = _original(name, rules)
        if original is None or "base_layer" in name or "lora_" in name:
            raise ValueError(
                f"{part} weight {name!r} has no place in a single-file checkpoint; merge adapters first, or save a diffusers folder"
            )
        state[original] = x
    return state


def _original(name: str, rules: Sequence[Rule]) -> str | None:
    """A name with its beginning replaced by the first rule that matches it; None if there is none."""
    matches = ((re.match(pattern, name), place) for pattern, place in rules)
    return next((place(match) + name[match.end() :] for match, place in matches if match), None)


def original_names(module: UNet2DConditionModel | AutoencoderKL) -> dict[str, str]:
    """The names in a single file of a UNet's or autoencoder's weights, by their own; for reading one without the rest of the file.

    Raises ValueError for a weight that the layout has no place for.
    """
    is_unet = isinstance(module, UNet2DConditionModel)
    rules = _unet_rules(module) if is_unet else _vae_rules(len(module.config.block_out_channels))
    prefix, part = (UNET, "unet") if is_unet else (VAE, "vae")
    names = {name: _original(name, rules) for name in module.state_dict()}
    stray = [name for name, original in names.items() if original is None]
    if stray:
        raise ValueError(f"{part} weight {stray[0]!r} has no name in a single-file checkpoint; use diffusers' layout")
    return {name: f"{prefix}{original}" for name, original in names.items()}


def single_file_shapes(module: UNet2DConditionModel | AutoencoderKL) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a UNet's or autoencoder's weights have in a single file. Raises ValueError as `original_names` does."""
    weights, names = module.state_dict(), original_names(module)
    square = {name for name, x in weights.items() if ".attn_1." in names[name] and x.ndim == 2}
    return {names[name]: (*x.shape, 1, 1) if name in square else tuple(x.shape) for name, x in weights.items()}


def original_unet_layers(unet: UNet2DConditionModel) -> Callable[[str], str]:
    """A function from the name of one of the UNet's layers to its name in the original layout, without the prefix of the file.

    It raises ValueError for a layer that the layout has no place for.
    """
    rules = _unet_rules(unet)

    def original(layer: str) -> str:
        found = _original(layer + ".", rules)  # the rules are written for weights, whose names go on after the layer's
        if found is None:
            raise ValueError(f"unet layer {layer!r} has no name in the original layout; save in the diffusers form")
        return found.removesuffix(".")

    return original


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of the UNet's residual blocks."""
_LAYER = rf"\.({'|'.join(RESNET)})"


def _fixed(names: Mapping[str, str]) -> list[Rule]:
    """Rules for layers that have one place."""
    return [(re.escape(old) + r"(?=\.)", lambda _, new=new: new) for old, new in names.items()]  # type: ignore[misc]


def _unet_rules(unet: UNet2DConditionModel) -> list[Rule]:
    """Down blocks of L residual blocks and a sampler take L + 1 numbers each; an up block's sampler joins its last number."""
    per_block = unet.config.layers_per_block
    if not isinstance(per_block, int) or unet.config.mid_block_type != "UNetMidBlock2DCrossAttn":
        raise ValueError(
            f"a UNet with layers_per_block {per_block!r} and mid_block_type {unet.config.mid_block_type!r} has no single-file layout; "
            "save a diffusers folder"
        )
    wide = per_block + 1

    def down(m: re.Match[str]) -> int:
        return 1 + int(m[1]) * wide + int(m[2])

    def up(m: re.Match[str]) -> int:
        return int(m[1]) * wide + int(m[2])

    def upsampler(m: re.Match[str]) -> str:
        after = 2 if getattr(unet.up_blocks[int(m[1])], "attentions", None) else 1
        return f"output_blocks.{int(m[1]) * wide + per_block}.{after}.conv"

    return [
        (rf"down_blocks\.(\d+)\.resnets\.(\d+){_LAYER}", lambda m: f"input_blocks.{down(m)}.0.{RESNET[m[3]]}"),
        (r"down_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"input_blocks.{down(m)}.1"),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * wide}.0.op"),
        (rf"mid_block\.resnets\.([01]){_LAYER}", lambda m: f"middle_block.{2 * int(m[1])}.{RESNET[m[2]]}"),
        (r"mid_block\.attentions\.0", lambda m: "middle_block.1"),
        (rf"up_blocks\.(\d+)\.resnets\.(\d+){_LAYER}", lambda m: f"output_blocks.{up(m)}.0.{RESNET[m[3]]}"),
        (r"up_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"output_blocks.{up(m)}.1"),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.conv", upsampler),
        *_fixed({"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}),
        *_fixed({"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}),
        *_fixed({"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}),
    ]


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
"""Layers of the autoencoder's attention."""


def _vae_rules(levels: int) -> list[Rule]:
    """The decoder's levels are numbered from the finest one, as the encoder's."""
    layer = r"\.(norm1|conv1|norm2|conv2|conv_shortcut)"
    attention = rf"\.({'|'.join(map(re.escape, VAE_ATTENTION))})(?=\.)"

    def block(name: str) -> str:
        return "nin_shortcut" if name == "conv_shortcut" else name

    def level(m: re.Match[str]) -> int:
        return levels - 1 - int(m[1])

    return [
        (rf"encoder\.down_blocks\.(\d+)\.resnets\.(\d+){layer}", lambda m: f"encoder.down.{m[1]}.block.{m[2]}.{block(m[3])}"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"encoder.down.{m[1]}.downsample.conv"),
        (rf"decoder\.up_blocks\.(\d+)\.resnets\.(\d+){layer}", lambda m: f"decoder.up.{level(m)}.block.{m[2]}.{block(m[3])}"),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv", lambda m: f"decoder.up.{level(m)}.upsample.conv"),
        (rf"(encoder|decoder)\.mid_block\.resnets\.([01]){layer}", lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}.{block(m[3])}"),
        (rf"(encoder|decoder)\.mid_block\.attentions\.0{attention}", lambda m: f"{m[1]}.mid.attn_1.{VAE_ATTENTION[m[2]]}"),
        (r"(encoder|decoder)\.conv_norm_out", lambda m: f"{m[1]}.norm_out"),
        (r"(encoder|decoder)\.conv_(in|out)", lambda m: m[0]),
        (r"(post_)?quant_conv", lambda m: m[0]),
    ]


OPEN_CLIP_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
"""Parts of transformers' names and their OpenCLIP counterparts."""


def _text_encoders(pipeline: DiffusionPipeline) -> State:
    """SD: one encoder, in the layout of its activation (OpenCLIP has gelu, CLIP quick_gelu). SDXL: CLIP, then OpenCLIP."""
    first, second = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    if second is None:
        return _clip(first, CLIP_SD) if first.config.hidden_act == "quick_gelu" else _open_clip(first, OPEN_CLIP_SD)
    refiner = first is None
    return _open_clip(second, OPEN_CLIP_REFINER) if refiner else _clip(first, CLIP_XL) | _open_clip(second, OPEN_CLIP_XL)


def _encoder_state(encoder: nn.Module) -> State:
    """Weights without the wrapper `text_model.`, which newer versions of transformers leave out for one of the two classes."""
    state = {name.removeprefix("text_model."): x for name, x in encoder.state_dict().items()}
    stray = [name for name in state if "base_layer" in name or "lora_" in name]
    if stray:
        raise ValueError(f"text encoder weight {stray[0]!r} has no place in a single-file checkpoint; merge adapters first")
    return state


def _clip(encoder: nn.Module, prefix: str) -> State:
    """transformers' own names, with the wrapper."""
    return {f"{prefix}text_model.{name}": x for name, x in _encoder_state(encoder).items()}


def _open_clip(encoder: nn.Module, prefix: str) -> State:
    """OpenCLIP's names: q, k and v of a layer in one matrix, the projection as (width, output)."""
    plain = _encoder_state(encoder)
    state = {}
    for name, x in plain.items():
        moved = re.sub(r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1.", name)
        for old, new in OPEN_CLIP_NAMES.items():
            moved = moved.replace(old, new)
        if ".q_proj." in name:
            joined = torch.cat([plain[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            state[moved.replace(".q_proj.", ".in_proj_")] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            state[moved] = x.T if moved == "text_projection" else x
    return {prefix + name: x for name, x in state.items()}
