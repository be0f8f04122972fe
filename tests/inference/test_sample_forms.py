"""`diffpref generate` with every form of a model: the same forms and the same errors as training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.utils import convert_state_dict_to_kohya
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref.cli import main
from diffpref.inference.sample import SampleConfig, load
from diffpref.models.backbone import load_pipeline
from diffpref.models.lora import LORA_FILE, add_lora, save_lora, trainable_state
from diffpref.models.single_file import to_original_layout


def unet_of(**settings: Any) -> dict[str, Tensor]:
    """The UNet's weights after loading with these settings."""
    return load(SampleConfig(prompts=("a",), **settings)).unet.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.fixture(scope="module")
def lora(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA in diffusers' form, and the same as kohya.safetensors."""
    pipeline = load_pipeline(str(sd_folder))
    pipeline.unet.requires_grad_(False)
    add_lora(pipeline.unet, 2, 2, "attention", seed=0)
    for p in trainable_state(pipeline.unet).values():
        p.data.add_(0.1)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(pipeline, folder)
    state = convert_state_dict_to_kohya(load_file(folder / LORA_FILE))
    (folder / "kohya").mkdir()
    save_file({name: x.clone() for name, x in state.items()}, folder / "kohya" / "anything.safetensors")
    return folder


def test_pictures_of_a_single_file_are_those_of_its_folder(sd_folder: Path, tmp_path: Path) -> None:
    save_file(to_original_layout(load_pipeline(str(sd_folder))), tmp_path / "m.safetensors")
    sources = {
        "folder": ["--pretrained_model_name_or_path", str(sd_folder)],
        "file": ["--pretrained_model_name_or_path", str(tmp_path / "m.safetensors"), "--single_file_config", str(sd_folder)],
    }
    common = ["--prompts", "a red circle", "--num_inference_steps", "2", "--height", "32", "--width", "32"]
    for name, words in sources.items():
        assert main(["generate", *words, *common, "--output_dir", str(tmp_path / name)]) == 0
    pictures = [np.asarray(Image.open(tmp_path / name / "00000.png")) for name in sources]
    assert np.array_equal(*pictures)


def test_lora_by_folder_and_file_in_both_forms(sd_folder: Path, lora: Path) -> None:
    source = str(sd_folder)
    base, folder = unet_of(pretrained_model_name_or_path=source), unet_of(pretrained_model_name_or_path=source, lora=str(lora))
    assert not same(base, folder)
    for path in (lora / LORA_FILE, lora / "kohya", lora / "kohya" / "anything.safetensors"):
        assert same(unet_of(pretrained_model_name_or_path=source, lora=str(path)), folder)
    assert same(unet_of(pretrained_model_name_or_path=source, lora=str(lora), lora_scale=0.0), base)


def test_other_parts_and_schedules(sd_folder: Path, tmp_path: Path) -> None:
    other = load_pipeline(str(sd_folder))
    for module in (other.unet, other.vae):
        for p in module.parameters():
            p.data.mul_(1.5)
    other.vae.save_pretrained(tmp_path / "vae")
    torch.save(other.unet.state_dict(), tmp_path / "unet.pth")
    config = SampleConfig(
        prompts=("a",),
        pretrained_model_name_or_path=str(sd_folder),
        pretrained_vae_model_name_or_path=str(tmp_path / "vae"),
        unet_init=str(tmp_path / "unet.pth"),
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        sampler="euler",
    )
    made = load(config)
    assert same(made.vae.state_dict(), other.vae.state_dict())
    assert same(made.unet.state_dict(), other.unet.state_dict())
    found = made.scheduler.config
    assert type(made.scheduler).__name__ == "EulerDiscreteScheduler"
    assert (found.prediction_type, found.rescale_betas_zero_snr, found.timestep_spacing) == ("v_prediction", True, "trailing")


@pytest.mark.parametrize("case", ["LoRA of another family", "pictures from pictures", "LoRA as model"])
def test_what_cannot_work_is_named(case: str, sdxl_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "pictures from pictures":
        parts = DiffusionPipeline.from_pretrained(sdxl_folder).components
        StableDiffusionXLImg2ImgPipeline(**parts).save_pretrained(tmp_path / "model")
    words, expected = {
        "LoRA of another family": (
            ["--pretrained_model_name_or_path", str(sdxl_folder), "--lora", str(lora)],
            f"lora {str(lora)!r} does not fit the model",
        ),
        "pictures from pictures": (["--pretrained_model_name_or_path", str(tmp_path / "model")], "improves pictures"),
        "LoRA as model": (["--pretrained_model_name_or_path", str(lora)], "is the folder of a LoRA"),
    }[case]
    assert main(["generate", *words, "--prompts", "a", "--output_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "out").exists()
