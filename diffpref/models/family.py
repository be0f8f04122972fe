"""Which family a model belongs to, from its configs or the names of its weights; never from the name of a file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig

from diffpref.models.files import PICKLED, Shapes, read_shapes
from diffpref.models.hub_access import check_hub_answers
from diffpref.models.lora import LORA_FILE
from diffpref.models.single_file import CLIP_SD, CLIP_XL, OPEN_CLIP_REFINER, OPEN_CLIP_SD, OPEN_CLIP_XL, UNET, VAE

SETTING = "pretrained_model_name_or_path"
SUPPORTED = "SD1.x, SD2.x, SDXL and the SDXL refiner are supported"


CACHED = ". If a download broke off, repeat the command; what is in the hub's cache is used with HF_HUB_OFFLINE=1"


def model_family(source: str, revision: str | None = None) -> str:
    """ "sd", "sdxl" or "sdxl_refiner". Reads configs or a file's header, no weights.

    source: a diffusers folder, a hub id or a single .safetensors checkpoint. Raises ValueError with the remedy for anything else:
    a LoRA, a bare UNet, a pickle, another kind of model.
    """
    if Path(source).is_file():
        return family_of_file(read_checkpoint_shapes(source), source)
    index = read_index(source, revision)
    if not index.get("unet", [None])[0]:
        raise ValueError(f"{SETTING} {source!r} is a {index.get('_class_name')} without a UNet; {SUPPORTED}")
    check_part(source, index, "unet")
    try:
        unet = UNet2DConditionModel.load_config(source, subfolder="unet", revision=revision)
        pooled = 0
        if unet.get("addition_embed_type") == "text_time":
            check_part(source, index, "text_encoder_2")
            pooled = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder_2", revision=revision).projection_dim
    except Exception as error:  # as in read_index
        raise ValueError(f"{SETTING} {source!r}: the config of a part cannot be read ({one_line(error)}); download it again") from error
    return family_of_config(unet, pooled, source)


def family_of_config(unet: Mapping[str, Any], pooled: int, source: str) -> str:
    """The family of a UNet's config; `pooled` is the width of the second text encoder's projection, for SDXL.

    SDXL embeds six numbers about a picture's size and crop, its refiner five. Raises ValueError for other UNets.
    """
    kind = unet.get("addition_embed_type")
    if kind is None and unet.get("class_embed_type") is None:
        return "sd"
    if kind == "text_time":
        numbers = (unet["projection_class_embeddings_input_dim"] - pooled) / unet["addition_time_embed_dim"]
        if numbers in (5, 6):
            return "sdxl" if numbers == 6 else "sdxl_refiner"
        raise ValueError(f"{SETTING} {source!r}: a UNet that embeds {numbers:g} numbers of size and crop; {SUPPORTED}")
    raise ValueError(
        f"{SETTING} {source!r}: UNet with addition_embed_type {kind!r}, class_embed_type {unet.get('class_embed_type')!r}; {SUPPORTED}"
    )


def family_of_file(shapes: Shapes, source: str) -> str:
    """The family of a single-file checkpoint, from the names of its weights. Raises ValueError unless it is a complete model."""
    if not any(name.startswith(UNET) for name in shapes):
        raise ValueError(f"{SETTING} {source!r} {_what_else(shapes)}")
    encoders = {OPEN_CLIP_XL: "sdxl", OPEN_CLIP_REFINER: "sdxl_refiner", CLIP_SD: "sd", OPEN_CLIP_SD: "sd"}
    family = next((name for prefix, name in encoders.items() if any(key.startswith(prefix) for key in shapes)), None)
    if family is None:
        raise ValueError(
            f"{SETTING} {source!r} holds a UNet but no text encoder; give a complete checkpoint, or a complete model as "
            f"{SETTING} and this file as unet_init"
        )
    if family == "sdxl" and not any(name.startswith(CLIP_XL) for name in shapes):
        raise ValueError(f"{SETTING} {source!r} lacks the first text encoder of SDXL ({CLIP_XL}...); give a complete checkpoint")
    return family


def has_vae(shapes: Shapes) -> bool:
    """Whether a single-file checkpoint holds an autoencoder."""
    return any(name.startswith(VAE) for name in shapes)


def _what_else(shapes: Shapes) -> str:
    """What a file without an original-layout UNet is, and where it belongs."""
    if any("lora" in name or "dora" in name or "lokr" in name or "hada" in name for name in shapes):
        return f"is a LoRA and no model; give its base as {SETTING}, and this file as start_lora (train) or lora (generate)"
    if any(name.removeprefix("unet.").startswith(("down_blocks.", "conv_in.")) for name in shapes):
        return f"holds a UNet in diffusers' layout and nothing else; give a complete model as {SETTING}, and this file as unet_init"
    if any(name.removeprefix(VAE).startswith(("encoder.", "decoder.")) for name in shapes):
        return f"is an autoencoder and no model; give a complete model as {SETTING}, and this file as pretrained_vae_model_name_or_path"
    first = next(iter(sorted(shapes)), "nothing")
    return f"is no SD or SDXL checkpoint (it begins with {first}, and nothing begins with {UNET}); {SUPPORTED}"


def read_checkpoint_shapes(source: str) -> Shapes:
    """Header of a single-file checkpoint. Raises ValueError for pickles and damaged files."""
    path = Path(source)
    if path.suffix == ".safetensors":
        return read_shapes(path, SETTING)
    if path.suffix in (".ckpt", *PICKLED):
        raise ValueError(
            f"{SETTING} {source!r} is a pickle, which could run code; convert it to .safetensors where you trust it "
            "(a UNet's state dict alone belongs to unet_init)"
        )
    raise ValueError(f"{SETTING} {source!r} is a file of another kind; give a .safetensors checkpoint, a diffusers folder or a hub id")


def read_index(source: str, revision: str | None) -> dict[str, Any]:
    """model_index.json of a pipeline. Raises ValueError that says what a folder without one is."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        if (folder / LORA_FILE).exists() or (folder / "adapter_config.json").exists():
            raise ValueError(
                f"{SETTING} {source!r} is the folder of a LoRA and holds no model; give the LoRA's base as {SETTING}, and the folder "
                "as start_lora (train) or lora (generate)"
            )
        if (folder / "config.json").exists() and any(folder.glob("diffusion_pytorch_model*")):
            raise ValueError(
                f"{SETTING} {source!r} is one part of a model (config.json without model_index.json); give the complete model as "
                f"{SETTING}, and a UNet as unet_init or an autoencoder as pretrained_vae_model_name_or_path"
            )
    check_hub_answers(SETTING, source, revision)
    try:
        return dict(DiffusionPipeline.load_config(source, revision=revision))
    except Exception as error:  # the client of the hub passes on its transport's errors, whose types differ between its versions
        raise unreadable(source, error) from error


def check_part(source: str, index: Mapping[str, Any], name: str) -> None:
    """Raises ValueError unless the index names a part, and a local folder has it."""
    library, cls = index.get(name) or (None, None)
    if library is None:
        raise ValueError(f"{SETTING} {source!r} has no {name} (its model_index.json names none); give a complete model")
    if Path(source).is_dir() and not (Path(source) / name).is_dir():
        raise ValueError(
            f"{SETTING} {source!r} is incomplete: model_index.json names {name} ({cls}), but there is no folder {name}; copy or download "
            "the whole model"
        )


def unreadable(source: str, error: Exception) -> ValueError:
    """What to say when diffusers cannot read a pipeline; its own messages run over several lines."""
    place = "folder" if Path(source).exists() else "local folder or hub id"
    return ValueError(
        f"{SETTING} {source!r} could not be loaded as a diffusers pipeline ({one_line(error)}). "
        f"Give a {place} that holds model_index.json and .safetensors weights, as written by save_pretrained, "
        f"or a single .safetensors checkpoint{'' if Path(source).exists() else CACHED}"
    )


def one_line(error: Exception) -> str:
    """The message of an exception without line breaks."""
    return " ".join(str(error).split())
