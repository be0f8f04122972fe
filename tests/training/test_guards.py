"""Numbers that go wrong: stop, go back, or say so; and what a run does about memory, workers and unwritable places."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpref.training.alarms import FEWEST, Alarms, held_out_alarm
from diffpref.training.align import memory_explained
from diffpref.training.device import check_ranks_agree, check_same_weights
from diffpref.training.loop import train
from diffpref.training.run import Run
from diffpref.training.saving import CheckpointWriter
from diffpref.training.stopping import NotFinite, NotSaved, OutOfMemory

Start = Callable[..., Run]
Metrics = Callable[[Path], list[dict[str, Any]]]


def events(folder: Path) -> list[dict[str, Any]]:
    """Lines of events.jsonl."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def spoil(run: Run, calls: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN gradients at some backward passes, counted from 1."""
    backward, count = torch.Tensor.backward, 0

    def spoilt(self: torch.Tensor, *args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        backward(self * math.nan if count in calls else self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", spoilt)


@pytest.mark.reliability("N1", "N2")
def test_a_run_may_stop_at_the_first_update_that_is_not_finite(prepare: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare("run", non_finite="stop", checkpointing_steps=1)
    spoil(run, {3}, monkeypatch)
    with pytest.raises(NotFinite, match=r"step 3: loss .*, gradient norm nan: update skipped; the newest checkpoint is from before"):
        train(run)
    assert [e["event"] for e in events(run.folder)] == ["not finite"]
    assert len(events(run.folder)[0]["pairs"]) == 2
    assert (run.folder / "checkpoint-2").exists()


@pytest.mark.reliability("N1")
def test_a_run_may_go_back_and_see_other_batches(prepare: Start, read_metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prepare("plain")
    train(plain)
    run = prepare("run", non_finite="roll_back", checkpointing_steps=2)
    spoil(run, {4}, monkeypatch)
    train(run)
    assert [e["event"] for e in events(run.folder)] == ["not finite", "rolled back"]
    lines, before = read_metrics(run.folder), read_metrics(plain.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:2] == before[:2]
    assert all(a["loss"] != b["loss"] for a, b in zip(lines[2:], before[2:], strict=True))
    assert all(line["grad_norm"] is not None for line in lines)
    resumed = prepare("run", non_finite="roll_back", checkpointing_steps=2, resume_from_checkpoint="checkpoint-4")
    assert resumed.state.data_key == 1  # the draws after the return are part of the checkpoint
    assert (run.folder / "later-checkpoint-6").exists()
    train(resumed)
    assert read_metrics(run.folder) == lines


@pytest.mark.reliability("N2")
def test_going_back_has_an_end(prepare: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare("run", non_finite="roll_back", checkpointing_steps=1)
    spoil(run, set(range(2, 20)), monkeypatch)
    with pytest.raises(NotFinite, match="after 3 returns to a checkpoint"):
        train(run)
    assert [e["event"] for e in events(run.folder)].count("rolled back") == 3


def look(alarms: Alarms, **values: float) -> list[str]:
    """Kinds of what is reported for one step."""
    return [kind for kind, _ in alarms.look({"loss": 0.7, "grad_norm": 1.0} | values)]


def test_a_spike_is_a_value_far_above_the_median() -> None:
    alarms = Alarms()
    assert [look(alarms, loss=50.0 if i == 3 else 0.7) for i in range(FEWEST)] == [[]] * FEWEST  # too early to tell
    assert look(alarms, grad_norm=9.0) == []
    assert look(alarms, grad_norm=11.0) == ["spike"]
    assert look(alarms, loss=8.0, grad_norm=30.0) == ["spike", "spike"]


def test_saturation_is_said_once_until_it_ends() -> None:
    alarms = Alarms()
    told = [look(alarms, **{"rewards/saturated": 1.0}) for _ in range(FEWEST + 5)]
    assert [len(x) for x in told] == [0] * (FEWEST - 1) + [1] + [0] * 5
    for _ in range(60):
        look(alarms, **{"rewards/saturated": 0.0})
    assert sum(len(look(alarms, **{"rewards/saturated": 1.0})) for _ in range(60)) == 1


@pytest.mark.parametrize(
    ("accuracy", "gains", "said"),
    [(0.99, (-0.1, -0.3), True), (0.9, (-0.1, -0.3), False), (0.99, (0.1, -0.3), False), (None, (0, 0), False)],
)
def test_held_out_pairs_told_apart_while_both_errors_rise(accuracy: float | None, gains: tuple[float, float], said: bool) -> None:
    found = {"eval/gain_chosen": gains[0], "eval/gain_rejected": gains[1]} | (
        {} if accuracy is None else {"eval/implicit_accuracy": accuracy}
    )
    assert (held_out_alarm(found) is not None) is said


def test_a_run_with_a_huge_beta_is_reported_as_saturated(prepare: Start) -> None:
    run = prepare("run", beta=1e9, max_train_steps=FEWEST + 3)
    train(run)
    assert "saturated" in [e["event"] for e in events(run.folder)]


@pytest.mark.reliability("O1")
@pytest.mark.parametrize("preflight", ["refuse", "off"])
def test_a_lack_of_memory_names_what_would_fit(preflight: str, prepare: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare("run", preflight=preflight, checkpointing_steps=1)
    source, count = run.source, 0

    def counted() -> Iterator[Any]:
        nonlocal count
        for batch in source:
            count += 1
            if count == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words.")
            yield batch

    run.source = counted()
    with (
        pytest.raises(OutOfMemory, match=r"memory of cpu \(CUDA out of memory") as caught,
        memory_explained(run),
    ):
        train(run)
    assert "--resume_from_checkpoint latest" in str(caught.value)
    assert "use " in str(caught.value) or "lower resolution" in str(caught.value)
    assert caught.value.code == 6
    assert (run.folder / "checkpoint-2").exists()


@pytest.mark.reliability("D11")
@pytest.mark.parametrize("deaths", [1, 2])
def test_workers_that_die_are_replaced_once(deaths: int, prepare: Start, read_metrics: Metrics) -> None:
    plain = prepare("plain", gradient_accumulation_steps=2, train_batch_size=1)
    train(plain)
    run = prepare("run", gradient_accumulation_steps=2, train_batch_size=1)
    opened, left = run.source_from, deaths

    def dying(source: Iterator[Any], after: int) -> Iterator[Any]:
        nonlocal left
        for place, batch in enumerate(source):
            if place == after and left:
                left -= 1
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            yield batch

    run.source = dying(run.source, 5)
    run.source_from = lambda config, first_step: dying(opened(config, first_step), 1)
    if deaths == 2:
        with pytest.raises(ValueError, match="workers were lost twice at step 3"):
            train(run)
        return
    train(run)
    assert read_metrics(run.folder) == read_metrics(plain.folder)
    assert [e["event"] for e in events(run.folder)] == ["workers lost"]


def test_what_is_written_in_the_background_is_the_same(prepare: Start, read_state: Callable[..., dict[str, torch.Tensor]]) -> None:
    states = []
    for name, background in (("plain", False), ("beside", True)):
        run = prepare(name, save_in_background=background, checkpointing_steps=2)
        train(run)
        states += [read_state(run.folder, step) for step in (2, 4, 6)]
    for a, b in zip(states[:3], states[3:], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_background_write_takes_the_tensors_as_they_were(tmp_path: Path) -> None:
    from diffpref.training.checkpoint import load_checkpoint

    writer = CheckpointWriter(tmp_path, None, lambda step, text: None, in_background=True)
    x = torch.ones(1000)
    writer.save(1, {"weights": {"x": x}}, {})
    x.zero_()
    assert writer.wait()
    assert load_checkpoint(tmp_path / "checkpoint-1")[0]["weights"]["x"].eq(1).all()


def test_a_folder_that_is_gone_three_times_ends_the_run(tmp_path: Path) -> None:
    told: list[str] = []
    writer = CheckpointWriter(tmp_path / "gone", None, lambda step, text: told.append(text))
    assert not writer.save(1, {"weights": {"x": torch.ones(1)}}, {})
    assert not writer.save(2, {"weights": {"x": torch.ones(1)}}, {})
    with pytest.raises(NotSaved, match="has vanished"):
        writer.save(3, {"weights": {"x": torch.ones(1)}}, {})
    assert len(told) == 3


@pytest.mark.reliability("M4", "M5")
def test_ranks_that_disagree(prepare: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = prepare("run").accelerator
    check_ranks_agree(accelerator, {"seed": 1})
    two = replace_processes(accelerator, monkeypatch)
    monkeypatch.setattr("diffpref.training.device.gather_object", lambda own: [*own, {"seed": "2", "data": "x"}])
    with pytest.raises(ValueError, match=r"the processes disagree \(seed: 1, 2\)"):
        check_ranks_agree(two, {"seed": 1, "data": "x"})
    monkeypatch.setattr(two, "gather", lambda x: torch.cat([x, x + 1e-9]))
    with pytest.raises(RuntimeError, match="different weights"):
        check_same_weights(two, {"w": torch.ones(2)})


def replace_processes(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same accelerator, said to be one of two."""
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 2))
    return accelerator
