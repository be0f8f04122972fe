"""What `diffpref inspect` says about data whose faults are known, also when the data is hostile to whoever reads the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.cli import main
from diffpref.labelling.inspection import InspectConfig

Columns = dict[str, list[Any]]


def append(columns: Columns, row: int, **changes: Any) -> None:
    """Repeat a row with changes."""
    for name, values in columns.items():
        values.append(changes.get(name, values[row]))


@pytest.fixture
def columns(pair_columns: Columns) -> Columns:
    """24 good pairs, without names of pictures, of three annotators and a scorer that is right about three quarters of them."""
    kept = {name: list(values) for name, values in pair_columns.items() if not name.endswith("uid")}
    right = [label if row % 4 else 1 - label for row, label in enumerate(kept["label_0"])]
    return kept | {
        "user_id": [f"user {row % 3}" for row in range(24)],
        "quality_0": [float(x) for x in right],
        "quality_1": [1.0 - float(x) for x in right],
    }


def look(columns: Columns, folder: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, pairs.json, pairs.html)."""
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    words = [
        "inspect",
        "--train_data_dir",
        str(folder / "pairs.parquet"),
        "--cache_dir",
        str(folder / "cache"),
        "--output_dir",
        str(folder),
    ]
    code = main([*words, *flags])
    return code, json.loads((folder / "pairs.json").read_text()), (folder / "pairs.html").read_text()


def test_every_fault_is_counted(columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(columns, 3)  # judged twice
    append(columns, 4, label_0=1 - columns["label_0"][4], label_1=1 - columns["label_1"][4])  # and the other way
    append(columns, 5, jpg_0=columns["jpg_1"][5], jpg_1=columns["jpg_0"][5])  # exchanged pictures, same label: the other way too
    append(columns, 6, jpg_0=columns["jpg_0"][6][:60])  # broken
    append(columns, 7, label_0=0.5, label_1=0.5)  # a tie
    append(columns, 8, caption="word " * 80)
    code, facts, page = look(columns, tmp_path, "--resolution", "64")
    assert code == 0
    assert (facts["num_pairs"], facts["num_ties"], facts["num_repeated"], facts["num_contradictions"]) == (29, 1, 4, 2)
    assert facts["rejected"] == {"jpg_0: truncated": 1}
    assert facts["num_cut_captions"] == 1
    assert facts["users"] == {"number": 3, "fewest": 9, "median": 10.0, "most": 10}
    assert facts["enlarged"] == {"1": 1.0, "1.5": 1.0, "2": 0.0}  # 32 pixels at 64
    assert facts["agreement"]["quality"]["compared"] == 28
    assert facts["num_pictures"] == 48
    told = capsys.readouterr().out
    for text in ("4, 2 of them with the opposite label", "row 27: truncated", "look: 1 of 30 rows are set aside"):
        assert text in told
    assert "are enlarged more than 1.5 times at resolution 64" in page


def test_a_score_that_is_right_three_times_of_four(columns: Columns, tmp_path: Path) -> None:
    seen = look(columns, tmp_path)[1]["agreement"]["quality"]
    assert seen == {"agreeing": 18.0, "compared": 24, "missing": 0}


def test_nothing_stands_out(columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(columns, tmp_path, "--resolution", "32")[1]["warnings"] == []
    assert "nothing stands out" in capsys.readouterr().out


@pytest.mark.reliability("D13")
def test_data_that_would_stop_a_run_is_still_described(columns: Columns, tmp_path: Path) -> None:
    for row in range(12):
        append(columns, row, caption="")
    code, facts, _ = look(columns, tmp_path)
    assert code == 3
    assert facts["num_pairs"] == 24
    assert facts["rejected"] == {"caption: empty": 12}
    assert "12 of 36 rows" in facts["stops"][0]


class Tags(HTMLParser):
    """Names of the elements of a page, and attributes that run or fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        self.tags.add(tag)
        self.active += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]


@pytest.mark.reliability("D8")
def test_a_page_shows_hostile_text_as_text(columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    columns = {("<script>_0" if n == "quality_0" else "<script>_1" if n == "quality_1" else n): x for n, x in columns.items()}
    columns["caption"][0] = hostile
    columns["user_id"][0] = hostile
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    _, _, page = look(columns, folder)
    tags = Tags()
    tags.feed(page)
    assert not tags.tags & {"script", "img", "iframe", "object"}
    assert not tags.active
    assert "&lt;img src=x" in page
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [{}, {"train_data_dir": "a", "dataset_name": "b"}, {"train_data_dir": "a", "resolution": 0}])
def test_settings_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train_data_dir is|resolution is"):
        InspectConfig(**given)
