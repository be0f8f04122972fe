"""Crash and resume: whatever ends a run, it goes on from its newest complete checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpref.training.checkpoint import checkpoints, is_complete
from tests.reliability.conftest import EVERY, STEPS
from tests.reliability.faults import Fault, Limits
from tests.reliability.harness import SAVE, Trainer, leftovers, newest_step, random_kills, wait_until

Tried = Callable[..., None]


@pytest.mark.reliability("R1")
def test_two_runs_are_the_same_run(trainer: Trainer, whole: str, tmp_path: Path) -> None:
    assert trainer.run(tmp_path / "run").code == 0
    assert trainer.result(tmp_path / "run") == whole


@pytest.mark.reliability("R3", "R9")
def test_killed_in_every_phase_of_a_save(make_trainer: Callable[..., Trainer], whole: str, tmp_path: Path, tried: Tried) -> None:
    """One run, killed at each of its saves in another phase; at most one checkpoint is kept, so that the one before must survive (R9)."""
    trainer = make_trainer(checkpoints_total_limit=1)
    folder = tmp_path / "run"
    assert trainer.run(folder, Fault("SIGKILL", "backward", count=2 * EVERY + 1)).code == -9
    for phase, fault in SAVE.items():
        outcome = trainer.run(folder, fault, resume=True)
        assert outcome.code == -9, (phase, outcome.errors)
        done = (folder / "metrics.jsonl").read_text().count("\n")
        lost = done - max(int(p.name.split("-")[1]) for p in checkpoints(folder) if is_complete(p))
        assert lost == (0 if phase in ("renamed", "while pruning") else EVERY), phase
        tried("R3", lost)
        tried("R9", lost)
    outcome = trainer.run(folder, resume=True)
    assert outcome.code == 0, outcome.errors
    assert trainer.result(folder) == whole
    assert leftovers(folder) == []


@pytest.mark.reliability_full("R4")
def test_killed_at_random(trainer: Trainer, whole: str, tmp_path: Path, tried: Tried) -> None:
    """KILLS is the number of kills; half of them fall into saves, half anywhere within the time that a run takes on this machine."""
    folder, number = tmp_path / "run", int(os.environ.get("KILLS", "200"))
    longest = trainer.run(tmp_path / "timed").seconds
    row = random_kills(trainer, folder, whole, number, seed=2, longest=longest)
    print(f"{row.tried} kills: {row.note}")
    assert row.passed, row.note
    outcome = trainer.run(folder, resume=folder.exists())
    assert outcome.code == 0, outcome.errors
    assert trainer.result(folder) == whole
    assert leftovers(folder) == []
    for _ in range(row.tried):
        tried("R4", row.lost)


@pytest.mark.reliability("R5")
def test_a_full_disk_from_the_start(trainer: Trainer, whole: str, tmp_path: Path) -> None:
    """No file may grow beyond 20 kB: no checkpoint and no result, but the run goes on, and ends when there is space."""
    folder = tmp_path / "run"
    outcome = trainer.run(folder, limits=Limits(file_bytes=20_000))
    assert outcome.code == 4, outcome.errors
    assert re.search(r"checkpoint of step 3 \(\d\.\d MB\) not written \(File too large\)", outcome.errors)
    assert "make space" in outcome.last_line
    assert (newest_step(folder), leftovers(folder)) == (0, [])
    assert (folder / "metrics.jsonl").read_text().count("\n") == STEPS
    assert trainer.run(folder, resume=True).code == 0
    assert trainer.result(folder) == whole


@pytest.mark.reliability_full("R5")
@pytest.mark.parametrize("fault", [Fault("ENOSPC", "fsync", count=5), Fault("ENOSPC", "open", "tmp-checkpoint-6.*/manifest")])
def test_a_full_disk_in_one_save(fault: Fault, trainer: Trainer, whole: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = trainer.run(folder, fault)
    assert outcome.code == 0, outcome.errors
    assert "not written (No space left on device); older ones are kept, training goes on" in outcome.errors
    assert trainer.result(folder) == whole
    assert leftovers(folder) == []


@pytest.mark.reliability("R14")
def test_two_processes_never_share_a_folder(trainer: Trainer, whole: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, end = trainer.start(folder, False, Fault("SIGSTOP", "backward", count=2 * 4))
    wait_until((folder / "checkpoint-3").exists)
    begun = time.monotonic()
    second = trainer.run(folder, resume=True)
    assert second.code == 5, second.errors
    assert "is being written by another run" in second.last_line
    assert time.monotonic() - begun < 60
    os.kill(process.pid, 18)  # SIGCONT
    assert end().code == 0
    assert trainer.result(folder) == whole


@pytest.mark.reliability_full("R15")
def test_a_folder_that_vanishes_ends_the_run(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = make_trainer(max_train_steps=100_000)
    _, end = trainer.start(folder, False)
    wait_until((folder / "checkpoint-3").exists)
    folder.rename(tmp_path / "away")
    outcome = end()
    assert outcome.code == 4, outcome.errors
    assert "has vanished" in outcome.last_line
    steps = (tmp_path / "away" / "metrics.jsonl").read_text().count("\n")
    assert steps - newest_step(tmp_path / "away") <= 4 * EVERY
    shutil.rmtree(tmp_path / "away")


@pytest.mark.reliability_full("R15")
def test_a_read_only_place_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    outcome = trainer.run(tmp_path / "run", limits=Limits(is_root=False))
    tmp_path.chmod(stat.S_IRWXU)
    assert outcome.code == 2, outcome.errors
    assert re.search("output_dir .* cannot be (created|written)", outcome.last_line)
