"""What the machine gives: limits of containers, memory of ranks, disk, write permission."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from diffpref.training import machine

GB = 10**9


def group(folder: Path, version: int, limit: str, taken: int, droppable: int) -> None:
    """The files of one control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' * (version == 1)}inactive_file {droppable}\n")


def test_the_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/user/job\n")
    root = tmp_path / "cgroup"
    group(root / "user" / "job", 2, str(8 * GB), 5 * GB, GB)
    group(root / "user", 2, str(6 * GB), 5 * GB, 0)
    group(root, 2, "max", 0, 0)
    assert machine.container_rooms(root, own) == [4 * GB, GB]


def test_limits_of_the_older_kind(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("9:cpu,cpuacct:/job\n7:memory:/job\n")
    root = tmp_path / "cgroup"
    group(root / "memory" / "job", 1, str(4 * GB), GB, GB // 2)
    group(root / "memory", 1, "9223372036854771712", 0, 0)  # what stands there without a limit
    assert machine.container_rooms(root, own) == [3 * GB + GB // 2]


def test_inside_a_container_the_limit_stands_at_the_root(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/../../outside/pod\n")
    group(tmp_path / "cgroup", 2, str(2 * GB), 3 * GB, 0)
    assert machine.container_rooms(tmp_path / "cgroup", own) == [0]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert machine.container_rooms(tmp_path, tmp_path / "nothing") == []
    (tmp_path / "own").write_text("0::/job\n")
    assert machine.container_rooms(tmp_path / "cgroup", tmp_path / "own") == []


def test_ram_is_what_is_left_and_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    used = SimpleNamespace(rss=3 * GB, shared=GB)  # 1 GB of it is mapped from files
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * GB))
    monkeypatch.setattr(machine, "container_rooms", lambda: [])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    held = 2 * GB - machine.PROCESS_BYTES
    assert machine.ram() == 12 * GB + held
    monkeypatch.setattr(machine, "container_rooms", lambda: [8 * GB, 20 * GB])
    assert machine.ram() == 8 * GB + held
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.ram() == 2 * GB + held


def test_this_machine_has_some_memory() -> None:
    assert 0 < machine.device_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_memory_of_a_card_counts_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GB)
    assert machine.device_memory(torch.device("cuda")) == 12 * GB


def test_writing_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    assert machine.write_problem(tmp_path / "not" / "yet" / "there") is None
    assert list(tmp_path.iterdir()) == []
    assert machine.free_disk(tmp_path / "not" / "yet") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)
    (tmp_path / "file").write_text("")
    assert machine.write_problem(tmp_path / "file" / "run") == "Not a directory"
