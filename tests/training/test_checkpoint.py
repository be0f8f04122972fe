"""Checkpoints are complete or invisible, and damaged ones are passed over."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpref.training import checkpoint, saving
from diffpref.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    is_complete,
    load_checkpoint,
    optimizer_tensors,
    restore,
    save_checkpoint,
    set_aside_after,
)
from diffpref.training.loop import train
from diffpref.training.run import Run

Start = Callable[..., Run]
Go = Callable[..., Path]


def save(folder: Path, step: int, keep: int | None = None, **state: Any) -> Path:
    """A checkpoint of two small tensors that depend on the step."""
    tensors = {"weights": {"a.b": torch.full((3,), float(step))}, "optimizer": {"a.b/exp_avg": torch.full((3,), 0.1 * step)}}
    return save_checkpoint(folder, step, tensors, {"pairs_per_update": 4, **state}, keep)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, scheduler={"last_epoch": 7})
    assert names(folder) == ["manifest.json", "optimizer.safetensors", "trainer_state.json", "weights.safetensors"]
    tensors, state = load_checkpoint(folder)
    assert torch.equal(tensors["weights"]["a.b"], torch.full((3,), 7.0))
    assert torch.equal(tensors["optimizer"]["a.b/exp_avg"], torch.full((3,), 0.1 * 7))
    assert state == {"format": 1, "step": 7, "pairs_per_update": 4, "scheduler": {"last_epoch": 7}}
    assert is_complete(folder)


def test_steps_are_ordered_as_numbers_and_strangers_ignored(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "bad-checkpoint-11").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-100", [])


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 3]), (2, [2, 3]), (1, [3])])
def test_keep_limit(keep: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


PHASES = ["save_file", "_digest", "_flush", "rename"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_fault_while_saving_leaves_nothing_and_keeps_the_old(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if phase == "rename" else (checkpoint, phase)), full_disk)
        with pytest.raises(OSError, match="space"):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert is_complete(tmp_path / "checkpoint-1")
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_while_saving_is_never_mistaken_for_a_checkpoint(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    class Killed(BaseException):
        """Nothing runs after it, as after SIGKILL."""

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if phase == "rename" else (checkpoint, phase)), kill)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process does not clean up
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert any(name.startswith(".tmp-checkpoint-2") for name in names(tmp_path))
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-1", [])
    assert names(tmp_path) == ["checkpoint-1"]


def truncate(folder: Path) -> None:
    """A file cut short."""
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    """A silent change of the same length."""
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def lose_the_manifest(folder: Path) -> None:
    """Without a manifest nothing is known to be complete."""
    (folder / "manifest.json").unlink()


def break_the_manifest(folder: Path) -> None:
    """JSON of another shape."""
    (folder / "manifest.json").write_text('["weights.safetensors"]')


def lose_a_file(folder: Path) -> None:
    """A file that the manifest names."""
    (folder / "optimizer.safetensors").unlink()


def empty(folder: Path) -> None:
    """A folder without files."""
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [truncate, flip_a_bit, lose_the_manifest, break_the_manifest, lose_a_file, empty]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.reliability("R7")
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found, warnings = find_checkpoint(tmp_path, "latest")
    assert found == tmp_path / "checkpoint-1"
    assert len(warnings) == 1
    assert "checkpoint-2" in warnings[0]
    assert names(tmp_path) == ["bad-checkpoint-2", "checkpoint-1"]
    assert find_checkpoint(tmp_path, "latest") == (found, [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.reliability("R8")
def test_when_all_are_damaged_the_run_does_not_start_over_in_silence(damage: Callable[[Path], None], tmp_path: Path) -> None:
    for step in (1, 2):
        damage(save(tmp_path, step))
    with pytest.raises(ValueError, match="resume_from_checkpoint latest: no complete checkpoint") as caught:
        find_checkpoint(tmp_path, "latest")
    assert "checkpoint-1" in str(caught.value)
    assert "checkpoint-2" in str(caught.value)
    assert find_checkpoint(tmp_path, "latest", restart=True) == (
        None,
        ["no complete checkpoint is left; begins again at step 0, as restart says"],
    )


def test_a_named_checkpoint_must_be_there_and_complete(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "checkpoint-1") == (folder, [])
    assert find_checkpoint(tmp_path, str(folder)) == (folder, [])
    truncate(folder)
    for wanted in ("checkpoint-1", "checkpoint-2", "latset"):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint '{wanted}'"):
            find_checkpoint(tmp_path, wanted)
    assert folder.is_dir()


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") == (None, [])


@pytest.mark.reliability("R13")
def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_checkpoint(folder)


@pytest.mark.reliability("R13")
def test_a_stored_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """Written by the version of November 2026; as long as this format is called 1, it is read as it was."""
    stored = Path(shutil.copytree(Path(__file__).with_name("format_1"), tmp_path / "run")) / "checkpoint-7"
    assert is_complete(stored)
    tensors, state = load_checkpoint(stored)
    assert torch.equal(tensors["optimizer"]["a.b/exp_avg"], torch.full((3,), 0.1 * 7))
    assert (state["step"], state["scheduler"]) == (7, {"last_epoch": 7})


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-1"])
def test_a_renamed_checkpoint_is_not_taken_for_another_step(name: str, tmp_path: Path) -> None:
    save(tmp_path, 2).rename(tmp_path / name)
    assert not is_complete(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "kept")  # a name that tells no step is the user's business
    assert is_complete(tmp_path / "kept")


def test_the_newest_is_never_the_one_that_goes(tmp_path: Path) -> None:
    for step in (5, 9):
        save(tmp_path, step)
    save(tmp_path, 3, keep=1)  # somebody went back to an earlier step
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-9"]


def test_later_checkpoints_are_set_aside_and_never_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (3, 6, 9):
            save(tmp_path, step)
        assert set_aside_after(tmp_path, 3) == ["checkpoint-6", "checkpoint-9"]
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-3"]
    assert "later-checkpoint-9-2" in names(tmp_path)


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(OSError, match=r"0\.0 MB needed, 0\.0 MB free") as caught:
        save(tmp_path, 1)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


@pytest.mark.reliability("N4")
def test_a_tensor_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="weights a"):
        save_checkpoint(tmp_path, 1, {"weights": {"a": torch.tensor([1.0, float("nan")])}}, {}, None)
    assert names(tmp_path) == []


def trained() -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """A layer after one step of AdamW."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return dict(layer.named_parameters()), optimizer


def test_weights_and_moments_come_back_into_the_same_parameters() -> None:
    named, optimizer = trained()
    saved = {"weights": {n: p.detach().clone() for n, p in named.items()}, "optimizer": optimizer_tensors(named, optimizer)}
    assert {key.split("/")[1] for key in saved["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
    saved["optimizer"] = {key: x.clone() for key, x in saved["optimizer"].items()}
    other, fresh = trained()
    restore(other, fresh, saved)
    assert all(torch.equal(p, named[n]) for n, p in other.items())
    assert all(torch.equal(x, saved["optimizer"][key]) for key, x in optimizer_tensors(other, fresh).items())


@pytest.mark.reliability("R12")
def test_a_checkpoint_of_another_model_is_refused() -> None:
    named, optimizer = trained()
    saved = {"weights": {n: p.detach() for n, p in named.items()}, "optimizer": {}}
    with pytest.raises(ValueError, match="first extra"):
        restore(named, optimizer, saved | {"weights": saved["weights"] | {"extra": torch.zeros(1)}})
    with pytest.raises(ValueError, match="first bias"):
        restore(named, optimizer, saved | {"weights": saved["weights"] | {"bias": torch.zeros(5)}})
    with pytest.raises(AssertionError, match="exactly"):
        restore(named, torch.optim.AdamW([named["bias"]]), saved)


def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one(
    run_training: Go, read_state: Callable[[Path, int], dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_training("whole", max_train_steps=5)
    parts = run_training("parts", max_train_steps=4, checkpointing_steps=2)
    truncate(parts / "checkpoint-4")
    run_training("parts", max_train_steps=5, resume_from_checkpoint="latest")
    assert "checkpoint-4 is damaged" in capsys.readouterr().err
    assert (parts / "bad-checkpoint-4").is_dir()
    a, b = read_state(parts, 5), read_state(whole, 5)
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_full_disk_costs_checkpoints_but_not_the_run(
    prepare: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_training: Go
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = prepare("run", max_train_steps=2, checkpointing_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        patch.setattr(saving, "PAUSE", 0)
        train(run)
    assert run.unsaved
    assert checkpoints(run.folder) == []
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
    told = capsys.readouterr().err
    assert re.search(r"checkpoint of step 1 \(0\.\d MB\) not written \(No space left on device\)", told)
    assert told.count("checkpoint of step 2") == saving.TRIES  # nothing comes after the last one


def test_a_run_keeps_to_its_limit(run_training: Go) -> None:
    folder = run_training("run", checkpointing_steps=1, checkpoints_total_limit=2)
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-5", "checkpoint-6"]


def test_resuming_with_another_number_of_pairs_per_update_is_refused(prepare: Start, run_training: Go) -> None:
    run_training("run", max_train_steps=2)
    with pytest.raises(ValueError, match="choose them so that the product stays"):
        prepare("run", train_batch_size=3, resume_from_checkpoint="latest")
    run = prepare("run", train_batch_size=1, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    assert run.first_step == 2


@pytest.mark.parametrize("change", [{"learning_rate": 1e-4}, {"seed": 5}, {"beta": 7.0}, {"rank": 3}])
@pytest.mark.reliability("R11")
def test_resuming_with_other_settings_is_refused(change: dict[str, Any], prepare: Start, run_training: Go) -> None:
    run_training("run", max_train_steps=1)
    with pytest.raises(ValueError, match=rf"{next(iter(change))}: .* -> {next(iter(change.values()))}"):
        prepare("run", **change, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="already holds this run"):
        prepare("run", max_train_steps=1)
