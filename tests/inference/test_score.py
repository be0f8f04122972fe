"""A base and an aligned model as a scorer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpref.inference.score import load_implicit_scorer
from diffpref.locations import asset
from diffpref.models.backbone import load_backbone, load_pipeline, with_text_encoders
from diffpref.models.lora import adapted_parts, add_lora, merged_copy, save_lora, trainable_state
from diffpref.models.lora_file import merge_lora
from diffpref.testbed.world import render, sample_scenes


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base model with slightly other weights."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(asset("testbed", "pipeline"), folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: x * 1.01 if "conv_out.weight" in name else x for name, x in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def test_scores_belong_to_picture_and_prompt(changed: str) -> None:
    scenes = sample_scenes(np.random.default_rng(0), 4)
    images, prompts = (render(scenes) * 255).astype(np.uint8), scenes.captions()
    score = load_implicit_scorer(str(asset("testbed", "pipeline")), aligned=changed, num_draws=3)
    together = score(images, prompts)
    assert together.shape == (4,)
    assert together.dtype == torch.float32
    assert together.abs().min() > 0
    torch.testing.assert_close(score(images[[2]], [prompts[2]])[0], together[2], atol=1e-6, rtol=1e-3)


def test_the_base_against_itself_is_zero() -> None:
    base = str(asset("testbed", "pipeline"))
    images = np.full((1, 64, 64, 3), 128, np.uint8)
    assert load_implicit_scorer(base, aligned=base, num_draws=2)(images, ["a small red circle on gray"]).item() == 0


@torch.no_grad()
def test_trained_text_encoders_are_part_of_the_policy(sd_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(sd_folder))
    add_lora(backbone.denoiser, rank=2, alpha=2, targets="attention", seed=0)  # untouched
    _, module = with_text_encoders(backbone, False, rank=2, alpha=2, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    save_lora(backbone.pipeline, tmp_path)
    assert load_implicit_scorer(str(sd_folder), lora=str(tmp_path), num_draws=2)(images, ["a red circle"]).item() == 0
    for name, p in trainable_state(module.text).items():
        p.add_(0.3 * torch.ones_like(p) if "lora_B" in name else 0)
    save_lora(backbone.pipeline, tmp_path)
    tuned = load_implicit_scorer(str(sd_folder), lora=str(tmp_path), num_draws=2)(images, ["a red circle"]).item()
    assert tuned != 0
    parts = {name: merged_copy(part) for name, part in adapted_parts(backbone.pipeline).items()}
    for name, part in parts.items():
        setattr(backbone.pipeline, name, part)
    backbone.pipeline.save_pretrained(tmp_path / "merged")
    merged = load_implicit_scorer(str(sd_folder), aligned=str(tmp_path / "merged"), num_draws=2)(images, ["a red circle"]).item()
    assert merged == pytest.approx(tuned, rel=1e-2)


def test_exactly_one_aligned_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        load_implicit_scorer("base", aligned="a", lora=str(tmp_path))


def test_a_lora_scores_as_the_model_that_it_makes(tmp_path: Path) -> None:
    base = str(asset("testbed", "pipeline"))
    pipeline = load_pipeline(base)
    pipeline.unet.requires_grad_(False)
    add_lora(pipeline.unet, 2, 2, "attention", seed=0)
    for p in trainable_state(pipeline.unet).values():
        p.data.add_(0.02)
    save_lora(pipeline, tmp_path / "lora")
    merged = load_pipeline(base)
    merge_lora(merged, str(tmp_path / "lora"), "lora")
    merged.save_pretrained(tmp_path / "merged")
    images = np.full((1, 64, 64, 3), 128, np.uint8)
    scores = [
        load_implicit_scorer(base, num_draws=2, **options)(images, ["a small red circle on gray"])  # type: ignore[arg-type]
        for options in ({"lora": str(tmp_path / "lora")}, {"aligned": str(tmp_path / "merged")})
    ]
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-3)
    assert scores[0].abs().item() > 0
