"""Scripts that take turns: what is measured is what they do, and a script that ends early is said with its last words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_cpu import TARGETS, table
from contest import Contestant, contest, ratios

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = """
import sys, time, torch
p = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([p], lr=0.1)
while True:
    end = time.process_time() + float(sys.argv[1])
    while time.process_time() < end:
        pass
    optimizer.step()
"""


def test_twice_the_work_is_half_the_speed(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(SCRIPT)
    entrants = {name: Contestant(tmp_path / "work.py", [seconds], items=2) for name, seconds in (("a", "0.01"), ("b", "0.02"))}
    found = contest(entrants, tmp_path / "logs", rounds=2, steps=4, warm_up=1)
    assert found["a"]["seconds_per_item"] == pytest.approx(0.005, rel=0.3)
    assert len(found["a"]["rounds"]) == 2
    compared = ratios(found, slower="b", faster="a")
    assert compared["least"] <= compared["ratio"] <= compared["largest"]
    assert compared["ratio"] == pytest.approx(2, rel=0.3)


def test_an_early_end_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        contest({"broken": Contestant(tmp_path / "broken.py", [])}, tmp_path / "logs")


def test_a_process_that_says_nothing_is_ended(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("print('reading', flush=True); import time; time.sleep(100)")
    with pytest.raises(RuntimeError, match=r"(?s)silent has said nothing for 4 s:.*reading"):
        contest({"silent": Contestant(tmp_path / "silent.py", [])}, tmp_path / "logs", patience=4)


def test_the_table_of_the_page_is_the_results() -> None:
    stored = json.loads((BENCHMARKS / "results" / "cpu.json").read_text())
    measured = {name for part in stored.values() for name in part["ratios"]}
    assert measured >= {"cached / diffusers", "uncached / diffusers"}
    assert table(stored) in (ROOT / "docs" / "speed.md").read_text()
    assert {name for name in measured if TARGETS.get(name)} <= set(TARGETS)
