"""Two processes: what happens to one of them happens to the run, and the run goes on as a whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.reliability.conftest import EVERY
from tests.reliability.faults import Fault
from tests.reliability.harness import Outcome, Process, Spawned, Trainer, leftovers, lines_of, newest_step, wait_until

Tried = Callable[..., None]
Go = Callable[..., list[Outcome]]


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
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


DEATHS = {
    "in a step": Fault("SIGKILL", "backward", count=5, rank=1),
    "in a save": Fault("SIGKILL", "open", "tmp-checkpoint-6", rank=0),
    "while loading": Fault("SIGKILL", "open", "unet/config.json", rank=1),
}


@pytest.mark.reliability_full("M1")
@pytest.mark.parametrize("where", DEATHS)
def test_the_death_of_one_ends_both_and_nothing_is_lost(
    where: str, two: Go, trainer: Trainer, whole: str, tmp_path: Path, tried: Tried
) -> None:
    folder = tmp_path / "run"
    outcomes = two(folder, DEATHS[where])
    assert sorted(o.code == -9 for o in outcomes) == [False, True]
    assert all(o.code != 0 and o.seconds < 60 for o in outcomes)
    lost = lines_of(folder / "metrics.jsonl") - newest_step(folder)
    assert lost <= EVERY
    tried("M1", lost)
    if where == "in a step":
        assert trainer.run(folder, resume=True).code == 0  # one rank with twice the accumulation
        tried("R10", 0)
    else:
        assert [o.code for o in two(folder, resume=folder.exists())] == [0, 0]
    assert trainer.result(folder) == whole
    assert leftovers(folder) == []


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
    assert lines_of(folder / "metrics.jsonl") == newest_step(folder) in (5, 6)
    tried("M3", 0)
    assert trainer.run(folder, resume=True).code == 0
    assert trainer.result(folder) == whole
    tried("M5", 0)  # every save compares the weights of all ranks
    tried("R10", 0)  # two ranks, then one with twice the accumulation


@pytest.mark.reliability_full("M3")
def test_a_signal_to_the_launcher_reaches_both(
    settings: dict[str, Any], trainer: Trainer, whole: str, tmp_path: Path, tried: Tried
) -> None:
    """torchrun itself is asked to end: it passes the signal on, both save the same step, and one process goes on from there."""
    folder, given = tmp_path / "run", settings | {"gradient_accumulation_steps": 1, "checkpointing_steps": EVERY}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    process = Spawned([*launcher, *words, "--output_dir", str(folder), "--max_train_steps", "100000"], tmp_path / "log", ALONE)
    wait_until(lambda: newest_step(folder) >= EVERY)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() != 0
    stopped = newest_step(folder)
    assert lines_of(folder / "metrics.jsonl") == stopped
    assert f"stopped by a signal after step {stopped}" in (tmp_path / "log.err").read_text()
    tried("M3", 0)


@pytest.mark.reliability_full("R10")
def test_from_one_process_to_two_and_from_one_worker_to_another(
    two: Go, make_trainer: Callable[..., Trainer], trainer: Trainer, tmp_path: Path, tried: Tried
) -> None:
    """One process of two parts; then two processes; then one whose worker decodes both parts as one micro-batch."""
    folder = tmp_path / "run"
    assert trainer.run(folder, Fault("SIGTERM", "backward", count=3)).code == 143
    assert [o.code for o in two(folder, Fault("SIGTERM", "backward", count=3, rank=0), resume=True)] == [143, 143]
    stopped = newest_step(folder)
    joined = make_trainer(train_batch_size=2, gradient_accumulation_steps=1, dataloader_num_workers=1)
    assert joined.run(folder, resume=True).code == 0
    assert trainer.run(tmp_path / "whole").code == 0
    found, expected = losses_of(folder), losses_of(tmp_path / "whole")
    assert found[:stopped] == expected[:stopped]
    assert found[stopped] == pytest.approx(expected[stopped], rel=1e-5)
    assert found == pytest.approx(expected, rel=2e-3)  # AdamW and beta enlarge what the shape of the batch rounds otherwise
    tried("R10", 0)


def losses_of(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.reliability_full("M4")
@pytest.mark.parametrize("name", ["seed", "learning_rate", "data"])
def test_processes_with_other_settings_or_data_are_refused(name: str, two: Go, pairs_file: Path, tmp_path: Path) -> None:
    shortened = tmp_path / "short.parquet"
    pq.write_table(pq.read_table(pairs_file).slice(1), shortened)
    second = {"seed": 1, "learning_rate": 2e-3} if name != "data" else {"train_data_dir": shortened}
    outcomes = two(tmp_path / "run", second={name: second[name]} if name in second else second)
    assert [o.code for o in outcomes] == [2, 2]
    assert "the processes disagree (" in outcomes[0].last_line
    assert name in outcomes[0].last_line
    assert not (tmp_path / "run").exists()


@pytest.mark.reliability_full("N1")
def test_not_finite_on_one_is_skipped_on_both(two: Go, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = two(folder, Fault("nan", "backward", count=5, rank=1))
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].errors
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if '"grad_norm": null' in line] == [5]
    assert (folder / "events.jsonl").read_text().count('"pairs": ["') == 1
