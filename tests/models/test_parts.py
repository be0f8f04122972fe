"""Autoencoders and UNet weights from elsewhere: every form, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpref.models.backbone import load_pipeline
from diffpref.models.single_file import UNET, VAE, to_original_layout

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


def without(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Drop the weights under these prefixes."""
    return lambda state: {name: x for name, x in state.items() if not name.startswith(prefixes)}


def only(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Keep the weights under a prefix, without it."""
    return lambda state: {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


# Other autoencoders


@pytest.fixture(scope="module")
def other_vae(new_pipeline: Make) -> AutoencoderKL:
    """An autoencoder with other weights and the scale of SDXL."""
    torch.manual_seed(11)
    vae = new_pipeline("sdxl").vae
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vae


@pytest.mark.parametrize("form", ["folder", "pipeline", "file", "original file", "checkpoint"])
@pytest.mark.parametrize("base", ["folder", "file"])
def test_another_autoencoder_in_every_form(
    form: str, base: str, other_vae: AutoencoderKL, folder_of: Folder, single_file: SingleFile, new_pipeline: Make, tmp_path: Path
) -> None:
    path = tmp_path / "vae"
    full = new_pipeline("sdxl")
    full.vae = other_vae
    if form == "folder":
        other_vae.save_pretrained(path)
    elif form == "pipeline":
        full.save_pretrained(path)
    else:
        path = tmp_path / "vae.safetensors"
        original = to_original_layout(full)
        state = {"file": other_vae.state_dict(), "original file": only(VAE)(original), "checkpoint": original}[form]
        save_file(state, path)
    configs = str(folder_of("sdxl"))
    if base == "file":
        source, options = str(single_file("sdxl", without(VAE))), {"single_file_config": configs}
    else:
        source, options = configs, {}
    loaded = load_pipeline(source, vae=str(path), **options)  # type: ignore[arg-type]
    assert_same(weights(loaded.vae), weights(other_vae))
    assert loaded.vae.config.scaling_factor == 0.13025
    assert_same(weights(loaded.unet), weights(load_pipeline(configs).unet))


def test_a_variant_is_found_for_the_parts_too(other_vae: AutoencoderKL, folder_of: Folder, tmp_path: Path) -> None:
    other_vae.save_pretrained(tmp_path / "vae", variant="fp16")
    DiffusionPipeline.from_pretrained(folder_of("sdxl")).save_pretrained(tmp_path / "model", variant="fp16")
    loaded = load_pipeline(str(tmp_path / "model"), variant="fp16", vae=str(tmp_path / "vae"))
    assert_same(weights(loaded.vae), weights(other_vae))


def vae_config(**changes: Any) -> Callable[[Path, Path], Path]:
    """The autoencoder's folder with another config."""

    def write(model: Path, target: Path) -> Path:
        config = json.loads((model / "vae" / "config.json").read_text()) | changes
        AutoencoderKL.from_config(config).save_pretrained(target)
        return target

    return write


BAD_VAES: dict[str, tuple[Callable[[Path, Path], Path], list[str]]] = {
    "scale of SD": (vae_config(scaling_factor=0.18215), ["scaling_factor 0.18215", "0.13025", "config.json"]),
    "sixteen channels": (vae_config(latent_channels=16), ["latents of 16 channels", "takes 4"]),
    "a UNet": (lambda model, target: model / "unet", ["it is a UNet2DConditionModel"]),
    "nowhere": (lambda model, target: target / "nowhere", ["could not be loaded as AutoencoderKL"]),
}


@pytest.mark.parametrize("case", BAD_VAES)
def test_autoencoders_that_do_not_fit(case: str, folder_of: Folder, tmp_path: Path) -> None:
    make, expected = BAD_VAES[case]
    path = make(folder_of("sdxl"), tmp_path / "vae")
    with pytest.raises(ValueError, match="pretrained_vae_model_name_or_path") as caught:
        load_pipeline(str(folder_of("sdxl")), vae=str(path))
    for text in (*expected, repr(str(path))):
        assert text in str(caught.value)


def test_the_file_of_another_network_is_no_autoencoder(folder_of: Folder) -> None:
    path = folder_of("sdxl") / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"pretrained_vae_model_name_or_path .* does not fit the model: .*another shape"):
        load_pipeline(str(folder_of("sdxl")), vae=str(path))


# Other UNet weights


@pytest.fixture(scope="module")
def other_unet(new_pipeline: Make) -> nn.Module:
    """A UNet with other weights."""
    torch.manual_seed(12)
    unet = new_pipeline("sdxl").unet
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return unet


UNET_FORMS = ["folder", "pipeline", "half", "safetensors", "unet.pth", "module.pt", "nested.bin", "original file", "checkpoint"]


@pytest.mark.parametrize("form", UNET_FORMS)
def test_other_unet_weights_in_every_form(form: str, other_unet: nn.Module, folder_of: Folder, new_pipeline: Make, tmp_path: Path) -> None:
    state = other_unet.state_dict()
    full = new_pipeline("sdxl")
    full.unet = other_unet
    path = tmp_path / form
    if form == "folder":
        other_unet.save_pretrained(path)  # type: ignore[operator]
    elif form == "half":
        copy = new_pipeline("sdxl").unet
        copy.load_state_dict(state)
        copy.half().save_pretrained(path)
    elif form == "pipeline":
        full.save_pretrained(path)
    elif form in ("unet.pth", "module.pt", "nested.bin"):
        prefix = {"unet.pth": "", "module.pt": "module.", "nested.bin": "unet."}[form]
        named = {prefix + name: x for name, x in state.items()}
        torch.save({"state_dict": named} if form == "nested.bin" else named, path)
    else:
        path = path.with_suffix(".safetensors")
        original = to_original_layout(full)
        save_file({"safetensors": state, "original file": only(UNET)(original), "checkpoint": original}[form], path)
    loaded = load_pipeline(str(folder_of("sdxl")), unet_init=str(path))
    assert_same(weights(loaded.unet), {name: x.half().float() for name, x in state.items()} if form == "half" else state)
    assert all(not p.is_meta for p in loaded.unet.parameters())
    assert_same(weights(loaded.vae), weights(load_pipeline(str(folder_of("sdxl"))).vae))


def test_other_unet_weights_in_a_single_file_base(
    other_unet: nn.Module, folder_of: Folder, single_file: SingleFile, tmp_path: Path
) -> None:
    save_file(other_unet.state_dict(), tmp_path / "unet.safetensors")
    loaded = load_pipeline(
        str(single_file("sdxl")), single_file_config=str(folder_of("sdxl")), unet_init=str(tmp_path / "unet.safetensors")
    )
    assert_same(weights(loaded.unet), weights(other_unet))


class Command:
    """What a malicious pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch was-executed",)


def saved(change: Callable[[dict[str, Any]], Any], name: str = "unet.pth") -> Callable[[dict[str, Tensor], Path], Path]:
    """The UNet's state dict, changed."""

    def write(state: dict[str, Tensor], folder: Path) -> Path:
        torch.save(change(dict(state)), folder / name)
        return folder / name

    return write


BAD_UNETS: dict[str, tuple[Callable[[dict[str, Tensor], Path], Path], list[str]]] = {
    "missing": (saved(lambda s: {n: x for n, x in s.items() if n != "conv_in.bias"}), ["conv_in.bias is missing (1 missing, 0 unexp"]),
    "surplus": (
        saved(lambda s: s | {"conv_in.lora_A": torch.zeros(1)}),
        ["conv_in.lora_A is no weight", "0 missing, 1 unexpected", "start_lora"],
    ),
    "shape": (saved(lambda s: s | {"conv_in.bias": torch.zeros(3)}), ["conv_in.bias has shape (3,), the model's is (8,)", "1 of another"]),
    "code": (saved(lambda s: {"a": Command()}), ["could run code", ".safetensors"]),
    "no tensors": (saved(lambda s: {"step": 3}), ["holds no state dict"]),
    "garbage": (lambda s, folder: (folder / "u.pth").write_bytes(b"garbage" * 99) and folder / "u.pth", ["cannot be read as tensors"]),
    "truncated": (lambda s, folder: cut(saved(lambda s: s)(s, folder)), ["cannot be read as tensors"]),
    "another kind of file": (saved(lambda s: s, "unet.onnx"), ["neither a .safetensors file nor a state dict"]),
    "nowhere": (lambda s, folder: folder / "nowhere", ["could not be loaded as UNet2DConditionModel"]),
}


def cut(path: Path) -> Path:
    """Leave out the end."""
    path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize("case", BAD_UNETS)
def test_unet_weights_that_do_not_fit(
    case: str, other_unet: nn.Module, folder_of: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = BAD_UNETS[case]
    path = make(other_unet.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="unet_init") as caught:
        load_pipeline(str(folder_of("sdxl")), unet_init=str(path))
    for text in (*expected, repr(str(path))):
        assert text in str(caught.value)
    assert not (tmp_path / "was-executed").exists()


def test_a_unet_that_differs_in_its_config_alone(folder_of: Folder, tmp_path: Path) -> None:
    folder = copy_of(folder_of("sdxl") / "unet", tmp_path / "unet")
    change_json(folder / "config.json", sample_size=16, upcast_attention=True)
    load_pipeline(str(folder_of("sdxl")), unet_init=str(folder))
    change_json(folder / "config.json", attention_head_dim=2)  # other heads of the same weights
    with pytest.raises(ValueError, match="another kind of UNet: its attention_head_dim is 2, the model's is 4"):
        load_pipeline(str(folder_of("sdxl")), unet_init=str(folder))


@pytest.mark.parametrize("form", ["folder", "original file"])
def test_a_unet_of_another_family(form: str, folder_of: Folder, single_file: SingleFile) -> None:
    path = folder_of("sd1") if form == "folder" else single_file("sd1")
    with pytest.raises(ValueError, match=r"unet_init .* (another kind of UNet|does not fit the model)"):
        load_pipeline(str(folder_of("sdxl")), unet_init=str(path))
