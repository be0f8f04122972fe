"""Runs that end when validations no longer improve, and the scorer of the validation pictures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffpref.methods import METHODS
from diffpref.models.lora import LORA_FILE
from diffpref.training import validation
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.run import Run
from diffpref.training.run_log import RunLog
from diffpref.training.stopping import EarlyStopping, Stopped
from diffpref.training.validation import Validation

Settings = dict[str, Any]
Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[Settings]]
State = Callable[[Path, int], dict[str, Tensor]]

VALUES = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.65, 5: 0.9, 6: 0.8}
EARLY: Settings = {
    "validation_steps": 1,
    "validation_prompts": ("a red circle",),
    "num_validation_images": 1,
    "validation_scorer": "stub",
    "early_stopping_metric": "scorer",
    "early_stopping_patience": 2,
    "checkpointing_steps": 1,
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer whose mean over the pictures is VALUES[step]."""

    def look(self: Validation, step: int) -> tuple[Settings, np.ndarray]:
        return {"eval/stub/mean": VALUES[step]}, np.zeros((0, 8, 8, 3), np.uint8)

    monkeypatch.setattr(Validation, "look", look)
    monkeypatch.setattr(validation, "scorer_from", lambda spec, device: lambda images, prompts: torch.zeros(len(prompts)))


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint."""
    return {name.removeprefix("weights/"): x for name, x in state.items() if name.startswith("weights/")}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def align_with(base_settings: Settings, folder: Path, **settings: Any) -> Path:
    """A run from settings to export."""
    config = TrainConfig(**(base_settings | {"output_dir": str(folder)} | settings))
    return align(config, METHODS["diffusion_dpo"](beta=100.0)).folder


@pytest.mark.usefixtures("scripted")
def test_it_stops_and_exports_the_best(
    base_settings: Settings, read_metrics: Metrics, read_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = align_with(base_settings, tmp_path / "run", **EARLY)
    told = capsys.readouterr().err
    assert "stopped after step 4: 2 validations in a row were not better than the best" in told
    assert "exporting the weights of step 2, the best validation: eval/stub/mean 0.7" in told
    lines = [line for line in read_metrics(folder) if "eval/stub/mean" in line]
    assert [line["early_stopping/waited"] for line in lines] == [0, 0, 1, 2]
    assert [line["early_stopping/best_step"] for line in lines] == [1, 2, 2, 2]
    assert sorted(p.name for p in folder.glob("best-*")) == ["best-2"]
    assert_same(load_file(folder / "best-2" / "weights.safetensors"), weights(read_state(folder, 2)))
    assert not (folder / "checkpoint-5").exists()
    two = align_with(base_settings, tmp_path / "two", max_train_steps=2)
    assert_same(load_file(folder / LORA_FILE), load_file(two / LORA_FILE))
    again = align_with(base_settings, folder, **EARLY, resume_from_checkpoint="latest")  # nothing is left to train
    assert read_metrics(again)[-1]["step"] == 4
    assert_same(load_file(folder / LORA_FILE), load_file(two / LORA_FILE))


@pytest.mark.usefixtures("scripted")
def test_a_resumed_run_keeps_the_count(
    prepare: Start, run_training: Go, read_metrics: Metrics, read_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_training("whole", **EARLY)
    with monkeypatch.context() as patch:
        write = RunLog.write

        def stop_at_three(self: RunLog, step: int, values: dict[str, float]) -> None:
            write(self, step, values)
            if step == 3:
                signal_now()

        patch.setattr(RunLog, "write", stop_at_three)
        with pytest.raises(Stopped, match="after step 3"):
            run_training("parts", **EARLY)
    parts = whole.with_name("parts")
    assert numbers(parts, 3)["early_stopping"] == {"best": 0.7, "best_step": 2, "waited": 1}
    run_training("parts", **EARLY, resume_from_checkpoint="latest")
    assert_same(read_state(parts, 4), read_state(whole, 4))
    assert numbers(parts, 4) == numbers(whole, 4)
    assert read_metrics(parts) == read_metrics(whole)
    earlier = prepare("parts", **EARLY, resume_from_checkpoint="checkpoint-1")  # step 2 has not happened yet
    assert not list(parts.glob("best-*"))
    train(earlier)
    assert [p.name for p in parts.glob("best-*")] == ["best-2"]


def numbers(folder: Path, step: int) -> Settings:
    """What a checkpoint holds beside tensors."""
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


def signal_now() -> None:
    """As if the machine were about to be taken away."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_without_the_best_weights_the_last_ones_are_exported_and_that_is_said(
    loss: str, prepare: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare("run", **EARLY)
    train(run)
    last = {name: p.detach().clone() for name, p in run.trainable.items()}
    with run.exported():
        assert_same({name: p.detach() for name, p in run.trainable.items()}, load_file(run.folder / "best-2" / "weights.safetensors"))
    assert_same({name: p.detach() for name, p in run.trainable.items()}, last)
    if loss == "gone":
        shutil.rmtree(run.folder / "best-2")
    else:
        path = run.folder / "best-2" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with run.exported():
        assert_same({name: p.detach() for name, p in run.trainable.items()}, last)
    assert "best-2 is damaged or gone; the last weights are exported" in capsys.readouterr().err


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    early = EarlyStopping(2, "value")
    assert not early.improves(1, math.nan)
    assert early.improves(2, -3.0)
    assert not early.improves(3, -3.0)
    assert not early.is_over
    assert not early.improves(4, math.inf)
    assert early.is_over
    other = EarlyStopping(2, "value")
    other.restore(json.loads(json.dumps(early.state())))
    assert other == early
    fresh = EarlyStopping(2, "value")
    fresh.restore(json.loads(json.dumps(EarlyStopping(2, "value").state())))
    assert fresh.improves(1, -1e9)


def test_held_out_accuracy_decides_by_default(run_training: Go, read_metrics: Metrics) -> None:
    settings = {"validation_steps": 1, "held_out_pairs": 5, "num_validation_images": 1, "early_stopping_patience": 9, "max_train_steps": 4}
    lines = [line for line in read_metrics(run_training("run", **settings)) if "eval/implicit_accuracy" in line]
    found = [line["eval/implicit_accuracy"] for line in lines]
    assert [line["early_stopping/best"] for line in lines] == [max(found[: i + 1]) for i in range(4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience is 2, but nothing is validated"),
        ({"early_stopping_patience": 2, "validation_steps": 1, "validation_prompts": ("a",)}, "no pairs are held out"),
        ({"early_stopping_metric": "scorer"}, "nothing stops early"),
        (EARLY | {"validation_scorer": None}, "early_stopping_metric is scorer, but there is none"),
        ({"validation_scorer": "pickscore"}, "validation_scorer is 'pickscore', but nothing is validated"),
        (
            {"early_stopping_patience": 2, "validation_steps": 1, "held_out_pairs": 4, "method": "sft", "tune": "full"},
            "method sft has no reference",
        ),
    ],
)
def test_settings_that_cannot_stop_a_run(settings: Settings, message: str, prepare: Start) -> None:
    with pytest.raises(ValueError, match=message):
        prepare("run", **settings)


def test_the_scorer_sees_the_pictures_of_policy_and_base(prepare: Start, read_metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[int, ...], list[str]]] = []

    def scorer_from(spec: str, device: Any) -> Callable[..., Tensor]:
        def brightness(images: np.ndarray, prompts: Sequence[str]) -> Tensor:
            asked.append((spec, images.shape, list(prompts)))
            return torch.tensor([float(image.mean()) for image in images])

        return brightness

    monkeypatch.setattr(validation, "scorer_from", scorer_from)
    settings = {"validation_scorer": "brightness=some/weights", "validation_steps": 1, "num_validation_images": 2, "max_train_steps": 2}
    run = prepare("run", **settings, validation_prompts=("a red circle", "a blue square", "not drawn"))
    train(run)
    assert asked == [("brightness=some/weights", (2, 32, 32, 3), ["a red circle", "a blue square"])] * 3
    lines = [line for line in read_metrics(run.folder) if "eval/brightness/mean" in line]
    assert run.validation is not None
    base = [float(picture.mean()) for picture in run.validation.base_pictures]
    assert [line["eval/brightness/base_mean"] for line in lines] == [pytest.approx(sum(base) / 2)] * 2
    assert lines[1]["eval/brightness/mean"] != lines[0]["eval/brightness/base_mean"]


def test_an_unknown_scorer_is_the_users_error(prepare: Start) -> None:
    with pytest.raises(ValueError, match=r"validation_scorer 'pikscore': .*nearest: pickscore"):
        prepare("run", validation_scorer="pikscore", validation_steps=1, validation_prompts=("a",))
