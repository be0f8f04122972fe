"""Every way to tune, in this process: the first step, exact resume, loss scaling, and which weights are looked at and exported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from diffpref.training import run as run_module
from diffpref.training.device import new_accelerator
from diffpref.training.ema import Ema
from diffpref.training.loop import train
from diffpref.training.run import Run
from diffpref.training.validation import Validation

Settings = dict[str, Any]
Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[Settings]]
State = Callable[[Path, int], dict[str, Tensor]]

PACKAGES = {"adamw_8bit": "bitsandbytes", "adamw_4bit": "torchao", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
OPTIONS: dict[str, Settings] = {
    "dora": {"use_dora": True, "lora_targets": "all"},
    "rslora": {"use_rslora": True, "rank": 4},
    "text encoder": {"train_text_encoder": True, "gradient_checkpointing": True},
    "text encoders of sdxl": {"train_text_encoder": True, "cache_latents": True, "family": "sdxl", "train_batch_size": 4},
    "ema": {"use_ema": True, "ema_decay": 0.5},
    "adafactor": {"optimizer": "adafactor", "tune": "full", "learning_rate": 1e-3, "adam_weight_decay": 0.1},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule_free": {"optimizer": "schedule_free", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
    "adamw_8bit": {"optimizer": "adamw_8bit", "rank": 256},  # tensors of 4096 values, below which nothing is quantised
    "adamw_4bit": {"optimizer": "adamw_4bit", "rank": 256, "lr_scheduler": "cosine"},
    "restarts": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
}
SLOW = {"adamw_4bit"}  # torch.compile, once per shape


@pytest.fixture
def option(request: pytest.FixtureRequest) -> Settings:
    """The settings of an entry of OPTIONS; skips where its package is missing."""
    settings = dict(OPTIONS[request.param])
    if settings.get("optimizer") in PACKAGES:
        pytest.importorskip(PACKAGES[settings["optimizer"]])
    if settings.pop("family", "sd") == "sdxl":
        settings["pretrained_model_name_or_path"] = str(request.getfixturevalue("sdxl_folder"))
    return settings


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def numbers(folder: Path, step: int) -> Settings:
    """What a checkpoint holds beside tensors."""
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


@pytest.mark.parametrize("option", [pytest.param(o, marks=[pytest.mark.slow] if o in SLOW else []) for o in OPTIONS], indirect=True)
def test_a_resumed_run_is_the_uninterrupted_one(option: Settings, run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    folder = run_training("run", max_train_steps=4, checkpointing_steps=2, **option)
    lines, whole, counted = read_metrics(folder), read_state(folder, 4), numbers(folder, 4)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert any(not torch.equal(x, whole[name]) for name, x in read_state(folder, 2).items() if name.startswith("weights/"))
    (folder / "checkpoint-4").rename(folder / "first-4")
    run_training("run", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest", **option)
    assert_same(read_state(folder, 4), whole)
    assert numbers(folder, 4) == counted
    assert read_metrics(folder) == lines
    if option.get("optimizer") in ("adamw_8bit", "adamw_4bit"):
        assert sum(x.dtype == torch.uint8 for x in whole.values()) > 2


def test_training_the_text_encoders_needs_no_reference(run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    folder = run_training("run", method="sft", train_text_encoder=True, max_train_steps=2)
    assert all(line["grad_norm"] > 0 for line in read_metrics(folder))
    moved = [name for name, x in read_state(folder, 2).items() if "text.text_encoder" in name and "lora_B" in name and x.any()]
    assert moved


@pytest.mark.parametrize("name", ["use_dora", "use_rslora", "train_text_encoder"])
def test_full_tuning_has_no_adapters_to_vary(name: str, prepare: Start) -> None:
    with pytest.raises(ValueError, match=f"{name} is true, .* tune is full"):
        prepare("run", tune="full", **{name: True})


def test_the_average_follows_its_equation() -> None:
    maker = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, generator=maker), "b": torch.randn(2, 2, generator=maker)}
    ema, expected = Ema.start(0.3, weights), {name: x.double() for name, x in weights.items()}
    for step in range(6):
        for name, x in weights.items():
            x.add_(torch.randn(x.shape, generator=maker))
            decay = min(0.3, (1 + step) / (10 + step))
            expected[name] = decay * expected[name] + (1 - decay) * x.double()
        ema.update(weights)
    assert ema.updates == 6
    for name, x in ema.average.items():
        torch.testing.assert_close(x, expected[name].float())


def looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """Filled with the weights that every validation sees, by step."""
    seen: dict[int, dict[str, Tensor]] = {}

    def look(self: Validation, step: int) -> tuple[Settings, np.ndarray]:
        seen[step] = {name: p.detach().clone() for name, p in run.trainable.items()}
        return {}, np.zeros((0, 8, 8, 3), np.uint8)

    monkeypatch.setattr(Validation, "look", look)
    return seen


VALIDATED = {"validation_steps": 1, "validation_prompts": ("a red circle",), "num_validation_images": 1, "checkpointing_steps": 1}


def test_the_average_is_validated_and_exported(
    prepare: Start, read_state: State, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare("run", max_train_steps=3, use_ema=True, **VALIDATED)
    seen, replayed = looked_at(run, monkeypatch), Ema.start(0.999, run.trainable)
    train(run)
    for step in (1, 2, 3):
        state = read_state(run.folder, step)
        replayed.update({name: state[f"weights/{name}"] for name in run.trainable})
        average = {name.removeprefix("ema/"): x for name, x in state.items() if name.startswith("ema/")}
        assert_same(average, replayed.average)
        assert_same(seen[step], average)
        assert any(not torch.equal(x, state[f"weights/{name}"]) for name, x in average.items())
    with run.exported():
        assert_same({name: p.detach() for name, p in run.trainable.items()}, replayed.average)
    assert_same({name: p.detach() for name, p in run.trainable.items()}, {n: state[f"weights/{n}"] for n in run.trainable})
    assert "exporting the moving average of the weights (ema_decay 0.999)" in capsys.readouterr().err


def test_schedule_free_is_validated_and_exported_in_its_own_mode(
    prepare: Start, run_training: Go, read_state: State, read_metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("schedulefree")
    settings = {"optimizer": "schedule_free", "max_train_steps": 3, "adam_beta1": 0.8}
    run = prepare("run", **settings, **VALIDATED)
    seen = looked_at(run, monkeypatch)
    train(run)
    (group,) = run.state.optimizer.param_groups
    assert group["train_mode"]
    for step in (1, 2, 3):
        state = read_state(run.folder, step)
        for name, x in seen[step].items():
            y, z = state[f"weights/{name}"], state[f"optimizer/{name}/z"]
            assert torch.equal(x, y.lerp(z, 1 - 1 / 0.8))
    assert any(not torch.equal(x, state[f"weights/{name}"]) for name, x in seen[3].items())
    with run.exported():
        assert not group["train_mode"]
        assert_same({name: p.detach() for name, p in run.trainable.items()}, seen[3])
    assert_same({name: p.detach() for name, p in run.trainable.items()}, {n: state[f"weights/{n}"] for n in run.trainable})
    plain = run_training("plain", **settings)
    assert_same(read_state(plain, 3), read_state(run.folder, 3))  # a validation leaves no trace


def scaled(config: Any) -> Accelerator:
    """An accelerator as for fp16 on a GPU, which it refuses a CPU: fp16 forward, and a loss scale that is far too large at first."""
    accelerator = new_accelerator(config)
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    return accelerator


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_loss_scale_finds_its_size_and_is_resumed(
    optimizer: str, prepare: Start, read_state: State, read_metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "new_accelerator", scaled)
    settings = {"mixed_precision": "bf16", "optimizer": optimizer, "use_ema": True, "checkpointing_steps": 1, "max_train_steps": 12}
    run = prepare("run", **settings)
    start = {f"weights/{name}": p.detach().clone() for name, p in run.trainable.items()}
    train(run)
    lines = read_metrics(run.folder)
    skipped = [line["grad_norm"] is None for line in lines]
    first = skipped.index(False)
    assert 0 < first < 9, "the first steps overflow, and then the scale fits"
    assert all(line["loss"] is not None for line in lines)
    for step in range(1, 13):
        state, counted = read_state(run.folder, step), numbers(run.folder, step)
        weights = {name: x for name, x in state.items() if name.startswith("weights/")}
        assert {x.dtype for x in weights.values()} == {torch.float32}
        assert all(torch.equal(x, start[name]) for name, x in weights.items()) is all(skipped[:step])
        assert counted["ema"]["updates"] == skipped[:step].count(False)
        assert counted["scaler"]["scale"] < 2.0**20
    run.log.close()
    for later in range(7, 13):
        (run.folder / f"checkpoint-{later}").rename(run.folder / f"first-{later}")
    again = prepare("run", **settings, resume_from_checkpoint="latest")
    train(again)
    whole = {f"{p.stem}/{name}": x for p in (run.folder / "first-12").glob("*.safetensors") for name, x in load_file(p).items()}
    assert_same(read_state(run.folder, 12), whole)
    assert numbers(run.folder, 12) == json.loads((run.folder / "first-12" / "trainer_state.json").read_text())


def test_all_pictures_are_drawn_in_the_precision_of_training(prepare: Start) -> None:
    for settings in ({}, {"train_text_encoder": True}):
        run = prepare(f"run-{len(settings)}-{list(settings)}", mixed_precision="bf16", **VALIDATED, **settings)
        assert run.validation is not None
        seen: set[torch.dtype] = set()
        run.backbone.denoiser.mid_block.resnets[0].conv1.register_forward_hook(lambda layer, args, out, seen=seen: seen.add(out.dtype))
        assert (run.validation.draw() == run.validation.base_pictures).all()  # nothing is trained yet
        assert run.validation.base_pictures.any()
        assert seen == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("option", [*OPTIONS, "fp16 full"], indirect=False)
def test_half_precision_with_loss_scaling_on_a_gpu(option: str, run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    settings = dict(OPTIONS.get(option, {"tune": "full", "learning_rate": 1e-4}))
    if settings.get("optimizer") in PACKAGES:
        pytest.importorskip(PACKAGES[settings["optimizer"]])
    if settings.pop("family", "sd") == "sdxl":
        pytest.skip("the same code as for SD")
    folder = run_training("run", mixed_precision="fp16", max_train_steps=12, checkpointing_steps=12, **settings)
    lines = read_metrics(folder)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert [line["grad_norm"] for line in lines][-1] is not None, "the loss scale has found its size"
    assert numbers(folder, 12)["scaler"]["scale"] > 0
    weights = {name: x for name, x in read_state(folder, 12).items() if name.startswith("weights/")}
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert all(torch.isfinite(x).all() for x in weights.values())
