"""Signals: the step in progress is finished and saved, wherever the run is; asked twice, it ends at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpref.training.stopping import SAME_REQUEST
from tests.reliability.conftest import EVERY
from tests.reliability.faults import Fault
from tests.reliability.harness import Trainer, leftovers, lines_of, newest_step, wait_until

Tried = Callable[..., None]
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143}
PLACES = {
    "in a step": lambda name: Fault(name, "backward", count=9),
    "in a save": lambda name: Fault(name, "open", ".tmp-checkpoint-3", 2),
    "while loading": lambda name: Fault(name, "open", "unet/config.json"),
}
EACH, FULL = pytest.mark.reliability("R6"), pytest.mark.reliability_full("R6")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, place, marks=EACH if (name, place) == ("SIGTERM", "in a step") else FULL, id=f"{name} {place}")
        for name in CODES
        for place in PLACES
    ],
)
def test_a_signal_costs_nothing(name: str, place: str, trainer: Trainer, whole: str, tmp_path: Path, tried: Tried) -> None:
    folder = tmp_path / "run"
    outcome = trainer.run(folder, PLACES[place](name))
    assert outcome.code == CODES[name], outcome.errors
    if place == "while loading":
        assert not folder.exists()
        assert outcome.last_line == f"stopped by {name}"
    else:
        assert newest_step(folder) == lines_of(folder / "metrics.jsonl") > 0
        assert "--resume_from_checkpoint latest" in outcome.last_line
    tried("R6", 0)
    assert trainer.run(folder, resume=folder.exists()).code == 0
    assert trainer.result(folder) == whole
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    "place",
    [pytest.param("in a step", marks=pytest.mark.reliability("R6")), pytest.param("in a save", marks=pytest.mark.reliability_full("R6"))],
)
def test_a_second_signal_ends_at_once_and_harms_nothing(place: str, trainer: Trainer, whole: str, tmp_path: Path, tried: Tried) -> None:
    """The process hangs in a step or in a save that began after the first signal; a later one gets through."""
    folder = tmp_path / "run"
    hang = Fault("hang", "backward", count=10) if place == "in a step" else Fault("hang", "open", ".tmp-checkpoint-5.*/manifest")
    process, end = trainer.start(folder, False, Fault("SIGTERM", "backward", count=9), hang)
    wait_until(lambda: lines_of(folder / "metrics.jsonl") == 4 + (place == "in a save"))
    time.sleep(SAME_REQUEST + 0.5)
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert end().code == CODES["SIGTERM"]
    assert time.monotonic() - begun < 10
    lost = lines_of(folder / "metrics.jsonl") - newest_step(folder)
    assert newest_step(folder) == EVERY
    tried("R6", lost)
    assert trainer.run(folder, resume=True).code == 0
    assert trainer.result(folder) == whole
    assert leftovers(folder) == []


@pytest.mark.reliability_full("R2")
def test_stopped_in_every_part_of_a_pass_over_the_data(make_trainer: Callable[..., Trainer], tmp_path: Path, tried: Tried) -> None:
    """Three steps of two pairs are a pass: stopped in the first half of a step, in the last step of a pass, in the first of the next."""
    trainer, folder = make_trainer(max_train_samples=6), tmp_path / "run"
    assert trainer.run(tmp_path / "whole").code == 0
    for micro_steps, step in ((1, 1), (3, 3), (2, 4), (4, 6)):
        outcome = trainer.run(folder, Fault("SIGTERM", "backward", count=micro_steps), resume=folder.exists())
        assert (outcome.code, newest_step(folder), lines_of(folder / "metrics.jsonl")) == (143, step, step), outcome.errors
        tried("R2", 0)
    assert trainer.run(folder, resume=True).code == 0
    assert trainer.result(folder) == trainer.result(tmp_path / "whole")
