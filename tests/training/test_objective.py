"""Recipes of the literature as method, path and guards; every one of them takes a step that changes the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpref import cli
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.recipes import RECIPES
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import Objective, as_objective, build_objective, objective_names

Settings = dict[str, Any]
SMALL = {"num_steps": 2, "score": None}
"""Shorter paths, and no scorer's columns."""


def test_a_recipe_is_put_together_and_settings_win() -> None:
    inpo = build_objective("inpo", {"num_steps": "4", "learning_rate": "1"})
    assert (type(inpo.method).__name__, type(inpo.path).__name__) == ("DiffusionDPO", "DdimInversion")
    assert (inpo.method.beta, inpo.path.num_steps) == (2000.0, 4)
    assert inpo.name == "inpo"
    guarded = build_objective("diffusion_dpo", {"mu": 0.5, "anchor_weight": 2.0}, None, ["sdpo", "winner_anchor"])
    assert [type(g).__name__ for g in guarded.guards] == ["SDPO", "WinnerAnchor"]
    assert guarded.guards[0].mu == 0.5
    inverted = build_objective("mapo", {}, "inversion")
    assert type(inverted.path).__name__ == "DdimInversion"
    assert not inverted.needs_reference
    assert "mu" in objective_names("diffusion_sdpo")
    assert "mu" not in objective_names("diffusion_dpo")


def test_names() -> None:
    assert as_objective(DiffusionDPO()).name == "diffusion_dpo"
    assert as_objective(Objective(DiffusionDPO(), recipe="dcpo")).name == "dcpo"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (("pdo",), "method is 'pdo'; accepted: diffusion_dpo"),
        (("mapo", {}, "sideways"), "path is 'sideways'; accepted: forward, inversion, trajectory"),
        (("mapo", {}, None, ["helmet"]), "guards has 'helmet'; accepted: sdpo"),
    ],
)
def test_unknown_names_are_named(ask: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_objective(ask[0], *(ask[1:] or ({},)))


@pytest.mark.parametrize(
    "recipe", [name for name, line in RECIPES.items() if line.settings.get("score", "") == "" and name not in ("odpo",)]
)
def test_every_recipe_takes_a_step(recipe: str, base_settings: Settings, tmp_path: Path) -> None:
    names = objective_names(recipe)
    objective = build_objective(recipe, {name: value for name, value in SMALL.items() if name in names})
    settings = base_settings | {"max_train_steps": 2, "output_dir": str(tmp_path / "run")}
    folder = align(TrainConfig(**settings), objective).folder
    from safetensors.torch import load_file

    weights = load_file(folder / "checkpoint-2" / "weights.safetensors")
    moved = [name for name, x in weights.items() if "lora_B" in name and float(x.abs().max()) > 0]
    assert moved, "no adapter left its start"
    assert all(torch.isfinite(x).all() for x in weights.values())


def test_scores_that_are_missing_are_named(base_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in base_settings.items()]
    assert cli.main(["train", *words, "--method", "smpo", "--output_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "score is 'pickscore', but the data has" in line
    assert "diffpref label --scorers pickscore" in line
    assert not (tmp_path / "run").exists()


def test_a_trajectory_resumes_bit_for_bit(
    base_settings: Settings, tmp_path: Path, read_state: Callable[[Path, int], dict[str, torch.Tensor]]
) -> None:
    def run(name: str, steps: int, **more: Any) -> Path:
        objective = build_objective("inversion_dpo", {"num_steps": 2})
        settings = base_settings | {"output_dir": str(tmp_path / name), "max_train_steps": steps, **more}
        return align(TrainConfig(**settings), objective).folder

    whole = read_state(run("whole", 4), 4)
    run("parts", 2)
    parts = read_state(run("parts", 4, resume_from_checkpoint="latest"), 4)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
