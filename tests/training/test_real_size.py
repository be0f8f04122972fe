"""SD1.5 and SDXL at their real size: one update, saved, reloaded, compared. Minutes each; no download and no GPU needed.

pytest -m slow tests/training/test_real_size.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffpref.methods import METHODS
from diffpref.methods.recipes import RECIPES

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "real_size.py"
SECONDS = 3600
Measure = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the random models, written once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def measure(models: Path, tmp_path: Path) -> Measure:
    """measure(family, dtype, gigabytes, *flags) -> what the benchmark found; skipped where there is less memory than that."""

    def go(family: str, dtype: str, gigabytes: float, *flags: str) -> dict[str, Any]:
        if psutil.virtual_memory().available < gigabytes * 1e9:
            pytest.skip(f"needs {gigabytes} GB of memory")
        words = ("--family", family, "--dtype", dtype, "--model", str(models / f"{family}-{dtype}"), "--folder", str(tmp_path / "run"))
        command = [sys.executable, str(SCRIPT), *words, "--steps", "1", *flags]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert all(found["checks"].values())
        return found

    return go


OF_STORED_PICTURES = [name for name, recipe in RECIPES.items() if recipe.source is None and recipe.conditioning is None]


@pytest.mark.parametrize("method", OF_STORED_PICTURES)
def test_every_method_trains_sd15(method: str, measure: Measure) -> None:
    found = measure("sd15", "bf16", 5, "--method", method, "--resolution", "64")
    assert found["trained_parameters"] == 3_188_736
    assert found["files"]["tensors"] == 256
    assert ("the policy starts as its reference" in found["checks"]) == METHODS[RECIPES[method].method].needs_reference


@pytest.mark.parametrize("method", ["diffusion_dpo", "mapo", "inversion_dpo"])
def test_sdxl_trains_an_adapter(method: str, measure: Measure) -> None:
    found = measure("sdxl", "bf16", 12, "--method", method, "--resolution", "256")
    if method == "diffusion_dpo":
        assert found["loss"] == pytest.approx(0.693147, abs=1e-6)
        assert found["margin"] == 0
    assert found["trained_parameters"] == 23_224_320
    assert found["files"]["tensors"] == 1120
    assert found["peak_gb"] < 1.15 * (found["estimated_gb"] + 0.7)  # 0.7 GB for Python and its libraries


@pytest.mark.parametrize(("method", "gigabytes"), [("mapo", 12), ("diffusion_dpo", 16)])
def test_sd15_trains_all_weights(method: str, gigabytes: float, measure: Measure) -> None:
    """In float32 with Adafactor, without and with a frozen copy; AdamW's state would take 5 GB more."""
    found = measure("sd15", "fp32", gigabytes, "--method", method, "--tune", "full", "--optimizer", "adafactor", "--resolution", "64")
    assert found["trained_parameters"] == 859_520_964
    assert found["files"]["tensors"] == 686
    assert found["peak_gb"] < 1.15 * (found["estimated_gb"] + 0.7)
