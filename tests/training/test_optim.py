"""Optimizers and schedules: what they are made of, which settings go together, and the rate that is used."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from diffpref.training.config import TrainConfig
from diffpref.training.optim import check_optimizer, move_schedule, new_optimizer, new_schedule
from diffpref.training.run import Run

PACKAGES = {"adamw_8bit": "bitsandbytes", "adamw_4bit": "torchao", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def rates(**settings: Any) -> list[float]:
    """The learning rate of steps 0 to 20 of a run of 20 steps with a rate of 1."""
    config = TrainConfig(max_train_steps=20, lr_warmup_steps=4, **settings)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler, found = new_schedule(config, optimizer), []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def warmed(rest: Callable[[float], float]) -> list[float]:
    """Four steps of warm-up, then `rest` over the share that is done."""
    return [step / 4 if step < 4 else rest((step - 4) / 16) for step in range(21)]


@pytest.mark.parametrize(
    ("settings", "rest"),
    [
        ({"lr_scheduler": "constant_with_warmup"}, lambda done: 1.0),
        ({"lr_scheduler": "linear"}, lambda done: 1 - done),
        ({"lr_scheduler": "cosine"}, lambda done: 0.5 * (1 + math.cos(math.pi * done))),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
            lambda done: 0.5 * (1 + math.cos(math.pi * (3 * done % 1))) if done < 1 else 0.0,
        ),
        ({"lr_scheduler": "polynomial", "lr_power": 3.0}, lambda done: 1e-7 + (1 - 1e-7) * (1 - done) ** 3),
    ],
    ids=lambda x: x["lr_scheduler"] if isinstance(x, dict) else "",
)
def test_schedules_follow_their_formulas(settings: dict[str, Any], rest: Callable[[float], float]) -> None:
    assert rates(**settings) == pytest.approx(warmed(rest))


def test_a_rate_below_the_end_of_the_polynomial_is_refused() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1e-8)
    with pytest.raises(ValueError, match="lr_scheduler is polynomial and the rate is 1e-08"):
        new_schedule(TrainConfig(lr_scheduler="polynomial"), optimizer)


def test_a_schedule_is_moved_to_where_it_stood() -> None:
    config = TrainConfig(max_train_steps=20, lr_warmup_steps=4, lr_scheduler="cosine")
    for rate in (0.5, torch.tensor(0.5)):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate)
        scheduler = new_schedule(config, optimizer)
        move_schedule(scheduler, optimizer, 9)
        expected = 0.5 * rates(lr_scheduler="cosine")[9]
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) is isinstance(rate, torch.Tensor)
        assert float(scheduler.get_last_lr()[0]) == pytest.approx(expected)
        scheduler.step()
        assert float(scheduler.get_last_lr()[0]) == pytest.approx(0.5 * rates(lr_scheduler="cosine")[10])


def test_adafactor_has_the_settings_of_the_published_runs() -> None:
    """The SDXL script of Diffusion-DPO: transformers' Adafactor with the rate of the command and nothing relative to the weights."""
    torch.manual_seed(0)
    shapes = [(7,), (5, 3), (4, 6, 3, 3), (2, 8, 1, 1)]
    ours, theirs = ([nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in shapes] for _ in range(2))
    published = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "clip_threshold": 1.0}
    optimizers = (
        new_optimizer(TrainConfig(optimizer="adafactor", adam_weight_decay=0.1), ours, 3e-2),
        transformers.Adafactor(theirs, lr=3e-2, weight_decay=0.1, **published),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * 10 ** float(torch.randn(()))
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", *PACKAGES])
def test_adams_settings_reach_every_adam(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    config = TrainConfig(optimizer=name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, adam_weight_decay=0.2)  # type: ignore[arg-type]
    (group,) = new_optimizer(config, nn.Linear(2, 2).parameters(), 0.25).param_groups
    assert (float(group["lr"]), tuple(group["betas"]), group["eps"], group["weight_decay"]) == (0.25, (0.8, 0.95), 1e-6, 0.2)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    config = TrainConfig(optimizer=name, learning_rate=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"optimizer is {name}, which needs {PACKAGES[name]} .*pip install diffpref\[optim\]"):
        check_optimizer(config)


def test_low_bit_adam_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", sys)
    monkeypatch.setattr("shutil.which", lambda name: "a compiler" if name == "clang" else None)
    assert check_optimizer(TrainConfig(optimizer="adamw_4bit")) == []
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"optimizer is adamw_4bit, .* no C compiler; install gcc"):
        check_optimizer(TrainConfig(optimizer="adamw_4bit"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "lr_scheduler is cosine, but schedule_free"),
        ({"optimizer": "schedule_free", "use_ema": True}, "use_ema is true, but schedule_free"),
        ({"optimizer": "adafactor", "adam_beta1": 0.8}, "adam_beta1 is 0.8, but optimizer adafactor has no such setting"),
    ],
)
def test_settings_that_work_against_an_optimizer(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", sys)
    with pytest.raises(ValueError, match=message):
        check_optimizer(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_num_cycles": 2, "lr_scheduler": "cosine"}, "lr_num_cycles is 2, which only lr_scheduler cosine_with_restarts uses"),
        ({"lr_power": 2.0}, "lr_power is 2.0, which only lr_scheduler polynomial uses"),
        ({"ema_decay": 0.9}, "ema_decay is 0.9, which only use_ema uses"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_prodigy_is_told_apart_from_other_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", sys)
    (line,) = check_optimizer(TrainConfig(optimizer="prodigy", learning_rate=1e-5))
    assert "learning_rate, which is 1e-05; 1.0 is usual" in line
    assert check_optimizer(TrainConfig(optimizer="prodigy", learning_rate=1.0)) == []


def test_it_is_said_which_weights_are_kept(prepare: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare("run", use_ema=True)
    line = "validated and exported is the moving average of the weights (use_ema, ema_decay 0.999)"
    assert line in capsys.readouterr().err.splitlines()
    assert line in json.loads((run.folder / "run_manifest.json").read_text())["notes"]


def test_scale_lr_multiplies_by_the_pairs_per_update(
    prepare: Callable[..., Run], run_training: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"learning_rate": 1e-3, "scale_lr": True, "gradient_accumulation_steps": 3, "max_train_steps": 1}
    run = prepare("run", **settings)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(6e-3)
    assert json.loads((run.folder / "run_manifest.json").read_text())["effective_learning_rate"] == pytest.approx(6e-3)
    assert "learning rate 0.006 as used, 6 pairs per update" in capsys.readouterr().err
    folder = run_training("unscaled", learning_rate=1e-3, gradient_accumulation_steps=3, max_train_steps=1)
    assert json.loads((folder / "run_manifest.json").read_text())["effective_learning_rate"] == 1e-3
