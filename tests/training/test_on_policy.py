"""Runs that sample their own pairs: exact resume within a rollout, two processes like one, and settings that cannot be."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import build_objective
from diffpref.training.run import Run, prepare_run
from diffpref.training.run_data import load_step_scorer
from diffpref.training.run_log import RunLog
from diffpref.training.settings import names_of
from diffpref.training.stopping import Stopped

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "num_steps": 4,
    "first_branch": 1,
    "num_candidates": 2,
    "threshold": 0.0,
    "prompts_per_rollout": 4,
    "guidance_scale": 2.0,
    "max_train_steps": 5,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "rank": 2,
    "resolution": 32,
}
Settings = dict[str, Any]
Go = Callable[..., Path]


def brightness(pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
    """The mean pixel."""
    return 50 * pixels.mean((1, 2, 3))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"a red circle, number {i}\n" for i in range(6)))
    return path


@pytest.fixture
def prepare(prompt_file: Path, sdxl_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """prepare(folder name, **settings) -> a run on SDXL that is ready to train."""
    opened: list[Run] = []

    def make(name: str, **changes: Any) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        model = {"pretrained_model_name_or_path": str(sdxl_folder), "prompt_set": str(prompt_file)}
        settings: Settings = {**SMALL, **model, "output_dir": str(tmp_path / name), "method": "spo", **changes}
        objective = build_objective(settings["method"], settings)
        config = TrainConfig(**{key: value for key, value in settings.items() if key in names_of(TrainConfig)})
        opened.append(prepare_run(config, objective, (), brightness if "step_scorer" not in settings else None))
        return opened[-1]

    yield make
    for run in opened:
        run.log.close()


@pytest.fixture
def go(prepare: Callable[..., Run]) -> Go:
    """go(folder name, **settings) -> the folder of a run that is trained to its end."""

    def make(name: str, **changes: Any) -> Path:
        run = prepare(name, **changes)
        try:
            train(run)
        finally:
            run.log.close()
        return run.folder

    return make


def lines_of(folder: Path) -> list[Settings]:
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.startswith("time/")} for line in lines]


def state_of(folder: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    parts = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
    assert [part.stem for part in parts] == ["optimizer", "rollout", "weights"]
    return {f"{part.stem}/{name}": x for part in parts for name, x in load_file(part).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_a_run_stopped_within_a_rollout_resumes_bit_for_bit(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go("whole", max_train_steps=8)
    lines = lines_of(whole)
    rollouts = [line for line in lines if "rollout/number" in line]
    assert [(line["step"], line["rollout/pairs"]) for line in rollouts] == [(1, 12.0), (7, 12.0)]  # 4 prompts x 3 transitions
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["error/policy_chosen"] == first["error/reference_chosen"]
    write = RunLog.write

    def and_signal(self: RunLog, at: int, values: dict[str, float]) -> None:
        write(self, at, values)
        if at == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", and_signal)
        with pytest.raises(Stopped, match="after step 4"):
            go("parts", max_train_steps=8)
    parts = whole.with_name("parts")
    assert json.loads((parts / "checkpoint-4" / "trainer_state.json").read_text())["rollout"]["position"] == 8
    go("parts", max_train_steps=8, resume_from_checkpoint="latest")
    assert_same(state_of(parts, 8), state_of(whole, 8))
    assert lines_of(parts) == lines


@pytest.mark.parametrize("method", ["tailor_po", "dense_reward", "spo_sdxl"])
def test_other_methods_on_the_same_source(method: str, go: Go) -> None:
    own = {
        "dense_reward": {"first_branch": 0, "num_inner_step": 3, "sampled_steps": 2},
        "spo_sdxl": {"num_steps": 5, "num_inner_step": 3},
    }
    folder = go("run", method=method, max_train_steps=2, **own.get(method, {}))
    losses = [line["loss"] for line in lines_of(folder) if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert manifest["data"]["prompts"] == 6
    assert "StepwiseSampling" in manifest["objective"]


def test_policy_and_scorer_see_what_they_should(prepare: Callable[..., Run]) -> None:
    run = prepare("run")
    batch = next(run.source)
    assert batch.cond.time_ids is not None
    assert batch.cond.time_ids[0, 0].tolist() == [32, 32, 0, 0, 32, 32]
    assert batch.latents.shape == (2, 2, 4, 8, 8)
    (step,) = batch.steps
    assert (step.x_t.shape, step.guidance_scale) == (batch.latents.shape, 2.0)


def test_two_processes_sample_and_train_like_one(prompt_file: Path, sd_folder: Path, tmp_path: Path) -> None:
    from tests.scorers.released import write_released

    judge = write_released("pickscore", tmp_path / "pickscore")
    settings = SMALL | {"pretrained_model_name_or_path": str(sd_folder), "prompt_set": str(prompt_file), "max_train_steps": 3}
    settings |= {"step_scorer": f"pickscore={judge}", "checkpointing_steps": 1}

    def start(name: str, launcher: Sequence[str], **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes, "output_dir": str(tmp_path / name)}))
        command = [sys.executable, *launcher, str(ROOT / "scripts" / "train_spo.py"), "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = start("two", ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)))
    one = start("one", (), gradient_accumulation_steps=2)
    assert json.loads((two / "run_manifest.json").read_text())["num_processes"] == 2
    a, b = (load_file(folder / "checkpoint-1" / "rollout.safetensors") for folder in (two, one))
    assert torch.equal(a["prompt"], b["prompt"])
    assert len(a["prompt"]) == 12
    torch.testing.assert_close(a["path"], b["path"], rtol=1e-4, atol=1e-4)
    a, b = (load_file(folder / "checkpoint-1" / "optimizer.safetensors") for folder in (two, one))
    moment = next(name for name in a if name.endswith("lora_A.default.weight/exp_avg") or name.endswith("/exp_avg"))
    torch.testing.assert_close(a[moment], b[moment], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "pairs"}, "train_data_dir is pairs, but method spo samples its own pairs: give prompts with prompt_set"),
        ({"label_noise_prob": 0.5}, "its control is shuffle_scores"),
        ({"num_train_epochs": 2}, "use max_train_steps"),
        ({"cache_latents": True}, "cache_latents is True"),
        ({"prompt_set": None}, "prompt_set is missing"),
        ({"prompt_set": "nowhere.txt"}, "prompt_set 'nowhere.txt' is no file"),
        ({"step_scorer": "picscore"}, "step_scorer 'picscore' is unknown"),
        ({"step_scorer": None}, "step_scorer is missing"),
    ],
)
def test_settings_that_cannot_be(changes: Settings, message: str, prepare: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match=message):
        prepare("run", **changes)


def test_an_empty_prompt_file_and_a_scorer_of_another_width(prepare: Callable[..., Run], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.scorers.released import write_released

    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"prompt_set 'empty\.txt' has no prompt"):
        prepare("run", prompt_set=str(tmp_path / "empty.txt"))
    judge = write_released("pickscore", tmp_path / "pickscore")
    (weights,) = judge.glob("*.safetensors")
    state = load_file(weights)
    state["visual_projection.weight"] = state["visual_projection.weight"][:, :-1].contiguous()
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"step_scorer 'pickscore=.*of another shape, as visual_projection\.weight"):
        load_step_scorer(f"pickscore={judge}", torch.device("cpu"))


def test_paths_and_sources_belong_together() -> None:
    with pytest.raises(ValueError, match="samples its own pairs and needs path recorded"):
        build_objective("spo", {}, "forward")
    with pytest.raises(ValueError, match="reads stored pairs"):
        build_objective("diffusion_dpo", {}, "recorded")
