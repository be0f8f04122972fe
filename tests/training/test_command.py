"""The command as a user meets it: exit codes, the one-line error, signals, two ranks, and what a finished run leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffpref import cli
from diffpref.models.backbone import load_backbone

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_diffusion_dpo.py"
SECONDS = 240  # for a child process, on a machine that does other things too

Settings = dict[str, Any]
Go = Callable[..., Path]
State = Callable[[Path, int], dict[str, Tensor]]


def flags(settings: Settings) -> list[str]:
    """Settings as command line."""
    words = []
    for name, value in settings.items():
        words += (
            [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value).lower() if value is False else str(value)]
        )
    return words


def child(*words: str) -> subprocess.Popen[str]:
    """A process with one thread per process and no launcher around it."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: x for name, x in os.environ.items() if name not in launcher and not name.startswith("ACCELERATE_")}
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(*words) -> a child process that does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def go(*words: str) -> subprocess.Popen[str]:
        started.append(child(*words))
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def last_line(text: str) -> str:
    """The last line that is not blank."""
    return [line for line in text.splitlines() if line.strip()][-1]


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors without the optimizer's."""
    return {name: x for name, x in state.items() if name.startswith("weights/")}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_sigterm_saves_and_the_resumed_run_ends_with_the_same_weights(
    start: Callable[..., subprocess.Popen[str]], base_settings: Settings, run_training: Go, read_state: State, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    settings = base_settings | {"beta": 100.0, "max_train_steps": 100_000, "output_dir": folder}
    process = start(str(SCRIPT), *flags(settings))
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, errors
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    stopped = lines[-1]["step"]
    assert f"stopped by a signal after step {stopped}" in errors
    assert "--resume_from_checkpoint latest" in errors
    assert [p.name for p in folder.glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    total = stopped + 2
    run_training("parts", max_train_steps=total, resume_from_checkpoint="latest")
    whole = run_training("whole", max_train_steps=total)
    assert_same(read_state(folder, total), read_state(whole, total))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_two_ranks_are_one_rank_with_twice_the_accumulation(
    family: str,
    start: Callable[..., subprocess.Popen[str]],
    base_settings: Settings,
    sdxl_folder: Path,
    run_training: Go,
    read_state: State,
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, tuning = tmp_path / "two", {}
    if family == "sdxl":  # every part that ranks could disagree about: trained text encoders, average, validation
        tuning = {"pretrained_model_name_or_path": str(sdxl_folder), "train_text_encoder": True, "use_ema": True}
        tuning |= {"validation_steps": 1, "held_out_pairs": 4, "num_validation_images": 1, "early_stopping_patience": 1}
    settings = base_settings | {"beta": 100.0, "max_train_steps": 3, "output_dir": folder} | tuning
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    process = start(*launcher, str(SCRIPT), *flags(settings))
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert (manifest["num_processes"], manifest["pairs_per_update"]) == (2, 4)
    one = run_training("one", max_train_steps=3, gradient_accumulation_steps=2, **tuning)
    (last,) = [int(p.name.split("-")[1]) for p in one.glob("checkpoint-*")]
    assert_same(read_state(folder, last), read_state(one, last))
    assert [p.name for p in folder.glob("best-*")] == [p.name for p in one.glob("best-*")]
    assert (folder / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("case", ["unknown flag", "no data"])
def test_a_bad_command_ends_with_one_line_and_code_two(
    case: str, start: Callable[..., subprocess.Popen[str]], base_settings: Settings, tmp_path: Path
) -> None:
    change: Settings = {"unknown flag": {"learning_rat": 1e-5}, "no data": {"train_data_dir": None}}[case]
    process = start(str(SCRIPT), *flags(base_settings | {"output_dir": tmp_path / "run"} | change))
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert last_line(errors).startswith("error: ")
    assert {"unknown flag": "did you mean learning_rate?", "no data": "--train_data_dir"}[case] in last_line(errors)
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def parquet(columns: dict[str, list[Any]], folder: Path) -> str:
    """A file of pairs."""
    path = folder / "pairs.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def wrong_columns(columns: dict[str, list[Any]], folder: Path) -> Settings:
    """Captions under another name."""
    return {"train_data_dir": parquet({("captions" if n == "caption" else n): x for n, x in columns.items()}, folder)}


def bad_labels(columns: dict[str, list[Any]], folder: Path) -> Settings:
    """Both images preferred in every row."""
    return {"train_data_dir": parquet(columns | {"label_0": [1.0] * 24, "label_1": [1.0] * 24}, folder)}


def yaml_file(text: str) -> Callable[[dict[str, list[Any]], Path], Settings]:
    """A config file with this text."""

    def write(columns: dict[str, list[Any]], folder: Path) -> Settings:
        (folder / "run.yaml").write_text(text)
        return {"config": str(folder / "run.yaml")}

    return write


BAD: dict[str, tuple[Settings | Callable[[dict[str, list[Any]], Path], Settings], list[str]]] = {
    "model without data": ({"train_data_dir": None}, ["--train_data_dir", "--dataset_name"]),
    "data without model": ({"pretrained_model_name_or_path": None}, ["--pretrained_model_name_or_path"]),
    "unknown flag": ({"learning_rat": 1e-5}, ["--learning_rat is not a setting", "did you mean learning_rate?"]),
    "unknown YAML key": (yaml_file("beta: 10\nresolutoin: 32\n"), ["run.yaml", "resolutoin", "did you mean resolution?"]),
    "unreadable YAML": (yaml_file("beta: [1,\nrank: }"), ["config", "run.yaml", "is not readable YAML"]),
    "YAML that is a list": (yaml_file("- beta\n"), ["run.yaml", "list", "mapping"]),
    "missing YAML": ({"config": "./nowhere.yaml"}, ["config './nowhere.yaml'", "cannot be read"]),
    "wrong columns": (wrong_columns, ["train_data_dir", "pairs.parquet", "captions", "caption_column"]),
    "labels that do not sum to 1": (bad_labels, ["train_data_dir", "pairs.parquet", "none of 24 rows can be used"]),
    "missing data": ({"train_data_dir": "./nowhere"}, ["train_data_dir './nowhere'", "does not exist"]),
    "missing model": ({"pretrained_model_name_or_path": "./nowhere"}, ["pretrained_model_name_or_path './nowhere'"]),
    "resolution": ({"resolution": 36}, ["resolution is 36", "multiple of 8"]),
    "half precision on a CPU": ({"mixed_precision": "fp16"}, ["mixed_precision is fp16", "GPU"]),
    "unknown method": ({"method": "dpo2"}, ["method is 'dpo2'", "diffusion_dpo, ", "sft"]),
    "beta of zero": ({"beta": 0}, ["beta is 0", "beta > 0"]),
    "foreign setting": ({"method": "sft", "beta": 5}, ["beta is 5, but it is no setting of method sft"]),
    "unknown LoRA targets": ({"lora_targets": "to_x"}, ["lora_targets 'to_x'", "attention"]),
    "wrong type": ({"max_train_steps": "many"}, ["max_train_steps is 'many'", "whole number"]),
    "out of range": ({"proportion_empty_prompts": 1.5}, ["proportion_empty_prompts is 1.5"]),
    "two data sources": ({"dataset_name": "a/b"}, ["train_data_dir", "dataset_name 'a/b'"]),
    "cache with random crops": ({"cache_latents": True, "random_crop": True}, ["cache_latents", "random_crop"]),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-7"}, ["resume_from_checkpoint 'checkpoint-7'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str,
    base_settings: Settings,
    pair_columns: dict[str, list[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    change, expected = BAD[case]
    changed = change(pair_columns, tmp_path) if callable(change) else change
    settings = base_settings | {"output_dir": tmp_path / "run"} | changed
    assert cli.main(["train", *flags(settings)]) == 2
    line = last_line(capsys.readouterr().err)
    assert line.startswith("error: ")
    for text in expected:
        assert text in line
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run_is_left_alone(base_settings: Settings, run_training: Go, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_training("run", max_train_steps=1)
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert cli.main(["train", *flags(base_settings | {"output_dir": folder, "learning_rate": 0.5})]) == 2
    line = last_line(capsys.readouterr().err)
    assert line.startswith(f"error: output_dir {str(folder)!r} holds a run with other settings")
    assert "learning_rate: 0.01 -> 0.5" in line
    assert "allow_change" in line
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.reliability("R11")
def test_named_settings_may_change_when_a_run_goes_on(
    base_settings: Settings, run_training: Go, read_metrics: Callable[[Path], list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_training("run", max_train_steps=2, lr_scheduler="constant", lr_warmup_steps=0)
    changed = base_settings | {"output_dir": folder, "max_train_steps": 4, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    changed |= {"beta": 100.0, "learning_rate": 0.002, "resume_from_checkpoint": "latest"}
    assert cli.main(["train", *flags(changed | {"allow_change": "beta"})]) == 2
    assert "learning_rate: 0.01 -> 0.002" in last_line(capsys.readouterr().err)
    assert cli.main(["train", *flags(changed | {"allow_change": "learning_rat"})]) == 2
    assert "allow_change has 'learning_rat'" in last_line(capsys.readouterr().err)
    assert cli.main(["train", *flags(changed | {"allow_change": "learning_rate"})]) == 0
    assert "as allow_change says: learning_rate: 0.01 -> 0.002" in capsys.readouterr().err
    assert [row["lr"] for row in read_metrics(folder) if "lr" in row] == [0.01, 0.01, 0.002, 0.002]


@pytest.mark.reliability("R8")
def test_a_run_whose_checkpoints_are_all_damaged_may_begin_again(
    base_settings: Settings, run_training: Go, capsys: pytest.CaptureFixture[str], read_state: State
) -> None:
    folder = run_training("run", max_train_steps=2)
    before, metrics = read_state(folder, 2), (folder / "metrics.jsonl").read_text().count('"loss"')
    (folder / "checkpoint-2" / "manifest.json").unlink()
    again = base_settings | {"output_dir": folder, "max_train_steps": 2, "beta": 100.0, "resume_from_checkpoint": "latest"}
    assert cli.main(["train", *flags(again)]) == 2
    assert "with --restart true" in last_line(capsys.readouterr().err)
    assert cli.main(["train", *flags(again | {"restart": True})]) == 0
    assert_same(read_state(folder, 2), before)
    assert (folder / "metrics.jsonl").read_text().count('"loss"') == metrics == 2


def test_a_learning_rate_beyond_reason_ends_with_code_three(
    base_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_state: State
) -> None:
    settings = base_settings | {"output_dir": tmp_path / "run", "learning_rate": 1e30, "checkpointing_steps": 1, "max_train_steps": 20}
    assert cli.main(["train", *flags(settings)]) == 3
    line = last_line(capsys.readouterr().err)
    assert "3 updates in a row were not finite" in line
    assert "learning_rate (1e+30)" in line
    steps = [int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*")]
    assert steps
    for step in steps:
        assert all(torch.isfinite(x).all() for x in read_state(tmp_path / "run", step).values())
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@torch.no_grad()
def prediction(pipeline: DiffusionPipeline) -> Tensor:
    """What the UNet answers to fixed inputs."""
    maker = torch.Generator().manual_seed(0)
    width = pipeline.unet.config.cross_attention_dim
    added = {"text_embeds": torch.ones(1, 16), "time_ids": torch.full((1, 6), 32.0)} if width == 32 else None
    x_t, embeds = torch.randn(1, 4, 8, 8, generator=maker), torch.randn(1, 5, width, generator=maker)
    return pipeline.unet(x_t, torch.tensor([500]), embeds, added_cond_kwargs=added).sample


def test_lora_on_v_prediction_from_command_to_pictures(
    base_settings: Settings, sd_v_folder: Path, pairs_file: Path, tmp_path: Path, read_state: State
) -> None:
    (tmp_path / "run.yaml").write_text(f"beta_dpo: 100\nmax_train_steps: 9\nlora_alpha: 7\ntrain_data_dir: {pairs_file}\n")
    settings = base_settings | {"pretrained_model_name_or_path": sd_v_folder, "max_train_steps": 2, "output_dir": tmp_path / "run"}
    settings |= {"train_data_dir": None, "config": tmp_path / "run.yaml", "merge_lora": True, "lora_targets": "all"}
    assert cli.main(["train", "--method", "diffusion_dpo", *flags(settings)]) == 0
    manifest = json.loads((tmp_path / "run" / "run_manifest.json").read_text())
    assert (manifest["model_family"], manifest["prediction_type"]) == ("sd", "v_prediction")
    assert (manifest["settings"]["beta"], manifest["settings"]["max_train_steps"]) == (100.0, 2)  # flags win over the file
    base = DiffusionPipeline.from_pretrained(sd_v_folder, safety_checker=None, requires_safety_checker=False)
    before = prediction(base)
    base.load_lora_weights(tmp_path / "run", weight_name="pytorch_lora_weights.safetensors")
    tuned = prediction(base)
    assert not torch.allclose(tuned, before, atol=1e-4)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "run", safety_checker=None, requires_safety_checker=False)
    torch.testing.assert_close(prediction(merged), tuned, rtol=1e-4, atol=1e-4)
    merged.set_progress_bar_config(disable=True)
    assert merged("a red circle", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)
    trained = {n.removeprefix("weights/").replace(".default", ""): x for n, x in weights(read_state(tmp_path / "run", 2)).items()}
    assert trained.keys() == {n.replace(".default_0", "") for n, _ in base.unet.named_parameters() if "lora_" in n}


def test_full_training_of_sdxl_leaves_a_pipeline(base_settings: Settings, sdxl_folder: Path, tmp_path: Path, read_state: State) -> None:
    common = {name: value for name, value in base_settings.items() if name not in cli.LORA_SETTINGS}
    settings = common | {"pretrained_model_name_or_path": sdxl_folder, "tune": "full", "max_train_steps": 2, "beta": 100}
    assert cli.main(["train", *flags(settings | {"output_dir": tmp_path / "run"})]) == 0
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "run")
    saved = weights(read_state(tmp_path / "run", 2))
    assert_same(saved, {f"weights/{name}": p.detach() for name, p in tuned.unet.named_parameters()})
    base = load_backbone(str(sdxl_folder)).pipeline
    assert not torch.allclose(prediction(tuned), prediction(base), atol=1e-4)
    assert tuned.config.force_zeros_for_empty_prompt is base.config.force_zeros_for_empty_prompt
    for part in ("vae", "text_encoder", "text_encoder_2"):
        pairs = zip(getattr(tuned, part).parameters(), getattr(base, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    tuned.set_progress_bar_config(disable=True)
    assert tuned("a red circle", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)
