"""Recipes of the literature as method, path and guards; every one of them takes a step that changes the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffpref import cli
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.recipes import RECIPES
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import Objective, as_objective, build_objective, objective_names
from diffpref.training.run import prepare_run

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
        (("pdo",), "method is 'pdo'; accepted: dense_reward, diffusion_dpo"),
        (("mapo", {}, "sideways"), "path is 'sideways'; accepted: forward, inversion, recorded, trajectory"),
        (("mapo", {}, None, ["helmet"]), "guards has 'helmet'; accepted: sdpo"),
    ],
)
def test_unknown_names_are_named(ask: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_objective(ask[0], *(ask[1:] or ({},)))


FROM_FILES = [
    name
    for name, line in RECIPES.items()
    if line.settings.get("score", "") == "" and name != "odpo" and line.conditioning is None and line.source is None
]
"""Those that need neither scores nor users; the others have tests of their own, as those that sample have (test_on_policy.py)."""


@pytest.mark.parametrize("recipe", FROM_FILES)
def test_every_recipe_takes_a_step(recipe: str, base_settings: Settings, tmp_path: Path) -> None:
    names = objective_names(recipe)
    objective = build_objective(recipe, {name: value for name, value in SMALL.items() if name in names})
    settings = base_settings | {"max_train_steps": 2, "output_dir": str(tmp_path / "run")}
    if RECIPES[recipe].groups in ("captioned", "captions"):
        settings |= {"caption_edits": ("red green", "circle square"), "proportion_empty_prompts": 0.0}
    folder = align(TrainConfig(**settings), objective).folder
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


def scored(pairs_file: Path, folder: Path) -> Path:
    """The pairs with columns of two scorers: one that varies, one that does not."""
    table = pq.read_table(pairs_file)
    for name, values in (("pickscore", range(2 * len(table))), ("flat", [1.0] * 2 * len(table))):
        for image in (0, 1):
            column = pa.array([float(values[2 * row + image]) for row in range(len(table))])
            table = table.append_column(f"{name}_{image}", column)
    path = folder / "scored.parquet"
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("cache_latents", [False, True])
@pytest.mark.parametrize("recipe", ["smpo", "odpo"])
def test_scores_of_the_data_reach_the_method(
    recipe: str, cache_latents: bool, base_settings: Settings, pairs_file: Path, tmp_path: Path
) -> None:
    settings = base_settings | {
        "train_data_dir": str(scored(pairs_file, tmp_path)),
        "max_train_steps": 1,
        "output_dir": str(tmp_path / "run"),
        "cache_latents": cache_latents,
    }
    names = objective_names(recipe)
    objective = build_objective(recipe, {"score": "pickscore"} | ({"num_steps": 2} if "num_steps" in names else {}))
    align(TrainConfig(**settings), objective)
    stored = yaml.safe_load((tmp_path / "run" / "diffpref_config.yaml").read_text())
    if recipe == "smpo":
        assert (stored["score_min"], stored["score_max"]) == (0.0, 47.0)
    align(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}), objective)  # the fitted range is no other setting


def test_the_range_stored_with_the_data_is_that_of_the_method(base_settings: Settings, pairs_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    scored(pairs_file, folder).rename(folder / "train-00000.parquet")
    settings = base_settings | {"train_data_dir": str(folder), "max_train_steps": 1, "max_train_samples": 8}
    objective = build_objective("smpo", {"score": "pickscore", "num_steps": 2})

    def fitted_range(name: str) -> tuple[float, float]:
        align(TrainConfig(**settings | {"output_dir": str(tmp_path / name)}), objective)
        found = yaml.safe_load((tmp_path / name / "diffpref_config.yaml").read_text())
        return found["score_min"], found["score_max"]

    assert fitted_range("rows") == (0.0, 15.0)  # of the rows that are trained on
    (folder / "label_report.json").write_text(json.dumps({"score_range": {"pickscore": [-1.0, 60.0]}}))
    assert fitted_range("stored") == (-1.0, 60.0)
    (folder / "label_report.json").write_text(json.dumps({"score_range": {"pickscore": [0.0, 9.0]}}))
    with pytest.raises(ValueError, match=r"go from 0\.0 to 15\.0, but label_report\.json says 0\.0 to 9\.0; score the pairs again"):
        fitted_range("outside")
    (folder / "label_report.json").write_text("{")
    with pytest.raises(ValueError, match=r"label_report\.json is damaged"):
        fitted_range("damaged")


def test_a_constant_score_is_refused(base_settings: Settings, pairs_file: Path, tmp_path: Path) -> None:
    settings = base_settings | {"train_data_dir": str(scored(pairs_file, tmp_path)), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"'flat' are 1\.0 for every image"):
        align(TrainConfig(**settings), build_objective("smpo", {"score": "flat"}))


def test_without_a_reference_none_is_built_or_asked(base_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("MaPO has no reference")

    for name in ("adapter_off", "frozen", "stored"):
        monkeypatch.setattr(f"diffpref.training.run.{name}", refuse)
    monkeypatch.setattr("diffpref.training.models.copy", SimpleNamespace(deepcopy=refuse))
    asked: list[bool] = []
    for tune in ("lora", "full"):
        settings = base_settings | {"max_train_steps": 1, "tune": tune, "output_dir": str(tmp_path / tune), "method": "mapo"}
        run = prepare_run(TrainConfig(**settings), build_objective("mapo", {}))
        assert run.reference is None
        policy = run.policy

        def watched(x_t: torch.Tensor, t: torch.Tensor, cond: Any, policy: Any = policy) -> torch.Tensor:
            asked.append(torch.is_grad_enabled())
            return policy(x_t, t, cond)  # type: ignore[no-any-return]

        run.policy = watched
        train(run)
        run.log.close()
    assert asked == [True, True]  # one forward pass per update, none without a graph
