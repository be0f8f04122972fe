"""Damaged checkpoints and changed settings: passed over or refused, and never in silence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.faults import Fault
from tests.reliability.harness import Trainer, leftovers, lines_of
from tests.training.test_checkpoint import DAMAGES, flip_a_bit

Tried = Callable[..., None]
Damage = Callable[[Path], Any]


def take_another_step(folder: Path) -> None:
    """A name that promises a later step."""
    folder.rename(folder.with_name("checkpoint-9"))


ALL: list[Damage] = [*DAMAGES, take_another_step]


@pytest.fixture(scope="module")
def killed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in step 8, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert trainer.run(folder, Fault("SIGKILL", "backward", count=2 * 8)).code == -9
    assert lines_of(folder / "metrics.jsonl") == 7
    return folder


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=(pytest.mark.reliability if d is flip_a_bit else pytest.mark.reliability_full)("R7")) for d in ALL],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_checkpoint_costs_itself(damage: Damage, copy: Path, trainer: Trainer, whole: str, tried: Tried) -> None:
    damage(copy / "checkpoint-6")
    outcome = trainer.run(copy, resume=True)
    assert outcome.code == 0, outcome.errors
    name = "checkpoint-9" if damage is take_another_step else "checkpoint-6"
    assert f"{name} is damaged or incomplete and was renamed to bad-{name}" in outcome.errors
    tried("R7", 6 - 3)
    assert trainer.result(copy) == whole
    assert leftovers(copy) == []


@pytest.mark.reliability_full("R8")
def test_with_only_damaged_ones_nothing_starts_over(copy: Path, trainer: Trainer) -> None:
    for step in (3, 6):
        flip_a_bit(copy / f"checkpoint-{step}")
    outcome = trainer.run(copy, resume=True)
    assert outcome.code == 2, outcome.errors
    assert "no complete checkpoint" in outcome.last_line
    assert lines_of(copy / "metrics.jsonl") == 7


@pytest.mark.reliability_full("R11")
@pytest.mark.parametrize("name", ["learning_rate", "method", "beta", "data", "model"])
def test_other_settings_are_not_resumed_with(
    name: str, copy: Path, make_trainer: Callable[..., Trainer], pairs_file: Path, sd_v_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copy(pairs_file, tmp_path / "other.parquet"))
    change = {"data": {"train_data_dir": other}, "model": {"pretrained_model_name_or_path": sd_v_folder}}
    settings = change.get(name, {name: {"learning_rate": 2e-3, "method": "dpop", "beta": 100}.get(name)})
    before = {path.name for path in copy.iterdir()}
    outcome = make_trainer(**settings).run(copy, resume=True)
    assert outcome.code == 2, outcome.errors
    assert f"{next(iter(settings))}: " in outcome.last_line
    assert {path.name for path in copy.iterdir()} == before


@pytest.mark.reliability_full("R13")
def test_a_checkpoint_of_another_format_is_refused(copy: Path, trainer: Trainer) -> None:
    """As a later version would leave it: complete, under another number."""
    for name in ("checkpoint-3", "checkpoint-6"):
        folder = copy / name
        state, manifest = (json.loads((folder / f"{part}.json").read_text()) for part in ("trainer_state", "manifest"))
        text = json.dumps(state | {"format": 99}).encode()
        (folder / "trainer_state.json").write_bytes(text)
        manifest["trainer_state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    outcome = trainer.run(copy, resume=True)
    assert outcome.code == 2, outcome.errors
    assert "checkpoint format 99; this version reads format 1" in outcome.last_line
    assert lines_of(copy / "metrics.jsonl") == 7
