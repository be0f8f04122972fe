"""Scripts that take turns: what is measured is what they do, and a script that ends early is said with its last words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_pack
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


def test_every_recipe_is_in_the_pack_or_has_a_reason() -> None:
    from diffpref.methods.recipes import RECIPES

    tried = {what for kind, what in gpu_pack.parts().values() if kind == "overfit"}
    assert tried | set(gpu_pack.NOT_ON_PAIRS) == set(RECIPES)
    assert not tried & set(gpu_pack.NOT_ON_PAIRS)
    first, *_, last = gpu_pack.parts()
    assert first.startswith("numerics")
    assert last.startswith("timing")


def test_targets_stand_beside_what_was_measured() -> None:
    own = {"seconds_per_item": 0.1, "rounds": [0.1], "peak_bytes": 40e9}
    peer = {"seconds_per_item": 0.25, "rounds": [0.25], "peak_bytes": 50e9}
    stored: dict[str, Any] = {
        "SDXL 1024, DPO, LoRA": {"ours": own},
        "SDXL 1024, DPO, LoRA, diffusers at its defaults": {"peer": peer},
        "SDXL 1024, DPO, all weights": {"failed": "out of memory"},
    }
    lines = bench_gpu.verdicts(stored)
    assert "10.00 pairs/s (target 9), 40.0 GB" in lines[0]
    assert "2.50 times diffusers (target 2.2), 0.80 of its memory" in lines[1]
    assert any("out of memory" in line for line in lines)


def test_the_table_of_the_page_is_the_results() -> None:
    stored = json.loads((BENCHMARKS / "results" / "cpu.json").read_text())
    measured = {name for part in stored.values() for name in part["ratios"]}
    assert measured >= {"cached / diffusers", "uncached / diffusers"}
    assert table(stored) in (ROOT / "docs" / "speed.md").read_text()
    assert {name for name in measured if TARGETS.get(name)} <= set(TARGETS)


@pytest.mark.slow
def test_the_pack_works_from_end_to_end(tmp_path: Path) -> None:
    words = [
        sys.executable,
        str(BENCHMARKS / "gpu_pack.py"),
        "--tiny",
        "--folder",
        str(tmp_path),
        "--results",
        str(tmp_path / "found.json"),
    ]
    first = subprocess.run([*words, "--minutes", "0.01"], capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr  # it stopped in time, with something kept
    before = json.loads((tmp_path / "found.json").read_text())
    done = subprocess.run([*words, "--minutes", "60"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    kept = next(name for name in before if name != "machine")
    assert found[kept] == before[kept]
    assert {name: part["failed"] for name, part in found.items() if "failed" in part} == {}
    assert all(part["passed"] for name, part in found.items() if name.startswith("numerics"))
    assert all(len(part["losses"]) == 2 for name, part in found.items() if name.startswith("overfit"))
