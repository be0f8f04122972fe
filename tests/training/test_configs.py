"""Every file under configs/ is a run: its settings are accepted, its command exists, and its header says what will be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffpref import cli
from diffpref.methods.recipes import RECIPES
from diffpref.testbed.recipe import read_recipe
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective
from diffpref.training.settings import build, names_of

ROOT = Path(__file__).resolve().parents[2]
REAL = sorted(path for family in ("sd15", "sdxl") for path in (ROOT / "configs" / family).glob("*.yaml"))
TESTBED = sorted((ROOT / "configs" / "testbed").glob("*.yaml"))
NO_RUNS = ("reward_model", "leaderboard", "step_aware_scorer")

pytestmark = pytest.mark.filterwarnings("ignore:method dro")


def read(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainConfig, Any]:
    """The run that a file of a real model asks for."""
    monkeypatch.setattr(cli, "_model_family", lambda settings: path.parent.name)
    found = cli._train_settings(["--config", str(path), "--train_data_dir", "DATA"])
    assert found is not None
    settings, objective, _ = found
    return build(TrainConfig, {n: x for n, x in settings.items() if n in names_of(TrainConfig)}), objective


def test_there_are_files_for_every_kind() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in REAL}
    assert len(names) == 31
    for method in ("diffusion_dpo", "inpo", "smpo", "diffusion_kto"):
        assert {f"sd15/{method}", f"sd15/{method}_lora", f"sdxl/{method}_lora"} <= names
    for method in ("mapo", "inversion_dpo", "rank_dpo", "diffusion_sdpo"):
        assert {f"sdxl/{method}", f"sdxl/{method}_lora"} <= names
    runs = {path.stem.removesuffix("_full") for path in TESTBED}
    assert {name for name, line in RECIPES.items() if line.conditioning is None} - {"smpo_pickscore", "spo_sdxl"} <= runs


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_real_run_loads_and_its_header_tells_the_truth(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, objective = read(path, monkeypatch)
    text = path.read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    if objective.conditioning is None:  # else a branch of its own is trained
        assert (config.tune == "lora") == path.stem.endswith("_lora") == ("LoRA.\n" in head)
    found = re.search(
        r"^# (\d+) process(?:es)?: (\d+) (pairs|pictures|lists) per update, effective learning rate (\S+)\.$", head, re.MULTILINE
    )
    assert found is not None
    processes, per_update = int(found[1]), int(found[2])
    assert per_update == processes * config.train_batch_size * config.gradient_accumulation_steps
    assert not config.scale_lr
    assert float(found[4]) == pytest.approx(config.learning_rate, rel=1e-3)
    assert found[3] == {"images": "pictures", "lists": "lists"}.get(objective.groups, "pairs")
    assert re.search(r"^# Cost: .+\.$", head, re.MULTILINE)
    assert config.resolution == (512 if path.parent.name == "sd15" else 1024)
    command = re.search(r"scripts/(\w+\.py)", head)
    assert command is not None
    script = (ROOT / "scripts" / command[1]).read_text()
    assert f'"--method", "{config.method}"' in script or command[1] == "train.py"
    assert f"--config configs/{path.parent.name}/{path.name}" in head
    assert (f"--num_processes {processes} " in head) == (processes > 1)


@pytest.mark.parametrize("path", [path for path in TESTBED if path.stem not in NO_RUNS], ids=lambda path: path.stem)
def test_a_run_on_the_testbed_loads(path: Path) -> None:
    settings = read_recipe(path.stem)
    assert path.stem.removesuffix("_full") == settings["method"]
    build_objective(settings["method"], settings)
    config = build(TrainConfig, {n: x for n, x in settings.items() if n in names_of(TrainConfig)})
    assert (config.tune == "full") == path.stem.endswith("_full")


def test_every_script_of_a_method_names_a_recipe() -> None:
    found = {path.name: re.search(r'"--method", "(\w+)"', path.read_text()) for path in (ROOT / "scripts").glob("train_*.py")}
    methods = {name: match[1] for name, match in found.items() if match}
    assert set(methods.values()) <= set(RECIPES)
    assert {"mapo", "inpo", "smpo", "inversion_dpo", "diffusion_kto", "rank_dpo", "diffusion_dpo"} <= set(methods.values())
