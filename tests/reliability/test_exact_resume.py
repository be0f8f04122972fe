"""Two steps in one go, and one step, a stop, a resume and one step more: the same, bit for bit, for everything that can be trained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.methods import METHODS
from diffpref.methods.recipes import RECIPES
from tests.reliability.resumed_runs import Inputs, check

FULL = pytest.mark.reliability_full("R2", "R12")
EACH = pytest.mark.reliability("R2", "R12")
TRAINED = [name for name, recipe in RECIPES.items() if recipe.conditioning is None]
"""Policies that read users or axes need data of their own: tests/training/test_ppd.py resumes them."""

pytestmark = pytest.mark.filterwarnings("ignore:method dro")


@pytest.fixture(scope="module")
def inputs(sd_folder: Path, pair_columns: dict[str, list[Any]], table_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The pairs with scores of every name that a recipe asks for; and again with a caption per picture."""
    rows = range(len(pair_columns["caption"]))
    scores = {f"{n}_{i}": [0.2 + 0.001 * ((7 * row + 5 * i) % 11) for row in rows] for n in ("pickscore", "score") for i in (0, 1)}
    captions = {f"caption_{name}": [f"{text}, {name}" for text in pair_columns["caption"]] for name in ("0", "1", "negative")}
    found = []
    for more in ({}, captions):
        found.append(tmp_path_factory.mktemp("scored") / "train-0.parquet")
        pq.write_table(pa.table(pair_columns | scores | more), found[-1])
        found[-1].with_name("prompts.txt").write_text("".join(f"a red circle, number {i}\n" for i in range(4)))
    return Inputs(sd_folder, *found, table_cache)


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=EACH if name in METHODS else FULL) for name in TRAINED])
def test_lora(recipe: str, inputs: Inputs, tmp_path: Path) -> None:
    check(recipe, "lora", inputs, tmp_path)


@FULL
@pytest.mark.parametrize("recipe", TRAINED)
def test_all_weights(recipe: str, inputs: Inputs, tmp_path: Path) -> None:
    check(recipe, "full", inputs, tmp_path)


@FULL
def test_on_two_processes(inputs: Inputs, tmp_path: Path, tried: Callable[[str, int], None]) -> None:
    """Every recipe with LoRA and with all weights, one after another on the same two processes."""
    script = Path(__file__).with_name("resumed_runs.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    asked = [f"{name},{tune}" for name in TRAINED for tune in ("lora", "full")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *map(str, inputs), str(tmp_path), *asked], env=environment, capture_output=True, text=True, check=False
    )
    exact = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("exact ") and line.endswith(" 2")]
    assert done.returncode == 0, done.stderr[-4000:]
    assert exact == asked
    for _ in exact:
        tried("R2", 0)
