"""A UNet or an autoencoder from somewhere else, for a model whose own one it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from diffpref.models.family import one_line
from diffpref.models.files import check_fits, read_state, without_prefix
from diffpref.models.single_file import UNET, VAE, original_names

UNET_SETTING, VAE_SETTING = "unet_init", "pretrained_vae_model_name_or_path"
NO_MATTER = ("sample_size", "upcast_attention", "dropout")
"""Entries of a UNet's config that do not change which weights it can take."""


def load_unet(source: str, base: Mapping[str, Any], variant: str | None) -> UNet2DConditionModel:
    """A UNet with exactly the architecture of `base`, the config of the model that it goes into.

    source: a UNet folder, a pipeline folder, a hub id of either, or a state dict in diffusers' or the original names. Raises
    ValueError for another architecture, a missing, a surplus or a misshapen weight.
    """
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(dict(base))
    if not Path(source).is_file():
        other = _load_part(UNet2DConditionModel, source, "unet", variant, UNET_SETTING)
        for name, value in unet.config.items():
            found = other.config.get(name)
            if not name.startswith("_") and name not in NO_MATTER and _plain(found) != _plain(value):
                raise ValueError(f"{UNET_SETTING} {source!r} is another kind of UNet: its {name} is {found}, the model's is {value}")
        return other
    state = _unet_state(read_state(Path(source), UNET_SETTING), unet)
    wanted = {name: tuple(x.shape) for name, x in unet.state_dict().items()}
    remedy = "give the weights of a UNet of the same model (a LoRA belongs to start_lora)"
    check_fits({name: tuple(x.shape) for name, x in state.items()}, wanted, UNET_SETTING, source, remedy)
    unet.load_state_dict(state, assign=True)
    return unet


def _unet_state(state: dict[str, Tensor], unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A UNet's weights in diffusers' names, without the prefixes of wrappers and out of a complete single-file checkpoint."""
    original = {name: x for name, x in state.items() if name.startswith(UNET)}
    if not original and any(name.startswith("input_blocks.") for name in state):
        original = {UNET + name: x for name, x in state.items()}
    return _renamed_back(original, unet) if original else without_prefix(state, "module.", "unet.")


def _renamed_back(state: dict[str, Tensor], module: UNet2DConditionModel | AutoencoderKL) -> dict[str, Tensor]:
    """Original names to diffusers'; those that the module has no weight for stay as they are, for the check that follows."""
    names = {original: name for name, original in original_names(module).items()}
    return {names.get(name, name): x for name, x in state.items()}


def load_vae(source: str, base: Mapping[str, Any] | None, latent_channels: int, variant: str | None) -> AutoencoderKL:
    """An autoencoder for a model whose own one has the config `base`, None if it has none.

    source: a folder, a pipeline folder, a hub id of either, or a .safetensors file in diffusers' or the original names, which takes
    over `base`. Raises ValueError unless it makes latents of `latent_channels` channels in the scale of `base`: latents in another
    scale are something that the UNet was not trained on.
    """
    path = Path(source)
    vae = _vae_from_file(path, base) if path.is_file() else _load_part(AutoencoderKL, source, "vae", variant, VAE_SETTING)
    if vae.config.latent_channels != latent_channels:
        raise ValueError(
            f"{VAE_SETTING} {source!r} makes latents of {vae.config.latent_channels} channels, the UNet takes {latent_channels}; "
            "give an autoencoder of the same family"
        )
    if base is None:
        return vae
    with init_empty_weights():
        wanted = AutoencoderKL.from_config(dict(base)).config.scaling_factor  # older configs rely on its default
    if wanted != vae.config.scaling_factor:
        raise ValueError(
            f"{VAE_SETTING} {source!r} has scaling_factor {vae.config.scaling_factor}, the model's own autoencoder {wanted} "
            "(SD: 0.18215, SDXL: 0.13025): its latents would be strange to the UNet. Give an autoencoder of the same family, or mend "
            "scaling_factor in its config.json if only that is wrong"
        )
    return vae


def _vae_from_file(path: Path, base: Mapping[str, Any] | None) -> AutoencoderKL:
    if base is None:
        raise ValueError(f"{VAE_SETTING} {str(path)!r} is a file without a config, and the model has none for it; give a folder")
    state = read_state(path, VAE_SETTING)
    with init_empty_weights():
        vae = AutoencoderKL.from_config(dict(base))
    if not any(".down_blocks." in name for name in state):
        original = {name: x for name, x in state.items() if name.startswith(VAE)}
        original = original or {VAE + name: x for name, x in state.items() if not name.startswith(("loss.", "model_ema."))}
        state = _renamed_back(original, vae)
    own = vae.state_dict()
    state = {n: x[:, :, 0, 0] if n in own and own[n].ndim == 2 and x.shape[2:] == (1, 1) else x for n, x in state.items()}
    wanted, found = ({name: tuple(x.shape) for name, x in weights.items()} for weights in (own, state))
    check_fits(found, wanted, VAE_SETTING, str(path), "give an autoencoder of the same family (a .safetensors file or a folder)")
    vae.load_state_dict(state, assign=True)
    return vae


def _load_part(cls: type, source: str, part: str, variant: str | None, setting: str) -> Any:
    """A complete model of class `cls` from its own folder, the folder of a pipeline, or a hub id of either."""
    folder = Path(source)
    places = [part if (folder / part).is_dir() else None] if folder.is_dir() else [part, None]
    problem: Exception | None = None
    for place in places:
        for kind in dict.fromkeys((None, variant)):
            try:
                return _load_strictly(cls, source, place, kind)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                problem = problem or error
    raise ValueError(
        f"{setting} {source!r} could not be loaded as {cls.__name__} ({one_line(problem or ValueError())}); give a folder with config.json "
        f"and .safetensors weights, the folder of a pipeline that has one in {part}/, a hub id, or a file"
    ) from problem


def _load_strictly(cls: Any, source: str, place: str | None, variant: str | None) -> Any:
    """from_pretrained that takes neither another class nor missing or surplus weights."""
    name = cls.load_config(source, subfolder=place).get("_class_name")
    if name != cls.__name__:
        raise ValueError(f"it is a {name}")
    model, info = cls.from_pretrained(source, subfolder=place, variant=variant, use_safetensors=True, output_loading_info=True)
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or surplus:
        raise ValueError(f"{len(missing)} weights missing, {len(surplus)} surplus, first {[*missing, *surplus][0]}")
    return model


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
