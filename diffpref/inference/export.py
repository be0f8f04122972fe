"""`diffpref export`: what a run left, in the form that another program reads, and read back before it appears."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpref.core.types import Conditioning
from diffpref.inference.sample import DTYPES
from diffpref.models.backbone import Backbone, as_backbone
from diffpref.models.kohya import LoraWeights, kohya_metadata, kohya_state, lora_layers, modelspec
from diffpref.models.lora import LORA_FILE, adapted_parts, merge_adapter, save_lora
from diffpref.models.lora_file import load_adapter, merge_lora
from diffpref.models.pipeline import load_pipeline
from diffpref.models.saving import save_configs, save_pipeline
from diffpref.models.single_file import to_original_layout

LORA_FORMATS = ("diffusers", "kohya")
ROUNDING = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2}
"""Largest difference, relative to the largest value, that may arise when the stored weights of a dtype are computed with once more.

In float32 it is about 1e-6; a wrong scale or a lost layer makes more than any of these."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `diffpref export`."""

    lora: str | None = None
    """LoRA to export: the output_dir of a run, or a file in diffusers' or kohya's form."""
    aligned: str | None = None
    """Complete model to export, such as the output_dir of a run with tune full, or a single .safetensors file; give this or lora."""
    pretrained_model_name_or_path: str | None = None
    """Base model of the LoRA: a folder, hub id or single file; what the run in the folder of lora started from when not given."""
    revision: str | None = None
    """Git revision of a base model on the hub."""
    variant: str | None = None
    """Weight variant of the base model's files, such as fp16."""
    single_file_config: str | None = None
    """Folder or hub id with the configs and tokenizers of a model that is a single file; the family's public one when not given."""
    format: Literal["diffusers", "kohya", "pipeline", "single_file"] | None = None
    """diffusers, kohya: a LoRA file; pipeline: the merged diffusers folder; single_file: the merged checkpoint in its original layout."""
    output: str | None = None
    """What to write: a .safetensors file, or a folder for pipeline (and, if you like, for diffusers)."""
    lora_scale: float = 1.0
    """Strength of the adapter, written into what is exported."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp32"
    """Dtype of the exported weights; fp16 and bf16 halve the size."""
    overwrite: bool = False
    """Replace what lies at output."""

    def __post_init__(self) -> None:
        if bool(self.lora) == bool(self.aligned):
            raise ValueError(f"lora is {self.lora!r} and aligned {self.aligned!r}; give one of the two")
        if self.format is None:
            raise ValueError("format is not given; accepted: diffusers, kohya (LoRA files), pipeline, single_file (merged models)")
        if self.output is None:
            raise ValueError("output is not given; add --output FILE.safetensors, or a folder for format pipeline")
        if self.format in ("kohya", "single_file") and not self.output.endswith(".safetensors"):
            raise ValueError(f"output is {self.output!r}; format {self.format} writes a file whose name ends in .safetensors")
        if self.format == "pipeline" and self.output.endswith(".safetensors"):
            raise ValueError(f"output is {self.output!r}; format pipeline writes a folder")
        if self.aligned:
            self._check_aligned()
        elif self.pretrained_model_name_or_path is None:
            _check_unused(self, ("revision", "variant", "single_file_config"), "the base model is the run's own; give it to change that")

    def _check_aligned(self) -> None:
        if self.format in LORA_FORMATS:
            raise ValueError(f"format is {self.format}, a LoRA file, but aligned is a complete model; use format pipeline or single_file")
        unused = ("pretrained_model_name_or_path", "revision", "variant", "lora_scale")
        _check_unused(self, unused, "aligned is a complete model, which needs none; leave it out")


def _check_unused(config: ExportConfig, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(config, name) != getattr(ExportConfig, name):
            raise ValueError(f"{name} is {getattr(config, name)!r}, but {reason}")


def export(config: ExportConfig) -> int:
    """Load, write, read back, and only then put the result where it was asked for.

    Raises ValueError for what cannot be loaded or written, and when what was read back differs.
    """
    target = target_path(config)
    backbone = load_aligned(config)
    with drafting(target) as draft:
        lines = write_lora(config, backbone, draft) if config.format in LORA_FORMATS else write_merged(config, backbone, draft)
    print("\n".join([*lines, f"{config.format}: {target} ({size_of(target) / 1e6:.4g} MB)"]))
    return 0


def target_path(config: ExportConfig) -> Path:
    """The file or folder that will appear. Raises ValueError when something lies there that must not be replaced."""
    output = Path(str(config.output))
    target = output / LORA_FILE if config.format == "diffusers" and output.suffix != ".safetensors" else output
    if not (target.exists() or target.is_symlink()):
        return target
    if not config.overwrite:
        raise ValueError(f"output {str(target)!r} exists; add --overwrite to replace it, or choose another output")
    is_ours = (target / "model_index.json").is_file() if config.format == "pipeline" else target.is_file()
    if not is_ours:
        kind = "a pipeline folder" if config.format == "pipeline" else "a file"
        raise ValueError(f"output {str(target)!r} is not {kind} and is not replaced; choose another output")
    return target


def load_aligned(config: ExportConfig) -> Backbone:
    """The aligned model, or the base with the adapter "default". Raises ValueError for what cannot be loaded."""
    if config.aligned:
        if (Path(config.aligned) / LORA_FILE).exists() and not (Path(config.aligned) / "model_index.json").exists():
            raise ValueError(f"aligned {config.aligned!r} holds a LoRA and no pipeline; use --lora {config.aligned}")
        return as_backbone(load_pipeline(config.aligned, single_file_config=config.single_file_config), config.aligned)
    lora = str(config.lora)
    if config.pretrained_model_name_or_path:
        source = config.pretrained_model_name_or_path
        pipeline = load_pipeline(source, config.revision, config.variant, single_file_config=config.single_file_config)
    else:
        source, pipeline = base_of_run(Path(lora))
    backbone = as_backbone(pipeline, source)
    load_adapter(pipeline, lora, "lora")
    scale_adapter(pipeline, config.lora_scale)
    return backbone


def base_of_run(place: Path) -> tuple[str, DiffusionPipeline]:
    """What the run in this folder started from, by name and as a pipeline: with its unet_init, and a start_lora merged as it was.

    Raises ValueError when there is no run, or its parts have moved.
    """
    stored = (place if place.is_dir() else place.parent) / "diffpref_config.yaml"
    if not stored.is_file():
        raise ValueError(
            f"pretrained_model_name_or_path is not given, and {str(place)!r} has no diffpref_config.yaml that names it; "
            "add --pretrained_model_name_or_path FOLDER_OR_HUB_ID, the model that the LoRA was trained on"
        )
    settings = yaml.safe_load(stored.read_text()) or {}
    own = ("single_file_config", "unet_init", "prediction_type", "rescale_betas_zero_snr")
    options: dict[str, Any] = {name: settings.get(name) for name in own} | {"vae": settings.get("pretrained_vae_model_name_or_path")}
    source = str(settings["pretrained_model_name_or_path"])
    pipeline = load_pipeline(source, settings.get("revision"), settings.get("variant"), **options)
    if settings.get("start_lora") and settings.get("start_lora_as", "base") == "base":
        merge_lora(pipeline, settings["start_lora"], "start_lora")
    return source, pipeline


def read_back(pipeline: DiffusionPipeline, path: Path) -> None:
    """Load a LoRA file as plain diffusers does, into the adapter "default". Raises ValueError when diffusers cannot."""
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="default", use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise unequal(f"diffusers could not load it ({' '.join(str(error).split())})") from error
    for part in adapted_parts(pipeline).values():
        own_memory(part)


def own_memory(part: nn.Module) -> None:
    """Copy the adapter's weights out of the mapped file, where they may lie unaligned: torch then rounds differently."""
    for name, p in part.named_parameters():
        if "lora_" in name:
            p.data = p.data.clone()


def scale_adapter(pipeline: DiffusionPipeline, scale: float) -> None:
    """Multiply the adapter's contribution. Raises ValueError for DoRA, which has no strength: its magnitudes stay."""
    configs: list[Any] = [part.peft_config for part in adapted_parts(pipeline).values()]
    if scale != 1 and any(config["default"].use_dora for config in configs):
        raise ValueError(f"lora_scale is {scale}, but the adapter is a DoRA, whose magnitudes do not scale with it; leave it out")
    for w in adapter_of(pipeline).values():
        w.up.mul_(scale)


def adapter_of(pipeline: DiffusionPipeline) -> dict[str, LoraWeights]:
    """The adapter "default" of all parts by part and layer; the tensors are the adapter's own."""
    return {f"{name}.{layer}": w for name, part in adapted_parts(pipeline).items() for layer, w in lora_layers(part)}


def write_lora(config: ExportConfig, backbone: Backbone, draft: Path) -> list[str]:
    """Write the adapter as a LoRA file, read it back through diffusers into the same base, and say what was compared."""
    pipeline, dtype = backbone.pipeline, DTYPES[config.dtype]
    for part in adapted_parts(pipeline).values():
        round_adapter(part, dtype)
    check_finite(pipeline, config.dtype)
    before = {name: (w.down.clone(), w.up * w.scale) for name, w in adapter_of(pipeline).items()}
    with_adapter = prediction(backbone)
    if config.format == "kohya":
        state = {name: x if name.endswith(".alpha") else x.to(dtype) for name, x in kohya_state(pipeline).items()}
        save_file(state, draft, metadata=kohya_metadata(pipeline, state, draft.stem))
    else:
        for part in adapted_parts(pipeline).values():
            cast_adapter(part, dtype)
        save_lora(pipeline, draft.parent)
        (draft.parent / LORA_FILE).replace(draft)
    pipeline.unload_lora_weights()
    without = prediction(backbone)
    read_back(pipeline, draft)
    after, rounding = adapter_of(pipeline), ROUNDING[config.dtype]
    for name, (down, up) in before.items():
        w = after.get(name)
        if w is None or not (torch.equal(w.down, down) and torch.allclose(w.up * w.scale, up, rtol=rounding, atol=0)):
            raise unequal(f"layer {name} is {'lost' if w is None else 'another one'}")
    difference = largest(prediction(backbone) - with_adapter)
    if not difference <= rounding * largest(with_adapter):
        raise unequal(f"the UNet's output differs by {difference:.3g}")
    return [
        f"{len(before)} layers, {config.dtype}; read back by diffusers: largest difference of the UNet's output {difference:.3g} "
        f"(the adapter changes it by {largest(with_adapter - without):.3g})"
    ]


def write_merged(config: ExportConfig, backbone: Backbone, draft: Path) -> list[str]:
    """Write the model with the adapter in its weights, read it back through diffusers, and say what was compared."""
    pipeline, dtype, lines = backbone.pipeline, DTYPES[config.dtype], []
    if config.format == "single_file":
        check_layout(pipeline)
    if config.lora:
        adapted = prediction(backbone)
        for part in adapted_parts(pipeline).values():
            merge_adapter(part)
        difference = largest(prediction(backbone) - adapted)
        if not difference <= ROUNDING["fp32"] * largest(adapted):
            raise unequal(f"merging changed the UNet's output by {difference:.3g}")
        lines = [f"merged: the UNet's output differs from that with a separate adapter by {difference:.3g}"]
    for part in networks(pipeline).values():
        part.to(dtype)
    check_finite(pipeline, config.dtype)
    expected = digests(pipeline)
    if config.format == "pipeline":
        save_pipeline(pipeline, draft)
    else:
        save_file(to_original_layout(pipeline), draft, metadata={"format": "pt"} | modelspec(pipeline, draft.stem))
        save_configs(pipeline, draft.parent / "configs")
    for part in networks(pipeline).values():
        part.to("meta")  # gives the memory to the copy that is read back
    if config.format == "pipeline":
        found = digests(DiffusionPipeline.from_pretrained(draft, torch_dtype=dtype))
    else:
        found = digests(type(pipeline).from_single_file(str(draft), config=str(draft.parent / "configs"), torch_dtype=dtype))
    differing = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    if differing:
        raise unequal(f"{len(differing)} of {len(expected)} weights differ, first {min(differing)}")
    return [*lines, f"{len(expected)} weights, {config.dtype}; read back by diffusers: all equal"]


def check_layout(pipeline: DiffusionPipeline) -> None:
    """Raises ValueError for text encoders of one width, which readers of the single-file layout tell apart by it."""
    encoders = [part for name, part in networks(pipeline).items() if name.startswith("text_encoder")]
    widths = [encoder.config.hidden_size for encoder in encoders]  # type: ignore[union-attr]
    if len(set(widths)) < len(widths):
        raise ValueError(
            f"format is single_file, but both text encoders are {widths[0]} wide: readers tell them apart by their width "
            "(768 and 1280 in SDXL); use format pipeline"
        )


def networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts with weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def cast_adapter(part: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of the adapter's weights alone."""
    for name, p in part.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype)


def round_adapter(part: nn.Module, dtype: torch.dtype) -> None:
    """Round the adapter's weights to what `dtype` can hold; they stay float32."""
    cast_adapter(part, dtype)
    cast_adapter(part, torch.float32)


def check_finite(pipeline: DiffusionPipeline, dtype: str) -> None:
    """Raises ValueError for weights that overflowed in the export's dtype, or were damaged before."""
    for part, module in networks(pipeline).items():
        for name, x in module.state_dict().items():
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise ValueError(f"weight {part}.{name} is not finite in dtype {dtype}; use --dtype bf16 or fp32, or a sound checkpoint")


@torch.no_grad()
def prediction(backbone: Backbone) -> Tensor:
    """What the model predicts for a fixed prompt, noise and timestep: text encoders and UNet, in float32."""
    cond = backbone.encode_prompts(["a red circle on a table"])
    unet = backbone.denoiser.config
    if cond.pooled_prompt_embeds is not None:
        numbers = (unet.projection_class_embeddings_input_dim - cond.pooled_prompt_embeds.shape[-1]) // unet.addition_time_embed_dim
        cond = Conditioning(cond.prompt_embeds, cond.pooled_prompt_embeds, torch.full((1, 1, numbers), 512.0))
    side = 2 ** len(unet.down_block_types)
    x_t = torch.randn(1, 1, unet.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    return backbone.predictor(backbone.denoiser)(x_t, torch.tensor([[500]]), cond)


def largest(x: Tensor) -> float:
    """Largest absolute value; NaN if there is one."""
    return float(x.abs().max())


def digests(pipeline: DiffusionPipeline) -> dict[str, str]:
    """SHA-256 of every weight's bytes by part and name, so that a model can be compared after it has left the memory."""
    found = {}
    for part, module in networks(pipeline).items():
        for name, x in module.state_dict().items():
            data = b"" if x.is_meta else x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()  # meta: not in the file
            found[f"{part}.{name}"] = hashlib.sha256(data).hexdigest()
    return found


def unequal(what: str) -> ValueError:
    """The error for a file that does not read back as it was written."""
    return ValueError(
        f"the export was checked by reading it back, and {what}; nothing was kept. The installed diffusers ({diffusers.__version__}) "
        "may read this kind of adapter wrongly: try --format pipeline or single_file, which hold no adapter, and report the case"
    )


@contextmanager
def drafting(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target for a file or folder of the same name, moved there at the end and removed in any case."""
    hidden = target.parent / f".tmp-export-{os.getpid()}"
    try:
        hidden.mkdir(parents=True)
        yield hidden / target.name
        if target.is_dir():
            target.replace(hidden / "replaced")
        (hidden / target.name).replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"output {str(target)!r} could not be written ({reason}); choose another output, or make room") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
