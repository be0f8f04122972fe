"""Long work that may be interrupted: a folder with its settings, numbered shards, files written complete or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_UNFINISHED = re.compile(r"\..+\.\d+")  # what a process leaves that was killed while it wrote


def claim_folder(folder: Path, name: str, settings: Mapping[str, Any], is_main: bool) -> None:
    """Make an output folder this work's own, with its settings in the file `name`; the main process does it, the others must wait.

    Files that a killed process left half written are removed. Raises ValueError when the folder holds something else, or the same
    kind of work with other settings.
    """
    if not is_main:  # it would see a folder half made
        return
    for unfinished in folder.rglob(".*"):
        if _UNFINISHED.fullmatch(unfinished.name) and unfinished.is_file():
            unfinished.unlink()
    stored = folder / name
    if stored.exists():
        before = json.loads(stored.read_text())
        differing = [f"{n}: {before.get(n)} -> {settings.get(n)}" for n in {**before, **settings} if before.get(n) != settings.get(n)]
        if differing:
            raise ValueError(
                f"output_dir {str(folder)!r} was begun with other settings ({'; '.join(differing)}); choose another output_dir"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output_dir {str(folder)!r} is not empty and was not begun by this command; choose another output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(stored, json.dumps(settings, indent=1))
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be written ({error.strerror}); choose another output_dir") from error


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """<folder>/<kind>-00000.parquet."""
    return folder / f"{kind}-{number:05d}.parquet"


def missing_shards(folder: Path, kind: str, count: int, rank: int, world: int) -> Iterator[int]:
    """The numbers of this rank's shards that are not there yet."""
    for number in range(rank, count, world):
        if not shard_path(folder, kind, number).exists():
            yield number


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file complete or not at all."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, hidden, compression="zstd")
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file complete or not at all."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_bytes(data)
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file complete or not at all."""
    write_bytes(path, text.encode())
