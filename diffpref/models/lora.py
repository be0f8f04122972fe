"""LoRA on the UNet and the text encoders: targets, attaching, reading and writing."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What save_lora writes."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "all": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"),
}
"""Named sets of UNet layers; "all" adds projections, feed-forwards and the residual blocks."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of a CLIP text encoder that get an adapter."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Components of a pipeline that can carry an adapter."""


def add_lora(
    denoiser: UNet2DConditionModel, rank: int, alpha: float, targets: str, seed: int, *, use_dora: bool = False, use_rslora: bool = False
) -> None:
    """Attach a trainable adapter named "default": A Gaussian, B zero, so that the policy starts as the reference.

    targets: a key of TARGETS or layer names separated by commas. use_dora: magnitude and direction apart (arXiv:2402.09353), the
    magnitude starts as the norm of the base weight. use_rslora: scale alpha / sqrt(rank) in place of alpha / rank
    (arXiv:2312.03732). Raises ValueError when a name matches no layer.
    """
    names = list(TARGETS.get(targets, tuple(t.strip() for t in targets.split(",") if t.strip())))
    layers = [name for name, _ in denoiser.named_modules()]
    missing = [t for t in names if not any(layer == t or layer.endswith("." + t) for layer in layers)]
    if missing or not names:
        raise ValueError(
            f"lora_targets {targets!r}: no layer of the UNet is called {missing or 'so'}; "
            f"use {', '.join(TARGETS)} or layer names such as to_q,to_k"
        )
    _attach(denoiser, LoraConfig(target_modules=names, **_options(rank, alpha, use_dora, use_rslora)), seed)


def add_text_lora(
    encoders: Sequence[nn.Module], depths: Sequence[int], rank: int, alpha: float, seed: int, *, use_rslora: bool = False
) -> None:
    """Attach an adapter to the attention of the first `depths` layers of each text encoder, as `add_lora` does to the UNet.

    Later layers do not reach the UNet: their adapters would get no gradient. Never DoRA: diffusers drops the magnitudes of text
    encoders when it loads the file (measured with diffusers 0.42 and transformers 5.23).
    """
    for number, (encoder, depth) in enumerate(zip(encoders, depths, strict=True)):
        options = _options(rank, alpha, False, use_rslora)
        config = LoraConfig(target_modules=list(TEXT_ATTENTION), layers_to_transform=list(range(depth)), **options)
        _attach(encoder, config, seed + 1 + number)


def freeze_unreached(encoders: Sequence[nn.Module], depths: Sequence[int]) -> None:
    """Exclude the layers after the first `depths` of each text encoder from training, where an adapter came with them.

    They would get no gradient, for which data-parallel processes wait in vain.
    """
    for encoder, depth in zip(encoders, depths, strict=True):
        for name, p in encoder.named_parameters():
            layer = re.search(r"\blayers\.(\d+)\.", name)
            if layer and int(layer[1]) >= depth:
                p.requires_grad_(False)


def _options(rank: int, alpha: float, use_dora: bool, use_rslora: bool) -> dict[str, object]:
    return {"r": rank, "lora_alpha": alpha, "init_lora_weights": "gaussian", "use_dora": use_dora, "use_rslora": use_rslora}


def _attach(module: nn.Module, config: LoraConfig, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(config)  # type: ignore[operator]
    cast_training_params(module, torch.float32)  # a new adapter takes the dtype of its layers
    make_lean(module)


class LeanLinear(lora.Linear):
    """An adapted layer that does not multiply by a scale of 1, alpha = rank, a pass over the whole output there and back."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in). The same numbers; other scales, several adapters, merged ones, DoRA and dropout are left to peft."""
        active = self.active_adapters
        name = active[0] if len(active) == 1 and not (self.disable_adapters or self.merged or args or kwargs) else None
        is_plain = self.scaling.get(name) == 1 and name not in self.lora_variant
        if not is_plain or (self.training and getattr(self.lora_dropout[name], "p", 0)):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base = self.base_layer(x)
        return (base + self.lora_B[name](self.lora_A[name](x))).to(base.dtype)


def make_lean(module: nn.Module) -> None:
    """Rid the adapters of a UNet, which always runs under autocast, of what they do without need. DoRA, which divides by norms, is left.

    peft casts the input of every adapter to float32, which autocast casts back: the same numbers, two more kernels and one more tensor
    kept for the backward pass in every adapted layer.
    """
    for layer in module.modules() if isinstance(module, UNet2DConditionModel) else ():
        if isinstance(layer, BaseTunerLayer) and not len(layer.lora_magnitude_vector):
            layer.cast_input_dtype_enabled = False
            if type(layer) is lora.Linear:
                layer.__class__ = LeanLinear


def adapted_parts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that carry an adapter, by name."""
    parts = {name: getattr(pipeline, name, None) for name in PARTS}
    return {name: part for name, part in parts.items() if part is not None and getattr(part, "peft_config", None)}


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors to `folder`; `pipe.load_lora_weights(folder)` reads it.

    Beside the weights it holds alpha, rank and variant of every part as metadata: without it rsLoRA, DoRA and an alpha other than
    the rank would load as another adapter. All names stay in PEFT's form: diffusers looks at the first name only, and its own
    older form exists for attention layers alone, so that a file with both would lose the attention layers in silence.
    """
    parts = adapted_parts(pipeline)
    layers = {f"{name}_lora_layers": _named_as_published(part) for name, part in parts.items()}
    type(pipeline).save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))


def _named_as_published(part: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors. CLIP encoders lost a level of names in transformers 5; files keep it, which both generations read."""
    layers = get_peft_model_state_dict(part)
    if isinstance(part, UNet2DConditionModel) or hasattr(part, "text_model"):
        return layers
    return {f"text_model.{name}": x for name, x in layers.items()}


def merged_copy(part: nn.Module) -> nn.Module:
    """A copy of a component with its adapter added to the weights and removed."""
    part = copy.deepcopy(part)
    merge_adapter(part)
    return part


@torch.no_grad()
def merge_adapter(part: nn.Module) -> None:
    """Add a component's adapter to its weights, in place, and remove it."""
    for layer in part.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    recurse_remove_peft_layers(part)
    del part.peft_config
    part._hf_peft_config_loaded = False  # type: ignore[assignment]  # else save_pretrained would write an adapter


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, without a copy."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
