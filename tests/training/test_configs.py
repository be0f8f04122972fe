"""Every file under configs/ is a run: its settings are accepted, its command exists, and its header says what will be used."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref import cli
from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.rewards import policy_error
from diffpref.core.types import Conditioning, LossOutput, Predict, PreferenceBatch
from diffpref.methods.recipes import RECIPES
from diffpref.testbed.recipe import read_recipe
from diffpref.training.config import TrainConfig
from diffpref.training.loop import learn
from diffpref.training.objective import build_objective
from diffpref.training.settings import build, names_of

ROOT = Path(__file__).resolve().parents[2]
REAL = sorted(path for family in ("sd15", "sdxl") for path in (ROOT / "configs" / family).glob("*.yaml"))
TESTBED = sorted((ROOT / "configs" / "testbed").glob("*.yaml"))
NO_RUNS = ("reward_model", "leaderboard", "step_aware_scorer")
STATED = re.compile(r"(\d+) UNet evaluations per (pair|picture|list of four), (\d+) of them with a gradient")
COUNTED = [path for path in (*REAL, *TESTBED) if "UNet evaluations" in path.read_text()]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2

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
    assert len(names) == 33
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


class EveryTimestep(PairRandom):
    """Keyed draws, but for timesteps, which are 0, 1, 2, ..."""

    def integers(self, purpose: str, high: int) -> Tensor:
        return torch.arange(len(self.pair_ids)) % high


class Batch(PreferenceBatch):
    """Groups at every timestep."""

    def random(self, seed: int) -> PairRandom:
        return EveryTimestep(seed, self.pair_ids, self.visits)


def evaluations(config: TrainConfig, objective: Any, slots: int) -> tuple[float, float]:
    """(all, with a gradient): pictures that go through the networks for a group when the loop learns, counted on latents of one number."""
    counts, weight = {True: 0, False: 0}, torch.ones(1, requires_grad=True)

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        counts[torch.is_grad_enabled()] += timesteps.numel()
        return weight * x_t

    reference: Predict = torch.no_grad()(predict)
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=nullcontext, backward=Tensor.backward, no_sync=lambda _: nullcontext()),
        objective=SimpleNamespace(
            images_per_group=objective.images_per_group,
            path=objective.path,
            steps_at_once=objective.steps_at_once,
            loss=lambda batch, evals: LossOutput(policy_error(evals).sum(1), {}),
        ),
        state=SimpleNamespace(reliability=None),
        config=SimpleNamespace(seed=0, gradient_accumulation_steps=1),
        process=DdpmProcess.from_betas(BETAS),
        policy=predict,
        reference=reference if objective.needs_reference else None,
        null=Conditioning(torch.zeros(1, 1, 1, 1)),
        wrapped=None,
    )
    drawn = getattr(objective.path, "sampled_steps", None)  # a micro-batch goes as far as the last node that one of it has drawn
    size, rounds = (config.train_batch_size, 1 + 100 // config.train_batch_size) if drawn else (1000, 1)
    for number in range(rounds):
        ids = tuple(f"{number}/{group}" for group in range(size))
        batch = Batch(
            torch.ones(size, slots, 1, 1, 1), Conditioning(torch.zeros(size, slots, 1, 1)), torch.ones(size, slots), ids, (0,) * size
        )
        learn(run, batch)
    return sum(counts.values()) / (size * rounds), counts[True] / (size * rounds)


@pytest.mark.parametrize("path", COUNTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_header_counts_evaluations_as_the_loop_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path in REAL:
        config, objective = read(path, monkeypatch)
    else:
        settings = read_recipe(path.stem)
        objective = build_objective(settings["method"], settings)
        config = build(TrainConfig, {n: x for n, x in settings.items() if n in names_of(TrainConfig)})
    found = STATED.search(path.read_text())
    assert found is not None
    assert found[2] == {"images": "picture", "lists": "list of four"}.get(objective.groups, "pair")
    slots = {"images": 1, "lists": 4}.get(objective.groups, 2)
    if objective.groups == "lists":
        assert config.list_size == slots
    every, trained = evaluations(config, objective, slots)
    assert int(found[1]) == pytest.approx(every, rel=0.03, abs=0.5)
    assert int(found[3]) == trained


def test_the_expensive_runs_state_their_evaluations() -> None:
    names = [path for path in REAL if path.stem.split("_lora")[0] in ("inpo", "smpo", "inversion_dpo")]
    assert len(names) == 10
    assert all(STATED.search(path.read_text()) for path in names)


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
