"""Reading LoRA files: merged into a model, or as an adapter that is trained further.

Two forms. diffusers': `unet.<layer>.lora_A.weight` with alpha, rank and variant as metadata, or older names of the same tensors.
kohya's: `lora_unet_<layer with underscores>.lora_down.weight` with an alpha beside every layer; SDXL's layers stand there under
their original names. Every tensor of a file has to find its layer: loaders that pass over what they do not know give a model that
is neither the base nor the LoRA.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpref.models.files import read_metadata, read_shapes
from diffpref.models.lora import LORA_FILE, PARTS, make_lean, merge_adapter
from diffpref.models.single_file import original_unet_layers

KOHYA_PARTS = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
KOHYA_TENSORS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
SCALES = ("lora_alpha", "alpha_pattern", "use_dora", "use_rslora", "lora_bias")
"""What metadata decides; ranks and layers follow from the tensors."""
FORMS = f"give a folder with {LORA_FILE}, or a .safetensors file in diffusers' or kohya's form"

Layers = dict[str, dict[str, Tensor]]
"""Layer name -> what the file has for it: lora_A.weight, lora_B.weight, lora_magnitude_vector, alpha."""


@dataclass(frozen=True)
class Lora:
    """An adapter as a file describes it, for the pipeline that it was read for."""

    tensors: dict[str, dict[str, Tensor]]  # part -> PEFT's names
    configs: dict[str, LoraConfig]  # part -> rank, alpha and variant of every layer


def read_lora(pipeline: DiffusionPipeline, source: str, setting: str) -> Lora:
    """Read a LoRA file or folder and fit it to the pipeline's layers; the pipeline is not changed.

    Raises ValueError naming `setting` for a damaged file, another kind of adapter, and the first tensor that has no layer or
    another shape.
    """
    path = _file(Path(source), setting)
    read_shapes(path, setting)
    state = load_file(path)
    modules = {part: dict(getattr(pipeline, part).named_modules()) for part in PARTS if getattr(pipeline, part, None) is not None}
    find = _Finder(modules, source, setting)
    is_kohya = any(name.startswith("lora_") for name in state)
    layers: dict[str, Layers] = {}
    names = _kohya_names(pipeline, modules) if is_kohya else {}
    for name, x in state.items():
        part, layer, tensor = find.kohya(name, names) if is_kohya else find.diffusers(name)
        layers.setdefault(part, {}).setdefault(layer, {})[tensor] = x
    if not layers:
        raise ValueError(f"{setting} {source!r} is empty; {FORMS}")
    for part, found in layers.items():
        for layer, of_layer in found.items():
            find.check(part, layer, of_layer)
    metadata = _metadata(path)
    return Lora(
        tensors={part: {f"{n}.{t}": x for n, ts in found.items() for t, x in ts.items() if t != "alpha"} for part, found in layers.items()},
        configs={part: _config(found, metadata.get(part)) for part, found in layers.items()},
    )


def merge_lora(pipeline: DiffusionPipeline, source: str, setting: str, scale: float = 1.0) -> None:
    """Add a LoRA, times `scale`, to the weights of the UNet and text encoders that it has layers for.

    Raises ValueError as `read_lora` does.
    """
    lora = read_lora(pipeline, source, setting)
    _attach(pipeline, lora, "merged")
    for name in lora.tensors:
        part = getattr(pipeline, name)
        for layer in part.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.scale_layer(scale)
        merge_adapter(part)
        part.requires_grad_(False)


def load_adapter(pipeline: DiffusionPipeline, source: str, setting: str) -> Lora:
    """Attach a LoRA as the trainable adapter "default" of the parts that it has layers for, in float32; everything else is frozen.

    Raises ValueError as `read_lora` does.
    """
    lora = read_lora(pipeline, source, setting)
    _attach(pipeline, lora, "default")
    return lora


def _attach(pipeline: DiffusionPipeline, lora: Lora, name: str) -> None:
    for part, tensors in lora.tensors.items():
        module = getattr(pipeline, part)
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            module.add_adapter(lora.configs[part], adapter_name=name)
        cast_training_params(module, torch.float32)  # a new adapter takes the dtype of its layers
        make_lean(module)
        result = set_peft_model_state_dict(module, tensors, adapter_name=name)
        left = [key for key in result.missing_keys if f".{name}" in key]
        left += result.unexpected_keys
        assert not left, f"adapter tensors without a place: {left}"


def _file(source: Path, setting: str) -> Path:
    """The weights of a LoRA file or folder."""
    if source.is_dir():
        known = [source / name for name in (LORA_FILE, "adapter_model.safetensors") if (source / name).exists()]
        found = known[:1] or sorted(source.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        raise ValueError(f"{setting} {str(source)!r} is a folder with {len(found)} .safetensors files and no {LORA_FILE}; {FORMS}")
    if not source.is_file():
        raise ValueError(f"{setting} {str(source)!r} does not exist; {FORMS}")
    if source.suffix != ".safetensors":
        raise ValueError(f"{setting} {str(source)!r} is a pickle or another kind of file; {FORMS}")
    return source


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Alpha, rank and variant by part, from the file's own metadata or from the adapter_config.json of a PEFT folder."""
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.exists():
        return {"unet": json.loads(config.read_text())}
    flat: dict[str, Any] = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        part, _, entry = name.partition(".")
        found.setdefault(part, {})[entry] = value
    return found


def _config(layers: Layers, metadata: Mapping[str, Any] | None) -> LoraConfig:
    """Rank and layers as the tensors have them; alpha and variant as the metadata says, else kohya's alphas, else the rank."""
    ranks = {layer: tensors["lora_A.weight"].shape[0] for layer, tensors in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    options: dict[str, Any] = {
        "use_dora": any("lora_magnitude_vector" in tensors for tensors in layers.values()),
        "lora_bias": any("lora_B.bias" in tensors for tensors in layers.values()),
    }
    if metadata is None:
        alphas = {layer: float(tensors.get("alpha", ranks[layer])) for layer, tensors in layers.items()}
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        options |= {"lora_alpha": alpha, "alpha_pattern": {_exactly(n): a for n, a in alphas.items() if a != alpha}}
    else:
        options |= {name: metadata[name] for name in SCALES if metadata.get(name) is not None}
        options["alpha_pattern"] = {n.removeprefix("text_model."): a for n, a in options.get("alpha_pattern", {}).items()}
    pattern = {_exactly(layer): r for layer, r in ranks.items() if r != rank}
    return LoraConfig(r=rank, rank_pattern=pattern, target_modules=sorted(layers), **options)


def _exactly(layer: str) -> str:
    """A layer's name as PEFT's pattern for this layer alone; PEFT matches a pattern with the end of names."""
    return "^" + re.escape(layer)


def _kohya_names(pipeline: DiffusionPipeline, modules: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, tuple[str, str]]:
    """kohya's name of every layer that can be adapted -> (part, layer): diffusers' names, and for SDXL's UNet the original ones too."""
    names: dict[str, tuple[str, str]] = {}
    for part, prefixes in KOHYA_PARTS.items():
        for layer, module in modules.get(part, {}).items():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            spelled = layer
            if part != "unet" and layer != "text_projection":
                spelled = "text_model." + layer.removeprefix("text_model.")
            for prefix in prefixes:
                names[prefix + spelled.replace(".", "_")] = (part, layer)
    if pipeline.unet.config.addition_embed_type == "text_time":
        original = original_unet_layers(pipeline.unet)
        for part, layer in [place for place in names.values() if place[0] == "unet"]:
            names["lora_unet_" + original(layer).replace(".", "_")] = (part, layer)
    return names


@dataclass(frozen=True)
class _Finder:
    """Where the tensors of a file belong in a pipeline; every method raises ValueError naming the tensor that has no place."""

    modules: Mapping[str, Mapping[str, nn.Module]]  # part -> layer name -> layer
    source: str
    setting: str

    def kohya(self, name: str, names: Mapping[str, tuple[str, str]]) -> tuple[str, str, str]:
        """(part, layer, tensor) of a name in kohya's form."""
        layer, _, tensor = name.partition(".")
        if tensor == "dora_scale":
            raise ValueError(
                f"{self.setting} {self.source!r} is a DoRA in kohya's form ({name}), whose conventions differ; {FORMS} of a LoRA"
            )
        if tensor not in KOHYA_TENSORS:
            raise ValueError(f"{self.setting} {self.source!r} holds {name}, which is no LoRA but another kind of adapter; {FORMS}")
        if layer not in names:
            raise self.mismatch(name, "the model has no such layer")
        return *names[layer], KOHYA_TENSORS[tensor]

    def diffusers(self, name: str) -> tuple[str, str, str]:
        """(part, layer, tensor) of a name in one of diffusers' forms."""
        part, _, rest = name.removeprefix("base_model.model.").partition(".")
        if part not in PARTS:
            part, rest = "unet", name.removeprefix("base_model.model.")
        is_text = part != "unet"
        rest = rest.replace(".processor.", ".")
        rest = re.sub(r"\.to_([qkv])_lora\.", r".\1_proj.lora." if is_text else r".to_\1.lora.", rest)
        rest = rest.replace(".to_out_lora.", ".out_proj.lora." if is_text else ".to_out.0.lora.")
        rest = re.sub(r"\.(?:lora|lora_linear_layer)\.(down|up)\.", lambda m: f".lora_{'A' if m[1] == 'down' else 'B'}.", rest)
        match = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)(?:\.weight)?", rest)
        if match is None:
            raise ValueError(f"{self.setting} {self.source!r} holds {name}, which is no LoRA weight; {FORMS}")
        layer = match[1]
        if part in self.modules and layer not in self.modules[part]:  # transformers 5 dropped a level of names
            layer = layer.removeprefix("text_model.")
        if layer not in self.modules.get(part, {}):
            raise self.mismatch(name, "the model has no such layer")
        return part, layer, match[2]

    def check(self, part: str, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """Both matrices are there, and their product has the shape of the layer's weight."""
        for tensor in ("lora_A.weight", "lora_B.weight"):
            if tensor not in tensors:
                raise ValueError(f"{self.setting} {self.source!r} is incomplete: {part}.{layer} has no {tensor}; fetch it again")
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        weight = getattr(self.modules[part][layer], "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            raise self.mismatch(f"{part}.{layer}", "that layer cannot take an adapter")
        wanted_a, wanted_b = (a.shape[0], *weight.shape[1:]), (weight.shape[0], a.shape[0], *(1 for _ in weight.shape[2:]))
        for tensor, found, wanted in (("lora_A", tuple(a.shape), wanted_a), ("lora_B", tuple(b.shape), wanted_b)):
            if found != wanted:
                raise self.mismatch(f"{part}.{layer}.{tensor}", f"its shape is {found}, the model needs {wanted}")

    def mismatch(self, name: str, reason: str) -> ValueError:
        """What to say about a tensor that does not fit."""
        return ValueError(
            f"{self.setting} {self.source!r} does not fit the model: {name}: {reason}; was it trained on another family "
            "(SD1.x, SD2.x, SDXL)? Give a LoRA of the same family as pretrained_model_name_or_path"
        )
