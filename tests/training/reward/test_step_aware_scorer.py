"""Fitting a step-aware preference model on estimates of SD and SDXL: what it leaves, exact resume, two ranks, labels by a scorer."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from diffpref.cli import main
from diffpref.scorers.step_aware import load_step_aware
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_loop import fit
from diffpref.training.step_aware_config import PUBLISHED, StepAwareConfig
from tests.scorers.released import write_released

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "train_step_aware_scorer.py"
Settings = dict[str, Any]
Go = Callable[..., Path]


@pytest.fixture
def train(base: Settings, sdxl_folder: Path, tmp_path: Path) -> Go:
    """train(folder name, own settings, **settings) -> the folder of a finished run of four updates."""

    def run(name: str, own: Settings | None = None, **settings: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        config = RewardModelConfig(**base | {"output_dir": str(tmp_path / name), "max_train_steps": 4} | settings)
        step_aware = {"diffusion_model_name_or_path": str(sdxl_folder), "diffusion_guidance_scale": 2.0} | (own or {})
        return fit(config, StepAwareConfig(**step_aware)).folder

    return run


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer of a checkpoint."""
    parts = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
    return {f"{part.stem}/{name}": x for part in parts if part.stem != "best" for name, x in load_file(part).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_folder_is_a_step_aware_scorer(family: str, train: Go, sd_folder: Path, sdxl_folder: Path) -> None:
    model = sd_folder if family == "sd" else sdxl_folder
    folder = train("run", {"diffusion_model_name_or_path": str(model)}, learning_rate=1e-2)
    scorer, seen = load_step_aware(f"spm={folder}"), torch.rand(2, 3, 20, 26, generator=torch.Generator().manual_seed(0))
    early, late = (scorer(seen, ["a red circle"] * 2, t) for t in (0, 900))
    assert torch.isfinite(early).all()
    assert not torch.equal(early, late)  # it has learned to tell timesteps apart
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if row["step"] == 4 and "eval/accuracy" in row]
    assert {f"eval/accuracy_t{t}" for t in (0, 251, 501, 701, 951)} <= last.keys(), last


def test_a_resumed_run_is_the_uninterrupted_one(train: Go) -> None:
    whole = train("whole", checkpointing_steps=2)
    train("cut", checkpointing_steps=2, max_train_steps=4)
    cut = whole.parent / "cut"
    shutil.rmtree(cut / "checkpoint-4")
    again = train("cut", checkpointing_steps=2, resume_from_checkpoint="latest")
    assert_same(weights(again, 4), weights(whole, 4))


@pytest.mark.slow  # the default tier has the same for the reward model, whose loop it is
def test_two_ranks_are_one_rank_with_twice_the_accumulation(base: Settings, train: Go, sdxl_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"diffusion_model_name_or_path": str(sdxl_folder), "diffusion_guidance_scale": 2.0, "max_train_steps": 2}
    (tmp_path / "settings.yaml").write_text(json.dumps(base | own))  # JSON is YAML
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: x for name, x in os.environ.items() if name not in launcher and not name.startswith("ACCELERATE_")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), str(SCRIPT))
    command = [sys.executable, *words, "--config", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    published = {name: x for name, x in PUBLISHED.items() if name not in base}  # what the command adds
    one = train("one", **published, gradient_accumulation_steps=2, max_train_steps=2)
    assert_same(weights(tmp_path / "two", 2), weights(one, 2))


def test_labels_of_a_scorer_replace_the_own(train: Go, tmp_path: Path) -> None:
    scorer = f"pickscore={write_released('pickscore', tmp_path / 'pickscore')}"
    theirs = train("theirs", {"relabel_scorer": scorer, "relabel_gap": 0.0}, max_train_steps=1, tie_policy="keep")
    own = train("own", max_train_steps=1, tie_policy="keep")
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (theirs, own)]
    assert first[0]["loss"] != first[1]["loss"]


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str], base: Settings) -> None:
    assert main(["train-step-aware-scorer", "--train_data_dir", base["train_data_dir"]]) == 2
    assert "diffusion_model_name_or_path is missing" in capsys.readouterr().err
