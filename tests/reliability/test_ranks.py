"""Two processes: what happens to one of them happens to the run, and the run goes on as a whole."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import EVERY
from tests.reliability.faults import Fault
from tests.reliability.harness import Outcome, Process, Trainer, newest_step

Tried = Callable[..., None]
Go = Callable[..., list[Outcome]]


Started = list[tuple[Process, Callable[[], Outcome]]]


@pytest.fixture
def begin_two(make_trainer: Callable[..., Trainer]) -> Callable[..., Started]:
    """begin_two(folder, *faults, resume=, second={settings of rank 1}, **settings). Together they are one rank of two parts."""

    def go(folder: Path, *faults: Fault, resume: bool = False, second: dict[str, Any] | None = None, **settings: Any) -> Started:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(2):
            where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = settings | (second or {} if rank else {})
            trainer = make_trainer(environment=where, gradient_accumulation_steps=1, **own)
            started.append(trainer.start(folder, resume, *faults))
        return started

    return go


@pytest.fixture
def two(begin_two: Callable[..., Started]) -> Go:
    """The same, until both have ended."""
    return lambda *given, **settings: [end() for _, end in begin_two(*given, **settings)]


@pytest.mark.reliability_full("M1", "R10")
@pytest.mark.parametrize("where", ["in a step", "in a save"])
def test_the_death_of_one_ends_both_and_nothing_is_lost(
    where: str, two: Go, trainer: Trainer, whole: str, tmp_path: Path, tried: Tried
) -> None:
    folder = tmp_path / "run"
    fault = Fault("SIGKILL", "backward", count=5, rank=1) if where == "in a step" else Fault("SIGKILL", "open", "tmp-checkpoint-6", rank=0)
    outcomes = two(folder, fault)
    assert sorted(o.code == -9 for o in outcomes) == [False, True]
    assert all(o.code != 0 and o.seconds < 120 for o in outcomes)
    lost = (folder / "metrics.jsonl").read_text().count("\n") - newest_step(folder)
    assert lost <= EVERY
    tried("M1", lost)
    if where == "in a step":
        assert trainer.run(folder, resume=True).code == 0  # one rank with twice the accumulation
    else:
        assert [o.code for o in two(folder, resume=True)] == [0, 0]
    assert trainer.result(folder) == whole


@pytest.mark.reliability_full("M2")
@pytest.mark.parametrize("what", ["exit", "hang", "EIO"])
def test_one_that_leaves_fails_or_hangs_ends_the_other(what: str, begin_two: Callable[..., Started], tmp_path: Path) -> None:
    folder, fault = tmp_path / "run", Fault(what, "backward", count=5, rank=1)
    (_, first), (process, second) = begin_two(folder, fault, rank_timeout=10)
    outcome = first()
    if what == "hang":
        os.kill(process.pid, signal.SIGKILL)  # a launcher does this
    second()
    assert outcome.code not in (0, -9)
    assert outcome.seconds < 200
    assert newest_step(folder) == EVERY


@pytest.mark.reliability("M3")
def test_a_signal_to_one_saves_the_same_step_on_both(two: Go, trainer: Trainer, whole: str, tmp_path: Path, tried: Tried) -> None:
    folder = tmp_path / "run"
    outcomes = two(folder, Fault("SIGTERM", "backward", count=5, rank=1))
    assert [o.code for o in outcomes] == [143, 143], outcomes[0].errors
    done = (folder / "metrics.jsonl").read_text().count("\n")
    assert done == newest_step(folder) in (5, 6)
    tried("M3", 0)
    assert trainer.run(folder, resume=True).code == 0
    assert trainer.result(folder) == whole
    tried("M5", 0)  # every save compares the weights of all ranks
    tried("R10", 0)  # two ranks, then one with twice the accumulation


@pytest.mark.reliability_full("M4")
def test_processes_with_other_settings_are_refused(two: Go, tmp_path: Path) -> None:
    outcomes = two(tmp_path / "run", second={"seed": 1})
    assert [o.code for o in outcomes] == [2, 2]
    assert "the processes disagree (seed: 0, 1)" in outcomes[0].last_line
    assert not (tmp_path / "run").exists()


@pytest.mark.reliability_full("N1")
def test_not_finite_on_one_is_skipped_on_both(two: Go, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = two(folder, Fault("nan", "backward", count=5, rank=1))
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].errors
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if '"grad_norm": null' in line] == [5]
    assert (folder / "events.jsonl").read_text().count('"pairs": ["') == 1
