"""Fitting a reward model: the loss of a step, exact resume, two ranks, the folder that is left, and the errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast

from diffpref.data.images import decode_image
from diffpref.data.sampler import PairSampler
from diffpref.scorers.pickscore import load_pickscore
from diffpref.training import reward_loop
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_loop import export, validate
from diffpref.training.reward_model import load_reward_model, preprocessor
from diffpref.training.reward_run import RewardRun, prepare
from diffpref.training.run_log import RunLog
from diffpref.training.stopping import NotFinite, Stopped

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "train_reward_model.py"
SECONDS = 240  # for child processes, on a machine that does other things too
TEXTS = ("a red circle", "a blue ring", "a green cross")

Settings = dict[str, Any]


def state(folder: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    parts = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
    assert [p.stem for p in parts] == ["best", "optimizer", "weights"]
    return {f"{p.stem}/{name}": x for p in parts for name, x in load_file(p).items()}


def metrics(folder: Path) -> list[Settings]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.startswith("time/")} for line in lines]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_the_loss_of_an_update_is_the_weighted_mean_over_all_its_pairs(start: Callable[..., RewardRun]) -> None:
    """Six micro-batches of unequal weight, against the criterion written out over 24 pairs that were scored one by one."""
    run = start("run", train_batch_size=4, gradient_accumulation_steps=6)
    pairs, sampler = run.data.pairs, PairSampler(len(run.data.pairs), 0)
    indices = [i for m in range(6) for i, _ in sampler.micro_batch(0, m, 0, batch_size=4, accumulation=6, world_size=1)]
    tower, losses, weights = run.model.towers, [], []
    for i in indices:
        row = pairs.row(i)
        pixels = torch.stack([run.data.preprocessing.image(decode_image(data)) for data in (row.image_0, row.image_1)]).float() / 255
        pixels = (pixels - torch.tensor(preprocessor(16)["image_mean"])[:, None, None]) / torch.tensor(preprocessor(16)["image_std"])[
            :, None, None
        ]
        with torch.no_grad():
            ids = tower.tokenizer(row.prompt, return_tensors="pt").input_ids
            s0, s1 = tower.model(input_ids=ids, pixel_values=pixels).logits_per_text[0].double().tolist()
        log_sum = math.log(math.exp(s0) + math.exp(s1))
        entropy = -sum(p * math.log(p) for p in (row.p0, 1 - row.p0) if p)
        losses.append(-row.p0 * (s0 - log_sum) - (1 - row.p0) * (s1 - log_sum) - entropy)
        weights.append(1 / sum(prompt == row.prompt for prompt in pairs.prompts))
    assert 0.5 in [pairs.p0[i] for i in indices]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    unweighted = sum(losses) / len(losses)
    assert abs(expected - unweighted) > 1e-3
    reward_loop.accumulate(run, run.batches(), 0)
    assert run.log.means()["loss"] == pytest.approx(expected, abs=1e-5)
    grads = {name: p.grad.clone() for name, p in run.trainable.items() if p.grad is not None}
    assert grads.keys() == run.trainable.keys()


def test_a_run_that_was_stopped_resumes_bit_for_bit(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = go("whole", gradient_accumulation_steps=2)
    write = RunLog.write

    def and_signal(self: RunLog, at: int, values: dict[str, float]) -> None:
        write(self, at, values)
        if at == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", and_signal)
        with pytest.raises(Stopped, match="after step 4") as stopped:
            go("parts", gradient_accumulation_steps=2)
    assert stopped.value.code == 143
    parts = whole.with_name("parts")
    assert not (parts / "model.safetensors").exists()
    go("parts", gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    assert_same(state(parts, 6), state(whole, 6))
    assert metrics(parts) == metrics(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((parts / "reward_model.json").read_text()) == json.loads((whole / "reward_model.json").read_text())


def test_the_best_weights_survive_a_resume(go: Callable[..., Path], base: Settings, tmp_path: Path) -> None:
    whole = go("whole")
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-6")
    best = json.loads((parts / "checkpoint-3" / "trainer_state.json").read_text())["best"]
    weights = load_file(parts / "checkpoint-3" / "best.safetensors")
    run = prepare(RewardModelConfig(**base | {"output_dir": str(parts), "resume_from_checkpoint": "latest"}))
    run.log.close()
    assert run.first_step == 3
    assert run.best is not None
    assert (run.best.step, run.best.accuracy) == (best["step"], best["accuracy"])
    assert_same(dict(run.best.weights), weights)


def test_two_ranks_are_one_rank_with_twice_the_accumulation(base: Settings, go: Callable[..., Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "settings.yaml").write_text(json.dumps(base))  # JSON is YAML
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: x for name, x in os.environ.items() if name not in launcher and not name.startswith("ACCELERATE_")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    two = tmp_path / "two"
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), str(SCRIPT))
    command = [sys.executable, *words, "--config", str(tmp_path / "settings.yaml"), "--output_dir", str(two), "--max_train_steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("use it as pickscore=") == 1
    manifest = json.loads((two / "run_manifest.json").read_text())
    assert (manifest["num_processes"], manifest["pairs_per_update"]) == (2, 8)
    one = go("one", gradient_accumulation_steps=2, max_train_steps=3)
    assert_same(state(two, 3), state(one, 3))
    assert metrics(two) == [pytest.approx(line, rel=1e-6) for line in metrics(one)]


def test_the_folder_is_a_scorer_for_us_and_for_transformers(go: Callable[..., Path], brightness: Path) -> None:
    folder = go("run", held_out_pairs=0, learning_rate=1e-2)
    rows = pq.read_table(brightness).slice(0, 8).to_pylist()
    pictures = [Image.open(__import__("io").BytesIO(row[name])) for row in rows for name in ("jpg_0", "jpg_1")]
    prompts = [row["caption"] for row in rows for _ in (0, 1)]
    scores = load_pickscore(str(folder))(pictures, prompts)
    assert scores.std() > 1e-3
    assert load_pickscore(str(folder)).record["version"] == "own model, step 6"

    config = RewardModelConfig(pretrained_model_name_or_path=str(folder), train_data_dir=str(brightness))
    model = load_reward_model(config, "cpu")
    assert all(p.requires_grad for p in model.parameters())
    trained = state_without_best(folder, 6)
    assert_same({name: p.detach() for name, p in model.named_parameters()}, trained)

    (folder / "tokenizer.json").rename(folder / "tokenizer.away")  # what is left is the older form
    assert torch.equal(load_pickscore(str(folder))(pictures, prompts), scores)
    (folder / "tokenizer.away").rename(folder / "tokenizer.json")
    plain, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil.from_pretrained(folder)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = plain(**inputs, **processor(pictures, return_tensors="pt")).logits_per_image.diagonal()
    assert torch.allclose(scores, logits, atol=1e-4)


def state_without_best(folder: Path, step: int) -> dict[str, Tensor]:
    """The trained weights of a checkpoint."""
    assert not (folder / f"checkpoint-{step}" / "best.safetensors").exists()
    return load_file(folder / f"checkpoint-{step}" / "weights.safetensors")


def test_half_precision_is_for_the_file_only(go: Callable[..., Path], start: Callable[..., RewardRun]) -> None:
    whole, half = go("whole"), go("half", export_dtype="float16")
    run = start("direct", export_dtype="float16")
    export(run, 0)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert_same(state(whole, 6), state(half, 6))
    weights = load_file(whole / "model.safetensors")
    assert_same({name: x.half() for name, x in weights.items()}, load_file(half / "model.safetensors"))
    assert json.loads((half / "config.json").read_text()).get("dtype", "float16") == "float16"


def test_a_signal_in_the_pictures_is_learned(go: Callable[..., Path]) -> None:
    folder = go("run", max_train_steps=40, learning_rate=1e-2, train_batch_size=10, lr_warmup_steps=5)
    result = json.loads((folder / "reward_model.json").read_text())
    assert result["held_out_accuracy"] == 1.0
    assert result["interval_95"][0] > 0.5
    losses = [line["loss"] for line in metrics(folder) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.3 < np.mean(losses[:3])


def test_the_best_weights_are_exported_not_the_last(start: Callable[..., RewardRun]) -> None:
    run = start("run")
    assert run.held_out is not None
    projection = run.trainable["clip.visual_projection.weight"]
    accuracy = {}
    for step in (1, 2, 3):
        validate(run, run.held_out, step)
        assert run.best is not None
        accuracy[step] = [line["eval/accuracy"] for line in metrics(run.folder)][-1]
        with torch.no_grad():
            projection.neg_()  # every score changes its sign: accuracy a becomes 1 - a
    assert accuracy[2] == pytest.approx(1 - accuracy[1])
    assert accuracy[1] != accuracy[2]
    better = 1 if accuracy[1] > accuracy[2] else 2
    assert (run.best.step, run.best.accuracy) == (better, accuracy[better])
    with torch.no_grad():
        projection.zero_()
    export(run, run.best.step)
    saved = load_file(run.folder / "model.safetensors")
    assert torch.equal(saved["visual_projection.weight"], run.best.weights["clip.visual_projection.weight"])


def test_ties_are_left_out_of_the_accuracy(start: Callable[..., RewardRun]) -> None:
    run = start("run", held_out_pairs=20)
    assert run.held_out is not None
    ties = int((run.held_out.pairs.p0 == 0.5).sum())
    assert ties > 0
    validate(run, run.held_out, 1)
    assert metrics(run.folder)[-1]["eval/pairs"] == len(run.held_out.pairs) - ties


def test_decoding_does_not_depend_on_the_threads(start: Callable[..., RewardRun]) -> None:
    one, many = (start(str(n), dataloader_num_workers=n) for n in (1, 5))
    for a, b in zip(one.batches(), many.batches(), strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.pixels.shape == (4, 2, 3, 16, 16)
        assert (a.prompts, a.pair_ids) == (b.prompts, b.pair_ids)


def test_bfloat16_and_recomputed_activations_train_too(go: Callable[..., Path], base: Settings) -> None:
    plain = metrics(go("plain"))
    for name, change in {"bf16": {"mixed_precision": "bf16"}, "recomputed": {"gradient_checkpointing": True}}.items():
        losses = [line["loss"] for line in metrics(go(name, **change)) if "loss" in line]
        expected = [line["loss"] for line in plain if "loss" in line]
        assert losses == pytest.approx(expected, abs=0.05 if name == "bf16" else 1e-5)
        assert (losses == expected) is False or name == "recomputed"


def test_updates_that_are_not_finite_end_the_run(go: Callable[..., Path]) -> None:
    with pytest.raises(NotFinite, match=r"3 updates in a row were not finite.*learning_rate \(1e\+30\)"):
        go("run", learning_rate=1e30, lr_scheduler="constant", lr_warmup_steps=0, max_train_steps=20, held_out_pairs=0)


def test_a_resume_with_other_data_or_settings_is_refused(go: Callable[..., Path], base: Settings, tmp_path: Path) -> None:
    go("run")
    with pytest.raises(ValueError, match=r"learning_rate: 0\.003 -> 0\.5"):
        go("run", learning_rate=0.5, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="8, but the checkpoint was trained with 4 pairs per update"):
        go("run", train_batch_size=8, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="already holds this run"):
        go("run")
    stored = pq.read_table(base["train_data_dir"])
    moved = tmp_path / "moved.parquet"
    shutil.copy(base["train_data_dir"], moved)
    go("again", train_data_dir=str(moved))
    pq.write_table(stored.slice(1), moved)
    with pytest.raises(ValueError, match="holds other pairs than the checkpoint was trained on"):
        go("again", train_data_dir=str(moved), resume_from_checkpoint="checkpoint-3")
