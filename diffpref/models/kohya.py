"""LoRA files in the form of kohya's sd-scripts, which A1111, ComfyUI and sd-scripts read: names, scales and metadata.

A layer is three tensors: `<name>.lora_down.weight` (r, in, ...), `<name>.lora_up.weight` (out, r, ...) and `<name>.alpha` (), which
add alpha / r * up @ down to its weight. SD's layers carry diffusers' names; SDXL's UNet those of the original layout, because
sd-scripts trains SDXL on its own UNet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffpref.models.single_file import original_unet_layers


@dataclass(frozen=True)
class LoraWeights:
    """What an adapter adds to the weight of one layer: scale * up @ down."""

    down: Tensor  # (r, in) or (r, in, kh, kw)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    scale: float


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoraWeights]]:
    """Name and weights of every layer that an adapter named "default" changes, in the module's order."""
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield name, LoraWeights(down.detach(), up.detach(), float(layer.scaling["default"]))


def kohya_state(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The adapter "default" of all parts as tensors of a kohya file; weights keep their dtype, alphas are float32.

    alpha is scale * r: lora_alpha, or lora_alpha * sqrt(r) under rsLoRA. Every layer of a part gets the same alpha, the part's most
    frequent one; where layers differ, the rest of their scale moves into `up`. diffusers reads only one alpha for all attention
    layers of a part, and gives the others a wrong scale without a word.

    Raises ValueError for an adapter that the form cannot hold: DoRA, biases, layers without an original name; and for none at all.
    """
    state: dict[str, Tensor] = {}
    for part, name_of in _namers(pipeline).items():
        module = getattr(pipeline, part)
        _check_form(part, module)
        layers = {name_of(layer): weights for layer, weights in lora_layers(module)}
        alphas = {name: w.scale * w.down.shape[0] for name, w in layers.items()}
        common = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)  # an alpha of 0 means "the rank" to sd-scripts
        shared = common[0][0] if common else 1.0
        for name, w in layers.items():
            up = w.up if alphas[name] == shared else w.up * (alphas[name] / shared)
            state[f"{name}.lora_down.weight"] = w.down.clone()
            state[f"{name}.lora_up.weight"] = up.clone()
            state[f"{name}.alpha"] = torch.tensor(shared)
    if not state:
        raise ValueError("the pipeline has no adapter to write as a kohya file; load or train a LoRA first")
    return state


def is_sdxl(unet: UNet2DConditionModel) -> bool:
    """Whether the UNet is of SDXL's family."""
    return unet.config.addition_embed_type == "text_time"


def unet_layer_namer(unet: UNet2DConditionModel) -> Callable[[str], str]:
    """A function from the name of a UNet layer to its name in a kohya file."""
    original = original_unet_layers(unet) if is_sdxl(unet) else lambda layer: layer
    return lambda layer: "lora_unet_" + original(layer).replace(".", "_")


def text_layer_namer(prefix: str) -> Callable[[str], str]:
    """A function from the name of a text encoder layer to its name in a kohya file; newer encoders leave `text_model.` out."""

    def name(layer: str) -> str:
        full = f"text_model.{layer}" if layer.startswith("encoder.") else layer
        return f"{prefix}_{full}".replace(".", "_")

    return name


def _namers(pipeline: DiffusionPipeline) -> dict[str, Callable[[str], str]]:
    first = "lora_te1" if is_sdxl(pipeline.unet) else "lora_te"
    namers = {
        "unet": unet_layer_namer(pipeline.unet),
        "text_encoder": text_layer_namer(first),
        "text_encoder_2": text_layer_namer("lora_te2"),
    }
    return {part: namer for part, namer in namers.items() if getattr(pipeline, part, None) is not None}


def _check_form(part: str, module: nn.Module) -> None:
    config = getattr(module, "peft_config", {}).get("default")
    if config is None:
        return
    if config.use_dora:
        raise ValueError(
            f"the adapter of the {part} is a DoRA, whose magnitudes the kohya form cannot carry; "
            "merge it: --format single_file for other front ends, or --format pipeline for diffusers"
        )
    if config.bias != "none" or getattr(config, "lora_bias", False):
        raise ValueError(f"the adapter of the {part} has biases, which the kohya form cannot carry; use --format pipeline or single_file")


_PUBLISHED = {
    (False, 768): ("sd_v1", "stable-diffusion-v1"),
    (False, 1024): ("sd_v2", "stable-diffusion-v2"),
    (True, 2048): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
"""(is SDXL, width of the text embeddings) -> sd-scripts' and the ModelSpec's name of the base model."""


def kohya_metadata(pipeline: DiffusionPipeline, state: Mapping[str, Tensor], title: str) -> dict[str, str]:
    """What front ends show of a LoRA file: its form, rank, alpha, base model and title; only what is known."""
    ranks = {str(x.shape[0]) for name, x in state.items() if name.endswith("lora_down.weight")}
    alphas = {f"{float(x):g}" for name, x in state.items() if name.endswith(".alpha")}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_output_name": title,
    }
    version, _ = _published(pipeline.unet)
    if version:
        metadata |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return metadata | modelspec(pipeline, title, is_lora=True)


def modelspec(pipeline: DiffusionPipeline, title: str, is_lora: bool = False) -> dict[str, str]:
    """Metadata of the ModelSpec that front ends show: title, and for a published architecture its name and what it predicts.

    A small relative of a family is of no architecture that a front end knows, so that none is named.
    """
    v_prediction = pipeline.scheduler.config.prediction_type == "v_prediction"
    version, architecture = _published(pipeline.unet)
    if not version:
        return {"modelspec.title": title}
    if version == "sd_v2":
        architecture += "-768-v" if v_prediction else "-512"
    in_diffusers_names = is_lora and not is_sdxl(pipeline.unet)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + ("/lora" if is_lora else ""),
        "modelspec.implementation": "diffusers" if in_diffusers_names else "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }


def _published(unet: UNet2DConditionModel) -> tuple[str, str]:
    return _PUBLISHED.get((is_sdxl(unet), unet.config.cross_attention_dim), ("", ""))
