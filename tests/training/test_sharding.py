"""Weights split over two processes: the gradients of the joined batch, and checkpoints that any number of processes goes on from."""

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
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.inversion_dpo import InversionDPO
from diffpref.paths.inversion import DdimInversion
from diffpref.paths.trajectory import InversionTrajectory
from diffpref.training.config import TrainConfig
from diffpref.training.loop import learn
from diffpref.training.objective import Objective
from diffpref.training.run import Run
from diffpref.training.sharding import asked_by_launcher, check_sharding

WORKER = Path(__file__).with_name("two_ranks.py")
ROOT = WORKER.parents[2]
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that the two processes do: one launch for all tests of this file."""
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture
def ranks(shared: Path, base_settings: Settings) -> Path:
    """Folder of what two processes have written; they run once."""
    if not (shared / "settings.json").exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (shared / "settings.json").write_text(json.dumps(base_settings))
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        env = {name: x for name, x in os.environ.items() if name not in launcher and not name.startswith(("ACCELERATE_", "FSDP_"))}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        run = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
        words = [sys.executable, *run, str(WORKER), str(shared / "settings.json"), str(shared)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-8000:-2000]
    return shared


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of b."""
    assert a.keys() == b.keys()
    apart, size = (torch.sqrt(sum((x.double() ** 2).sum() for x in xs)) for xs in ([a[n] - b[n] for n in b], b.values()))
    return float(apart / size)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_gradients_are_those_of_the_joined_batch(tune: str, ranks: Path, prepare: Callable[..., Run]) -> None:
    run = prepare("joined", tune=tune, train_batch_size=4)
    learn(run, next(run.source))
    joined = {name: p.grad for name, p in run.trainable.items() if p.grad is not None}
    path = ranks / f"{tune}-gradients" / "gradients.safetensors"
    assert relative(load_file(path), joined) < 1e-5
    with safe_open(path, "pt") as file:
        shares = {name: float(value) for name, value in file.metadata().items()}
    assert shares == pytest.approx({"share": 0.5} | ({"frozen_share": 0.5} if tune == "full" else {}), abs=0.1)


def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(
    ranks: Path, run_training: Callable[..., Path], read_state: Callable[[Path, int], dict[str, Tensor]], tmp_path: Path
) -> None:
    two, settings = ranks / "full-run", {"tune": "full", "max_train_steps": 3, "gradient_accumulation_steps": 2}
    assert json.loads((two / "run_manifest.json").read_text())["num_processes"] == 2
    plain = read_state(run_training("plain", **settings), 3)
    shutil.copytree(two, tmp_path / "one", ignore=shutil.ignore_patterns("checkpoint-3"))
    one = read_state(run_training("one", resume_from_checkpoint="latest", **settings), 3)
    for other in (read_state(two, 3), one):
        assert relative(other, plain) < 1e-5


def test_sharded_adapters_end_where_others_do(
    ranks: Path, run_training: Callable[..., Path], read_state: Callable[[Path, int], dict[str, Tensor]]
) -> None:
    plain = read_state(run_training("plain", max_train_steps=3, gradient_accumulation_steps=2), 3)
    assert relative(read_state(ranks / "lora-run", 3), plain) < 1e-5
    assert (ranks / "lora-run" / "pytorch_lora_weights.safetensors").is_file()


def test_the_result_is_whole(ranks: Path, read_state: Callable[[Path, int], dict[str, Tensor]]) -> None:
    unet = UNet2DConditionModel.from_pretrained(ranks / "full-run", subfolder="unet").state_dict()
    stored = read_state(ranks / "full-run", 3)
    assert all(torch.equal(x, stored[f"weights/{name}"]) for name, x in unet.items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_ema": True}, "use_ema is True"),
        ({"validation_steps": 5}, "validation_steps is 5"),
        ({"optimizer": "adafactor"}, "optimizer is adafactor"),
        ({"base_dtype": "bf16", "mixed_precision": "bf16"}, "base_dtype is bf16"),
    ],
)
def test_what_needs_whole_weights_is_refused(change: Settings, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_sharding(TrainConfig(shard="weights", **change), Objective(DiffusionDPO()))


def test_forward_passes_that_processes_do_not_make_together_are_refused() -> None:
    config = TrainConfig(shard="gradients")
    with pytest.raises(ValueError, match="equal_forwards"):
        check_sharding(config, Objective(DiffusionDPO(), DdimInversion()))
    check_sharding(config, Objective(DiffusionDPO(), DdimInversion(equal_forwards=True)))
    with pytest.raises(ValueError, match="leave sampled_steps out, or use shard no"):
        check_sharding(config, Objective(InversionDPO(), InversionTrajectory(sampled_steps=2)))
    check_sharding(config, Objective(InversionDPO(), InversionTrajectory()))


def test_one_process_is_refused(prepare: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="one process"):
        prepare("alone", shard="weights")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, None), ({"FSDP_VERSION": "2"}, "weights"), ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "gradients")],
)
def test_the_launchers_request(environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true" if environment else "false")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert asked_by_launcher() == expected
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"


@pytest.mark.parametrize(("name", "value"), [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true")])
def test_other_requests_of_the_launcher_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name.lower().replace("_offload", "_offload")):
        asked_by_launcher()


def test_the_configurations_are_ones_that_accelerate_reads() -> None:
    found = {path.stem: load_config_from_file(str(path)) for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
    kinds = {name: (config.distributed_type.value, config.num_machines, config.num_processes) for name, config in found.items()}
    assert kinds == {
        "single": ("NO", 1, 1),
        "ddp": ("MULTI_GPU", 1, 2),
        "fsdp2": ("FSDP", 1, 2),
        "deepspeed_zero2": ("DEEPSPEED", 1, 2),
        "multi_node": ("MULTI_GPU", 8, 64),
    }


def test_the_launcher_hands_the_request_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "train.py"]))
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    assert asked_by_launcher() == "weights"


@pytest.mark.parametrize(("stage", "expected"), [("2", "gradients"), ("3", "weights")])
def test_zero_of_deepspeed_is_split_by_torch(stage: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs" / "accelerate" / "deepspeed_zero2.yaml")
    words = ["--config_file", config, "--zero_stage", stage, "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED")):
            monkeypatch.setenv(name, value)
    assert asked_by_launcher() == expected
    assert asked_by_launcher() is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZERO_STAGE", "1", "zero_stage is 1; accepted: 2, 3"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device is cpu"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device is nvme"),
        ("CONFIG_FILE", "ds.json", "deepspeed_config_file is ds.json"),
    ],
)
def test_other_requests_for_deepspeed_are_refused(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(ValueError, match=message):
        asked_by_launcher()
