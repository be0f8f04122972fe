"""Every form in which people have models: folders, single files, variants, separate autoencoders, other UNet weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpref.models.backbone import as_backbone, check_finite, load_backbone, load_pipeline, model_family
from diffpref.models.single_file import UNET, VAE

KINDS = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "refiner": "sdxl_refiner"}
Make = Callable[..., DiffusionPipeline]
Folder = Callable[[str], Path]
SingleFile = Callable[..., Path]


def weights(module: nn.Module | DiffusionPipeline) -> dict[str, Tensor]:
    """Every weight by name."""
    if isinstance(module, nn.Module):
        return dict(module.state_dict())
    parts = {n: m for n, m in module.components.items() if isinstance(m, nn.Module)}
    return {f"{part}.{name}": x for part, m in parts.items() for name, x in m.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def copy_of(folder: Path, target: Path) -> Path:
    """A folder to break."""
    shutil.copytree(folder, target)
    return target


def change_json(path: Path, **changes: Any) -> None:
    """Overwrite entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Families


@pytest.mark.parametrize("kind", KINDS)
def test_family_of_folders_and_files_whatever_their_names(kind: str, folder_of: Folder, single_file: SingleFile, tmp_path: Path) -> None:
    misleading = copy_of(folder_of(kind), tmp_path / "sdxl-refiner-turbo-v2")
    for path in misleading.rglob("*.safetensors"):
        path.unlink()  # configs are enough
    assert model_family(str(misleading)) == KINDS[kind]
    assert model_family(str(single_file(kind))) == KINDS[kind]
    assert load_backbone(str(folder_of(kind))).family == KINDS[kind]


def test_other_unets_have_no_family(folder_of: Folder, tmp_path: Path) -> None:
    folder = copy_of(folder_of("sdxl"), tmp_path / "model")
    change_json(folder / "unet" / "config.json", projection_class_embeddings_input_dim=20 + 7 * 4)
    with pytest.raises(ValueError, match="embeds 7 numbers of size and crop; SD1"):
        model_family(str(folder))
    change_json(folder / "unet" / "config.json", addition_embed_type="image")
    with pytest.raises(ValueError, match="addition_embed_type 'image'"):
        model_family(str(folder))


def test_pipelines_without_a_unet_are_named(folder_of: Folder, tmp_path: Path) -> None:
    folder = copy_of(folder_of("sdxl"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index = {n: x for n, x in index.items() if n != "unet"} | {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(ValueError, match=r"is a StableDiffusion3Pipeline without a UNet; SD1\.x"):
        load_backbone(str(folder))


# Single files


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner"])
def test_single_files_are_the_model_without_a_difference(kind: str, folder_of: Folder, single_file: SingleFile) -> None:
    loaded = load_pipeline(str(single_file(kind)), single_file_config=str(folder_of(kind)))
    folder = load_pipeline(str(folder_of(kind)))
    assert type(loaded) is type(folder)
    assert_same(weights(loaded), weights(folder))
    assert loaded.scheduler.config["_class_name"] == folder.scheduler.config["_class_name"]
    prompts = ["a red circle", "two zebras"]
    backbones = [as_backbone(p, "x") for p in (loaded, folder)]
    conds = [b.encode_prompts(prompts) for b in backbones]
    assert torch.equal(conds[0].prompt_embeds, conds[1].prompt_embeds)


def test_half_precision_files_are_loaded_in_float32(folder_of: Folder, single_file: SingleFile) -> None:
    path = single_file("sdxl", lambda state: {name: x.half() for name, x in state.items()})
    loaded = load_pipeline(str(path), single_file_config=str(folder_of("sdxl")))
    assert {x.dtype for x in weights(loaded).values() if x.is_floating_point()} == {torch.float32}
    exact = weights(load_pipeline(str(folder_of("sdxl"))))
    assert_same(weights(loaded), {name: x.half().float() for name, x in exact.items()})


def test_the_schedule_of_a_file_is_that_of_its_configs_or_marks(folder_of: Folder, single_file: SingleFile) -> None:
    configs = str(folder_of("sdxl"))
    plain = load_pipeline(str(single_file("sdxl")), single_file_config=configs).scheduler.config
    assert (plain.prediction_type, plain.rescale_betas_zero_snr) == ("epsilon", False)
    marked = str(single_file("sdxl", prediction_type="v_prediction", rescale_betas_zero_snr=True))
    made = load_pipeline(marked, single_file_config=configs).scheduler.config
    assert (made.prediction_type, made.rescale_betas_zero_snr, made.timestep_spacing) == ("v_prediction", True, "trailing")
    only_v = load_pipeline(str(single_file("sdxl", prediction_type="v_prediction")), single_file_config=configs).scheduler.config
    assert (only_v.prediction_type, only_v.rescale_betas_zero_snr) == ("v_prediction", False)
    with pytest.raises(ValueError, match=r"prediction_type is epsilon, but .* v_pred"):
        load_pipeline(marked, single_file_config=configs, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr is false, but .* ztsnr"):
        load_pipeline(marked, single_file_config=configs, rescale_betas_zero_snr=False)


def without(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Drop the weights under these prefixes."""
    return lambda state: {name: x for name, x in state.items() if not name.startswith(prefixes)}


def only(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Keep the weights under a prefix, without it."""
    return lambda state: {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


BAD_FILES: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]] | None, str | None, list[str]]] = {
    "no configs": ("sdxl", None, None, ["single_file_config is not given", "stable-diffusion-xl-base-1.0", "folder or hub id of a"]),
    "SD2 without configs": ("sd2", None, None, ["SD2.x", "predicts noise", "add single_file_config"]),
    "configs that are nowhere": ("sd1", None, "no/such-model", ["single_file_config 'no/such-model'", "neither in the hub cache"]),
    "configs of another family": ("sdxl", None, "sd1", ["is of the sd family", "of sdxl"]),
    "configs of another architecture": ("sd1", None, "sd2", ["does not fit the model", "same architecture"]),
    "no text encoder": ("sd1", without("cond_stage_model."), "sd1", ["no text encoder", "unet_init"]),
    "one of two text encoders": ("sdxl", without("conditioner.embedders.0."), "sdxl", ["lacks the first text encoder"]),
    "no autoencoder": ("sd1", without(VAE), "sd1", ["no autoencoder", "pretrained_vae_model_name_or_path"]),
    "a missing weight": (
        "sd1",
        without(UNET + "out.2.weight"),
        "sd1",
        ["out.2.weight is missing (1 missing, 0 unexpected", "complete checkpoint"],
    ),
    "a missing weight of an encoder": (
        "sd1",
        without("cond_stage_model.transformer.text_model.final"),
        "sd1",
        ["lacks 2 weights of text_enc"],
    ),
    "weights without a place": (
        "sd1",
        lambda s: s | {UNET + "extra.weight": torch.zeros(1)},
        "sd1",
        ["extra.weight is no weight of the model", "1 unexpected"],
    ),
    "an autoencoder": ("sd1", only(VAE), "sd1", ["is an autoencoder and no model", "pretrained_vae_model_name_or_path"]),
    "something else": ("sd1", lambda s: {"blocks.0.weight": torch.zeros(1)}, "sd1", ["begins with blocks.0.weight"]),
    "a LoRA": ("sd1", lambda s: {"lora_unet_x.lora_up.weight": torch.zeros(1)}, "sd1", ["is a LoRA and no model", "start_lora"]),
    "a UNet of diffusers": ("sd1", lambda s: {"conv_in.weight": torch.zeros(1)}, "sd1", ["holds a UNet in diffusers' layout", "unet_init"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_no_model_say_what_they_are(case: str, folder_of: Folder, single_file: SingleFile) -> None:
    kind, edit, configs, expected = BAD_FILES[case]
    path = single_file(kind, edit)
    given = str(folder_of(configs)) if configs in KINDS else configs
    with pytest.raises(ValueError, match="pretrained_model_name_or_path") as caught:
        load_pipeline(str(path), single_file_config=given)
    for text in (*expected, repr(str(path))):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x10", b"<!DOCTYPE html>" * 99, b"\xff" * 4000], ids=["empty", "short", "page", "garbage"])
def test_garbage_under_the_name_of_a_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no complete safetensors file .* fetch it again"):
        load_pipeline(str(path), single_file_config="x")


def test_a_truncated_checkpoint(folder_of: Folder, single_file: SingleFile) -> None:
    path = single_file("sd1")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        load_pipeline(str(path), single_file_config=str(folder_of("sd1")))


@pytest.mark.parametrize(("name", "expected"), [("m.ckpt", "pickle"), ("m.pth", "pickle"), ("m.gguf", "another kind")])
def test_pickles_and_others_are_refused_unread(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=expected):
        load_pipeline(str(tmp_path / name))


@pytest.mark.parametrize(("setting", "value"), [("revision", "main"), ("variant", "fp16")])
def test_settings_that_a_file_cannot_have(setting: str, value: str, folder_of: Folder, single_file: SingleFile) -> None:
    with pytest.raises(ValueError, match=f"{setting} is '{value}', but .* single file"):
        load_pipeline(str(single_file("sd1")), single_file_config=str(folder_of("sd1")), **{setting: value})
    with pytest.raises(ValueError, match="single_file_config is 'x', but"):
        load_pipeline(str(folder_of("sd1")), single_file_config="x")


# Folders


@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
def test_variants_of_every_part(kind: str, folder_of: Folder, tmp_path: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(folder_of(kind))
    plain.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_pipeline(str(tmp_path / "half"), variant="fp16")
    assert_same(weights(loaded), {name: x.half().float() for name, x in weights(load_pipeline(str(folder_of(kind)))).items()})
    with pytest.raises(ValueError, match="could not be loaded"):
        load_pipeline(str(tmp_path / "half"), variant="bf16")


def no_second_encoder(folder: Path) -> None:
    """Named in the index, but not there."""
    shutil.rmtree(folder / "text_encoder_2")


def no_second_encoder_in_the_index(folder: Path) -> None:
    """Neither named nor there."""
    change_json(folder / "model_index.json", text_encoder=[None, None])


def no_vae(folder: Path) -> None:
    """Named in the index, but not there."""
    shutil.rmtree(folder / "vae")


def cut_encoder(folder: Path) -> None:
    """A download that broke off."""
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-30])


def lora_only(folder: Path) -> None:
    """What a LoRA run leaves."""
    shutil.rmtree(folder)
    folder.mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")


def unet_only(folder: Path) -> None:
    """A bare UNet at the root."""
    shutil.copytree(folder / "unet", folder.with_name("bare"))
    shutil.rmtree(folder)
    folder.with_name("bare").rename(folder)


def inpainting(folder: Path) -> None:
    """A UNet with five more input channels."""
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing text encoder": (no_second_encoder, ["names text_encoder_2 (CLIPTextModelWithProjection), but there is no folder"]),
    "missing text encoder in the index": (no_second_encoder_in_the_index, ["has no text_encoder"]),
    "missing autoencoder": (no_vae, ["names vae (AutoencoderKL), but there is no folder vae"]),
    "cut text encoder": (cut_encoder, ["text_encoder/model.safetensors", "no complete safetensors file"]),
    "LoRA folder": (lora_only, ["is the folder of a LoRA", "start_lora"]),
    "UNet folder": (unet_only, ["one part of a model", "unet_init"]),
    "inpainting": (inpainting, ["takes 9 channels", "inpainting"]),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folders_that_are_no_model_say_why(case: str, folder_of: Folder, tmp_path: Path) -> None:
    damage, expected = BAD_FOLDERS[case]
    folder = copy_of(folder_of("sdxl"), tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match="pretrained_model_name_or_path") as caught:
        load_backbone(str(folder))
    for text in (*expected, str(folder)):
        assert text in str(caught.value)


def test_files_of_other_variants_may_be_anything(folder_of: Folder, tmp_path: Path) -> None:
    folder = copy_of(folder_of("sdxl"), tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert_same(weights(load_pipeline(str(folder))), weights(load_pipeline(str(folder_of("sdxl")))))
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_pipeline(str(folder), variant="fp16")


def test_the_first_text_encoder_may_be_missing_only_by_name(folder_of: Folder, tmp_path: Path) -> None:
    folder = copy_of(folder_of("sdxl"), tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ValueError, match=r"names text_encoder \(CLIPTextModel\), but there is no folder text_encoder;"):
        load_pipeline(str(folder))


# Numbers that are not finite


@pytest.mark.parametrize(
    ("part", "weight", "expected"),
    [
        ("vae", "encoder.conv_in.weight", ["autoencoder", "sdxl-vae-fp16-fix"]),
        ("text_encoder_2", "text_projection.weight", ["text encoder", "bf16"]),
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1.weight", ["text encoder", "bf16"]),
        ("unet", "conv_out.weight", ["UNet", "bf16"]),
    ],
)
def test_overflows_are_found_before_training(part: str, weight: str, expected: list[str], folder_of: Folder) -> None:
    backbone = load_backbone(str(folder_of("sdxl")))
    check_finite(backbone, "model")
    dict(getattr(backbone.pipeline, part).named_parameters())[weight].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite") as caught:
        check_finite(backbone, "model")
    for text in expected:
        assert text in str(caught.value)
