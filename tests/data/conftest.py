"""Small encoded images and pair tables, made on the fly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.data.pairs import PairDataset, load_pairs
from tests.hostile_files import encoded

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """encode(image or seed, kind="PNG", **options) -> bytes; a seed makes a noisy 16 x 12 RGB image."""
    return encoded


@pytest.fixture(scope="session")
def make_columns(encode: Encode) -> Callable[..., dict[str, list[Any]]]:
    """make_columns(count, **replacements) -> columns of valid pairs; replacements are lists of `count` values."""

    def make(count: int, **replacements: list[Any]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {
            "caption": [f"prompt {row}" for row in range(count)],
            "jpg_0": [encode(2 * row) for row in range(count)],
            "jpg_1": [encode(2 * row + 1) for row in range(count)],
            "label_0": [float(row % 2) for row in range(count)],
            "label_1": [1.0 - row % 2 for row in range(count)],
        }
        return columns | replacements

    return make


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """write_parquet(columns, name) -> path below the test's own folder."""

    def write(columns: dict[str, list[Any]], name: str = "train-0.parquet") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return path

    return write


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., PairDataset]:
    """load(source, **options): `load_pairs` with its copies below the test's own folder."""

    def run(source: Any, **options: Any) -> PairDataset:
        source = pa.table(source) if isinstance(source, dict) else source
        return load_pairs(source, cache_dir=tmp_path / "cache", **options)

    return run


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """put(path below the test's own folder, bytes or text) -> the file."""

    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="session")
def found() -> Callable[[PairDataset], list[tuple[Any, ...]]]:
    """found(pairs) -> (prompt, image 0, image 1, p0) of every pair."""

    def read(pairs: PairDataset) -> list[tuple[Any, ...]]:
        rows = [pairs.row(index) for index in range(len(pairs))]
        return [(row.prompt, row.image_0, row.image_1, row.p0) for row in rows]

    return read
