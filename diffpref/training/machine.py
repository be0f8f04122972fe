"""What the machine has to give: memory of the device that trains, RAM within container limits, and disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

PROCESS_BYTES = 700_000_000
"""RAM of Python, the libraries and their first kernels, before any tensor of ours."""
_UNLIMITED = 1 << 60  # how version 1 of control groups says that there is no limit


def device_memory(device: torch.device) -> int:
    """Bytes that the tensors of this process may take on `device`, those that it already holds included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return ram()


def ram() -> int:
    """Bytes of RAM that the tensors of this process may take, those that it already holds included.

    What the ranks of this machine may still take is divided among them. Weights mapped from a file are not held: they count as free.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    used = psutil.Process().memory_info()
    own = used.rss - getattr(used, "shared", 0)
    return max(0, min([psutil.virtual_memory().available, *container_rooms()]) // ranks + own - PROCESS_BYTES)


def container_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left below every memory limit of the control groups that this process is in; empty without limits.

    root: where control groups are mounted. own: the file that lists those of this process.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []  # not Linux
    rooms = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            rooms += [room for folder in _upwards(root, path) if (room := _room(folder, *names)) is not None]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += [room for folder in _upwards(root / "memory", path) if (room := _room(folder, *names)) is not None]
    return rooms


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and all above it; inside a container the path may lead outside of what is mounted."""
    folder = root / path.lstrip("/")
    while folder != root:
        yield folder
        folder = folder.parent
    yield root


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Bytes below the limit of one group; pages of files that can be dropped are not in the way. None without a limit."""
    try:
        allowed = int((folder / limit).read_text())
        taken = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
    return None if allowed >= _UNLIMITED else max(0, allowed - taken + int(stat.get(reclaimable, 0)))


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is or will be."""
    return shutil.disk_usage(existing(folder)).free


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written where `folder` is or will be; leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder), prefix=".diffpref-") as file:
            file.write(b"\0")
    except OSError as error:
        return error.strerror or str(error)
    return None
