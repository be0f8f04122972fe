"""Trackers: which are meant, what they are told, and that a real one can be read afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpref.training import trackers
from diffpref.training.run import Run
from diffpref.training.trackers import log_images, start_trackers, tracker_names

PICTURES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@pytest.fixture
def two_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with tensorboard and wandb."""
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "wandb"])


@pytest.mark.usefixtures("two_installed")
@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("none", []),
        ("all", ["tensorboard", "wandb"]),
        ("wandb", ["wandb"]),
        ("wandb, tensorboard", ["wandb", "tensorboard"]),
        ("wandb,wandb", ["wandb"]),
    ],
)
def test_names(report_to: str, names: list[str]) -> None:
    assert tracker_names(report_to) == names


@pytest.mark.usefixtures("two_installed")
@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "report_to is 'tensorbord'; accepted: none, all, or names .*tensorboard, .*wandb"),
        ("none,wandb", "report_to is 'none,wandb'; accepted"),
        (" ", "accepted: none"),
        ("wandb,comet_ml", "report_to is 'wandb,comet_ml', but it is not installed; pip install comet-ml, or use none"),
    ],
)
def test_bad_names(report_to: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tracker_names(report_to)


def test_all_of_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"pip install diffpref\[trackers\]"):
        tracker_names("all")


class Recorder:
    """A tracker that remembers its pictures."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def log_images(self, values: dict[str, Any], **options: Any) -> None:
        """Remember."""
        self.calls.append((values, options))


def test_every_tracker_gets_pictures_in_its_own_form() -> None:
    made = {name: Recorder(name) for name in ("tensorboard", "wandb", "swanlab", "aim", "clearml")}
    silent = SimpleNamespace(name="mlflow")  # has no pictures, and is not asked
    for tracker in (*made.values(), silent):
        log_images(tracker, 7, {"validation/policy": PICTURES}, ["one", "two"])
    ((values, options),) = made["tensorboard"].calls
    assert values["validation/policy"] is PICTURES
    assert options == {"step": 7, "dataformats": "NHWC"}
    for name in ("wandb", "swanlab"):
        ((values, options),) = made[name].calls
        assert [picture.shape for picture in values["validation/policy"]] == [(4, 4, 3)] * 2
        assert options == {"step": 7}
    assert [(*values, *next(iter(values.values()))[1:]) for values, _ in made["aim"].calls] == [
        ("validation/policy/0", "one"),
        ("validation/policy/1", "two"),
    ]
    assert [next(iter(values)) for values, _ in made["clearml"].calls] == ["validation/policy/0", "validation/policy/1"]


def test_no_pictures_are_not_logged() -> None:
    tracker = Recorder("tensorboard")
    log_images(tracker, 7, {"validation/policy": PICTURES[:0]}, [])
    assert tracker.calls == []


def test_trackers_are_told_the_settings_but_no_secret(tmp_path: Path) -> None:
    told: list[Any] = []
    accelerator = SimpleNamespace(
        log_with=["wandb"], is_main_process=True, logging_dir=tmp_path / "logs", init_trackers=lambda *args: told.extend(args)
    )
    settings = {"rank": 4, "hub_token": "secret", "lora_alpha": None, "validation_prompts": ["a"]}
    start_trackers(accelerator, "mine", settings, first_step=3)  # type: ignore[arg-type]
    project, config, options = told
    assert (project, config) == ("mine", {"rank": 4})
    assert options["wandb"] == {"dir": str(tmp_path / "logs")}
    assert options["tensorboard"] == {"purge_step": 4}
    assert (tmp_path / "logs").is_dir()


@pytest.mark.reliability("H2")
def test_a_run_goes_on_without_its_tracker(prepare: Callable[..., Run]) -> None:
    """One tracker fails at the second step, one when it is finished; the third is told everything."""
    from diffpref.training.loop import train

    class Told:
        def __init__(self, name: str, fails_at: int | None = None, fails_to_finish: bool = False) -> None:
            self.name, self.fails_at, self.fails_to_finish, self.steps = name, fails_at, fails_to_finish, list[int]()

        def log(self, values: dict[str, Any], step: int) -> None:
            if step == self.fails_at:
                raise ConnectionError("unreachable")
            self.steps.append(step)

        def finish(self) -> None:
            if self.fails_to_finish:
                raise ConnectionError("unreachable")

    run = prepare("run", max_train_steps=3)
    told = [Told("down", fails_at=2), Told("late", fails_to_finish=True), Told("up")]
    run.accelerator.trackers = [*told]
    train(run)
    run.log.finish(3)
    run.log.close()
    assert [t.steps for t in told] == [[1], [1, 2, 3], [1, 2, 3]]
    lost = [line for line in (run.folder / "events.jsonl").read_text().splitlines() if "tracker lost" in line]
    assert ["the tracker down failed (ConnectionError: unreachable)" in lost[0], "the tracker late" in lost[1]] == [True, True]


def test_tensorboard_for_real(run_training: Callable[..., Path], prepare: Callable[..., Run]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"report_to": "tensorboard", "logging_dir": "events", "tracker_project_name": "mine", "max_train_steps": 2}
    settings |= {"validation_steps": 2, "validation_prompts": ("a red circle",), "num_validation_images": 1}
    run = prepare("run", **settings)
    from diffpref.training.loop import train

    train(run)
    run.accelerator.end_training()
    events = accumulator.EventAccumulator(str(run.folder / "events" / "mine"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Images("validation/policy")] == [2]
    assert not (run.folder / "logs").exists()


def test_none_needs_no_tracker(prepare: Callable[..., Run]) -> None:
    run = prepare("run", report_to="none")
    assert run.accelerator.trackers == []
    assert not (run.folder / "logs").exists()
