"""The check of all images is done once: kept while the files stay the same, done anew when they do not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffpref.data import scan, verdicts
from diffpref.data.images import DEFAULT_LIMITS, ImageLimits


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pair whose images were looked at."""
    seen: list[int] = []
    real = scan._inspect

    def counted(*args: Any) -> Any:
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(scan, "_inspect", counted)
    return seen


def _facts(pairs: Any) -> Any:
    return pairs.pair_ids, pairs.prompts, pairs.p0.tolist(), pairs.rejected


def test_the_second_start_looks_at_nothing(load: Any, make_columns: Any, write_parquet: Any, looked: list[int]) -> None:
    columns = make_columns(5)
    columns["jpg_0"][2] = b"broken"
    path = write_parquet(columns)
    first = load(path)
    assert len(looked) == 5
    assert _facts(load(path)) == _facts(first)
    assert len(looked) == 5


def test_changed_data_and_rules_are_checked_anew(
    load: Any, make_columns: Any, write_parquet: Any, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = make_columns(3)
    path = write_parquet(columns)
    load(path)
    load(path, check_images=False)  # ids only: another question
    assert len(looked) == 6
    load(write_parquet(columns | {"jpg_0": make_columns(6)["jpg_0"][3:]}))
    assert len(looked) == 9
    monkeypatch.setattr(verdicts, "DEFAULT_LIMITS", ImageLimits(max_side=100))
    load(path)
    assert len(looked) == 12
    assert DEFAULT_LIMITS.max_side != 100


def test_more_samples_add_to_what_is_known(load: Any, make_columns: Any, write_parquet: Any, looked: list[int]) -> None:
    path = write_parquet(make_columns(150))
    assert len(load(path, max_samples=3)) == 3
    first = len(looked)
    assert first < 150
    assert len(load(path)) == 150
    assert len(looked) == 150


def test_changed_files_beside_the_data_are_noticed(load: Any, put: Any, encode: Any, looked: list[int]) -> None:
    a, b = put("j/a.png", encode(1)), put("j/b.png", encode(2))
    path = put("j/x.jsonl", json.dumps({"prompt": "x", "image_0": "a.png", "image_1": "b.png", "label_0": 1}))
    load(path)
    load(path)
    assert len(looked) == 1
    a.write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a JPEG"):
        load(path)
    a.write_bytes(encode(1))
    os.utime(b, ns=(0, 0))
    load(path)
    assert len(looked) == 3


def test_tables_in_memory_are_always_looked_at(load: Any, make_columns: Any, looked: list[int], tmp_path: Path) -> None:
    load(make_columns(2))
    load(make_columns(2))
    assert len(looked) == 4
    assert not list((tmp_path / "cache").rglob("checked/*"))


def test_a_damaged_memory_is_done_anew(load: Any, make_columns: Any, write_parquet: Any, looked: list[int], tmp_path: Path) -> None:
    path = write_parquet(make_columns(2))
    load(path)
    [kept] = (tmp_path / "cache").rglob("checked/*.parquet")
    kept.write_bytes(b"PAR1")
    assert len(load(path)) == 2
    assert len(looked) == 4


def test_an_interrupted_check_keeps_what_it_has_seen(
    load: Any, make_columns: Any, write_parquet: Any, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(make_columns(150))
    real = scan._record

    def stop(*args: Any) -> None:
        if args[2] == 70:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(scan, "_record", stop)
    with pytest.raises(KeyboardInterrupt):
        load(path)
    monkeypatch.setattr(scan, "_record", real)
    before = len(looked)
    assert before == 128
    assert len(load(path)) == 150
    assert len(looked) == 150


def test_a_read_only_cache_is_no_error(load: Any, make_columns: Any, write_parquet: Any, put: Any) -> None:
    put("cache/diffpref", b"a file where a folder should be")
    assert len(load(write_parquet(make_columns(2)))) == 2
