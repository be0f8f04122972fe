"""A complete pipeline from a diffusers folder, a hub id or a single file, with parts of it and its noise schedule replaced."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from torch import nn

from diffpref.models.family import (
    SETTING,
    check_part,
    has_vae,
    model_family,
    one_line,
    read_checkpoint_shapes,
    read_index,
    unreadable,
)
from diffpref.models.files import Shapes, check_fits, check_folder_files
from diffpref.models.hub_access import downloaded
from diffpref.models.outlines import is_outline, outlines
from diffpref.models.parts import load_unet, load_vae
from diffpref.models.single_file import OPEN_CLIP_SD, UNET, V_PREDICTION_KEY, VAE, ZERO_SNR_KEY, single_file_shapes

CLASSES: Mapping[str, type[DiffusionPipeline]] = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sdxl_refiner": diffusers.StableDiffusionXLImg2ImgPipeline,
}
"""Pipeline of a single file of each family."""
PUBLIC_CONFIGS: Mapping[str, str] = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl_refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
}
"""Whose configs and tokenizers a single file gets when single_file_config is not given."""
ENCODERS: Mapping[str, tuple[str, ...]] = {
    "sd": ("text_encoder", "tokenizer"),
    "sdxl": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "sdxl_refiner": ("text_encoder_2", "tokenizer_2"),
}
"""Parts of a pipeline beside UNet, autoencoder and scheduler that each family needs."""
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


def load_pipeline(
    source: str,
    revision: str | None = None,
    variant: str | None = None,
    *,
    single_file_config: str | None = None,
    vae: str | None = None,
    unet_init: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    dtype: torch.dtype = torch.float32,
    leave_out: bool = False,
) -> DiffusionPipeline:
    """Load a model from safetensors only, the autoencoder in float32, the rest in `dtype`; its scheduler says what was asked for.

    source: a diffusers folder, a hub id or a single .safetensors checkpoint. The other arguments are the settings of the same names
    (vae: pretrained_vae_model_name_or_path). leave_out: of a folder, autoencoder and text encoders come without weights, see `complete`.
    Raises ValueError naming the setting that cannot work, and the remedy.
    """
    family = model_family(source, revision)
    if Path(source).is_file():
        for name, value in {"revision": revision, "variant": variant}.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r}, but {SETTING} {source!r} is a single file, which has none; leave it out")
        shapes = read_checkpoint_shapes(source)
        configs = _config_folder(source, family, shapes, single_file_config)
        parts = _replaced_parts(configs, None, None, vae, unet_init)
        pipeline = _from_file(source, family, configs, shapes, parts)
        prediction_type, rescale_betas_zero_snr = _marked(shapes, source, prediction_type, rescale_betas_zero_snr)
    else:
        if single_file_config is not None:
            raise ValueError(f"single_file_config is {single_file_config!r}, but {SETTING} {source!r} has its own configs; leave it out")
        parts = _replaced_parts(source, revision, variant, vae, unet_init)
        if leave_out:
            parts = outlines(Path(source), read_index(source, revision), variant, dtype) | parts
        pipeline = _from_folder(source, family, revision, variant, parts, dtype)
    pipeline.set_progress_bar_config(disable=True)
    set_dtype(pipeline, dtype)
    pipeline.scheduler = with_schedule(pipeline.scheduler, prediction_type, rescale_betas_zero_snr)
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        raise ValueError(
            f"{SETTING} {source!r}: the UNet takes {channels} channels and the autoencoder makes {latents}; "
            "models for inpainting, editing or enlarging are not supported"
        )
    return pipeline


def set_dtype(pipeline: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Networks in `dtype` and in evaluation mode; the autoencoder stays in float32, and casts what the pipeline hands it to decode."""
    vae = getattr(pipeline, "vae", None)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float32 if part is vae else dtype).eval()
    _cast_before_decoding(vae, dtype)


def complete(pipeline: DiffusionPipeline, source: str, variant: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parts that were left out their weights, in the folder's files. Raises ValueError when they cannot be read."""
    empty = [name for name, part in pipeline.components.items() if is_outline(part)]
    if not empty:
        return
    others = {name: part for name, part in pipeline.components.items() if name not in empty and part is not None}
    whole = _from_folder(source, model_family(source), None, variant, others, dtype)
    for name in empty:
        part = getattr(whole, name)
        nn.Module.to(part, device, torch.float32 if name == "vae" else dtype).requires_grad_(False).eval()
        pipeline.register_modules(**{name: part})
    if "vae" in empty:
        _cast_before_decoding(pipeline.vae, dtype)


def _cast_before_decoding(vae: Any, dtype: torch.dtype) -> None:
    if vae is not None and dtype != torch.float32:
        first = vae.post_quant_conv or vae.decoder.conv_in
        first.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.weight.dtype),))


def needs_picture(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline starts from a picture, as the SDXL refiner does, and not from a prompt alone."""
    return "image" in inspect.signature(type(pipeline).__call__).parameters


def with_schedule(scheduler: Any, prediction_type: str | None, zero_snr: bool | None) -> Any:
    """The scheduler with another parameterisation or terminal SNR, where these are given and differ from its own.

    A schedule that ends in pure noise is sampled from its very end (timestep_spacing "trailing", arXiv:2305.08891); a scheduler
    that cannot be rescaled is replaced by DDIM with the same betas.
    """
    config = scheduler.config
    changes: dict[str, Any] = {}
    if prediction_type is not None and prediction_type != config.prediction_type:
        changes["prediction_type"] = prediction_type
    if zero_snr is not None and zero_snr != bool(config.get("rescale_betas_zero_snr")):
        changes["rescale_betas_zero_snr"] = zero_snr
        if zero_snr:
            changes["timestep_spacing"] = "trailing"
    if not changes:
        return scheduler
    can_rescale = "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
    cls = type(scheduler) if can_rescale or not zero_snr else diffusers.DDIMScheduler
    return cls.from_config(config, **changes)


def _replaced_parts(
    configs: str, revision: str | None, variant: str | None, vae: str | None, unet_init: str | None
) -> dict[str, nn.Module]:
    """The parts that are loaded from elsewhere, so that the model's own ones need not be read."""
    parts: dict[str, nn.Module] = {}
    if vae is None and unet_init is None:
        return parts
    unet = UNet2DConditionModel.load_config(configs, subfolder="unet", revision=revision)
    if unet_init is not None:
        parts["unet"] = load_unet(unet_init, unet, variant)
    if vae is not None:
        try:
            own = AutoencoderKL.load_config(configs, subfolder="vae", revision=revision)
        except OSError:  # a model that comes without one
            own = None
        parts["vae"] = load_vae(vae, own, unet["in_channels"], variant)
    return parts


def _from_folder(
    source: str, family: str, revision: str | None, variant: str | None, parts: Mapping[str, nn.Module], dtype: torch.dtype
) -> DiffusionPipeline:
    index = read_index(source, revision)
    _check_parts(source, index, family, parts)
    extra: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    if dtype != torch.float32:  # so that no larger copy is ever in memory; under its old name, which all versions know
        extra["torch_dtype"] = {"vae": torch.float32, "default": dtype}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
            given = {"revision": revision, "variant": variant, "use_safetensors": True, **parts, **extra}
            return downloaded(source, lambda: DiffusionPipeline.from_pretrained(source, **given))
    except Exception as error:  # those of safetensors and of the hub's transport too
        if Path(source).is_dir():
            check_folder_files(Path(source), variant, SETTING)
        raise unreadable(source, error) from error


def _check_parts(source: str, index: Mapping[str, Any], family: str, replaced: Mapping[str, nn.Module]) -> None:
    """Every part that the family needs or the index names has to be there. Raises ValueError naming the part."""
    for name in ENCODERS[family]:
        check_part(source, index, name)
    for name, entry in index.items():
        if isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] and name not in (*replaced, *NOT_NEEDED):
            check_part(source, index, name)


def _config_folder(source: str, family: str, shapes: Shapes, given: str | None) -> str:
    """A local folder with the configs and tokenizers of a single file. Raises ValueError naming what to give."""
    what = "a folder or hub id of a diffusers model of the same family: model_index.json, configs and tokenizers are read, no weights"
    if given is None and any(name.startswith(OPEN_CLIP_SD) for name in shapes):
        raise ValueError(
            f"{SETTING} {source!r} is a single file of SD2.x, which does not say whether the UNet predicts noise (512 pixels) or v "
            f"(768 pixels); add single_file_config, {what}; its scheduler decides"
        )
    place = PUBLIC_CONFIGS[family] if given is None else given
    if not Path(place).is_dir():
        try:
            place = snapshot_download(place, allow_patterns=["*.json", "*/*.json", "*.txt", "*/*.txt"])
        except (OSError, ValueError) as error:
            asked = f"single_file_config {place!r}" if given else f"single_file_config is not given, and the public {place!r}"
            raise ValueError(
                f"{asked} is neither in the hub cache nor can it be downloaded ({one_line(error)}); {SETTING} {source!r} is a "
                f"single file without configs: give single_file_config, {what}"
            ) from error
    found = model_family(place)
    if found != family:
        raise ValueError(f"single_file_config {place!r} is of the {found} family, {SETTING} {source!r} of {family}; give {what}")
    return place


def _from_file(source: str, family: str, configs: str, shapes: Shapes, parts: Mapping[str, nn.Module]) -> DiffusionPipeline:
    if "vae" not in parts and not has_vae(shapes):
        raise ValueError(f"{SETTING} {source!r} holds no autoencoder; add pretrained_vae_model_name_or_path")
    remedy = "give a complete checkpoint, or as single_file_config a model of the same architecture"
    for name, cls, prefix in (("unet", UNet2DConditionModel, UNET), ("vae", AutoencoderKL, VAE)):
        if name not in parts:
            with init_empty_weights():
                module = cls.from_config(cls.load_config(configs, subfolder=name))
            wanted = single_file_shapes(module)
            found = {n: x for n, x in shapes.items() if n.startswith(prefix) and (name == "unet" or n in wanted)}
            check_fits(found, wanted, SETTING, source, remedy)
    extra = {"safety_checker": None, "requires_safety_checker": False} if family == "sd" else {}
    try:
        pipeline = CLASSES[family].from_single_file(source, config=configs, **parts, **extra)
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        raise ValueError(
            f"{SETTING} {source!r} could not be loaded with the configs of {configs!r} ({one_line(error)}); {remedy}"
        ) from error
    for name, part in pipeline.components.items():
        empty = [weight for weight, x in part.named_parameters() if x.is_meta] if isinstance(part, nn.Module) else []
        if empty:
            raise ValueError(f"{SETTING} {source!r} lacks {len(empty)} weights of {name}, first {empty[0]}; {remedy}")
    return pipeline


def _marked(shapes: Shapes, source: str, prediction_type: str | None, zero_snr: bool | None) -> tuple[str | None, bool | None]:
    """What the file's markers say, if it has any. Raises ValueError when a setting contradicts them."""
    if V_PREDICTION_KEY in shapes:
        if prediction_type not in (None, "v_prediction"):
            raise ValueError(f"prediction_type is {prediction_type}, but {SETTING} {source!r} carries the mark v_pred; leave it out")
        prediction_type = "v_prediction"
    if ZERO_SNR_KEY in shapes:
        if zero_snr is False:
            raise ValueError(f"rescale_betas_zero_snr is false, but {SETTING} {source!r} carries the mark ztsnr; leave it out")
        zero_snr = True
    return prediction_type, zero_snr
