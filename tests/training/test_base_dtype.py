"""Frozen weights in half precision: what is kept in which dtype, where training starts, and what is left at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpref.training.config import TrainConfig
from diffpref.training.export import export
from diffpref.training.loop import train
from diffpref.training.run import Run

Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[dict[str, Any]]]
State = Callable[[Path, int], dict[str, Tensor]]

HALF = {"base_dtype": "bf16", "mixed_precision": "bf16"}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_only_frozen_weights_are_halved(family: str, prepare: Start, request: pytest.FixtureRequest) -> None:
    run = prepare("run", **HALF, pretrained_model_name_or_path=str(request.getfixturevalue(f"{family}_folder")))
    for name, part in run.backbone.pipeline.components.items():
        if isinstance(part, nn.Module):
            frozen = {p.dtype for p in part.parameters() if not p.requires_grad}
            assert frozen == {torch.float32 if name == "vae" else torch.bfloat16}, name
    assert {p.dtype for p in run.trainable.values()} == {torch.float32}
    batch = next(run.source)
    assert batch.latents.dtype == torch.float32
    assert batch.cond.prompt_embeds.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_first_loss_is_log_two_and_the_adapter_learns(
    family: str, run_training: Go, read_metrics: Metrics, read_state: State, request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(f"{family}_folder"))
    settings = {"pretrained_model_name_or_path": model, "max_train_steps": 3, "gradient_checkpointing": True}
    folder = run_training("run", **HALF, **settings)
    lines = read_metrics(folder)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == 0
    assert lines[2]["rewards/margins"] != 0
    saved = read_state(folder, 3)
    assert {x.dtype for x in saved.values()} == {torch.float32}
    assert all(x.any() for name, x in saved.items() if name.startswith("weights/") and "lora_B" in name)
    single = read_metrics(run_training("single", mixed_precision="bf16", **settings))
    assert lines[0]["error/policy_chosen"] == pytest.approx(single[0]["error/policy_chosen"], rel=0.02)


def test_a_resumed_run_is_the_uninterrupted_one(run_training: Go, read_state: State) -> None:
    whole = read_state(run_training("whole", **HALF, max_train_steps=4), 4)
    run_training("parts", **HALF, max_train_steps=2)
    parts = read_state(run_training("parts", **HALF, max_train_steps=4, resume_from_checkpoint="latest"), 4)
    assert [name for name, x in whole.items() if not torch.equal(x, parts[name])] == []


@torch.no_grad()
def prediction(pipeline: Any) -> Tensor:
    """What the UNet answers to fixed inputs, computed as in training."""
    x_t, embeds = torch.ones(1, 4, 8, 8).cumsum(3) / 4 - 1, torch.ones(1, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        return pipeline.unet(x_t, torch.tensor([500]), embeds).sample


def test_pictures_are_drawn_and_the_export_loads_into_a_plain_pipeline(prepare: Start, sd_folder: Path) -> None:
    run = prepare("run", **HALF, max_train_steps=2, validation_steps=1, validation_prompts=("a red circle",))
    train(run)
    assert (run.folder / "validation" / "step_2.png").is_file()
    export(run.backbone.pipeline, run.folder, "lora", merge_lora=False)
    assert {x.dtype for x in load_file(run.folder / "pytorch_lora_weights.safetensors").values()} == {torch.float32}
    plain = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, torch_dtype=torch.bfloat16)
    before = prediction(plain)
    plain.load_lora_weights(run.folder)
    assert torch.equal(prediction(plain), prediction(run.backbone.pipeline))
    assert not torch.equal(prediction(plain), before)


def test_half_precision_weights_need_forward_passes_of_the_same(prepare: Start) -> None:
    for precision in ("no", None):
        with pytest.raises(ValueError, match=r"base_dtype is bf16, but mixed_precision is no.*--mixed_precision bf16"):
            prepare("run", base_dtype="bf16", mixed_precision=precision)


def test_text_encoders_are_halved_and_their_adapters_are_not(run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    folder = run_training("run", **HALF, train_text_encoder=True, max_train_steps=2)
    lines = read_metrics(folder)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["rewards/margins"] != 0
    saved = read_state(folder, 2)
    assert {x.dtype for x in saved.values()} == {torch.float32}
    assert any(name.startswith("weights/text.") for name in saved)


def test_an_adapter_to_start_from_keeps_its_values(prepare: Start, run_training: Go) -> None:
    run = prepare("first", max_train_steps=1)
    train(run)
    with torch.no_grad():
        run.trainable[next(iter(run.trainable))].fill_(1 / 3)  # no number of bf16
    export(run.backbone.pipeline, run.folder, "lora", merge_lora=False)
    further = prepare("further", **HALF, start_lora=str(run.folder), start_lora_as="adapter", rank=2)
    assert further.trainable.keys() == run.trainable.keys()
    assert all(torch.equal(x, run.trainable[name]) for name, x in further.trainable.items())


def test_dora_needs_float32_weights() -> None:
    with pytest.raises(ValueError, match="base_dtype is bf16, but use_dora is true"):
        TrainConfig(base_dtype="bf16", mixed_precision="bf16", use_dora=True)
