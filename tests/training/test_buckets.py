"""Runs in aspect-ratio buckets, and the other settings of how pictures are prepared."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from diffpref.core.types import PreferenceBatch
from diffpref.models import attention
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.run import Run
from diffpref.training.sources import pictures_at_once

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_diffusion_dpo.py"
SIZES = ((64, 64), (48, 80), (90, 30))  # height and width of the pictures, in turns
SHAPES = {(8, 8), (6, 10), (12, 4)}  # of their latents at resolution 32

Settings = dict[str, Any]
Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[Settings]]
State = Callable[[Path, int], dict[str, Tensor]]


def png(seed: int, height: int, width: int) -> bytes:
    """A colour gradient."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shaped_pairs(tmp_path_factory: pytest.TempPathFactory, pair_columns: dict[str, list[object]]) -> Path:
    """13 pairs: 5 square, 4 wide, 4 tall."""
    columns = {name: values[:13] for name, values in pair_columns.items()}
    for column in (0, 1):
        columns[f"jpg_{column}"] = [png(2 * row + column, *SIZES[row % 3]) for row in range(13)]
    path = tmp_path_factory.mktemp("shaped") / "train-0.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def base_settings(base_settings: Settings, sdxl_folder: Path, shaped_pairs: Path) -> Settings:
    """SDXL in buckets."""
    model = {"pretrained_model_name_or_path": str(sdxl_folder), "train_data_dir": str(shaped_pairs)}
    return base_settings | model | {"aspect_ratio_buckets": True, "bucket_step": 8, "max_train_steps": 3}


def watched(run: Run) -> list[PreferenceBatch]:
    """The batches that the run will use, as it uses them."""
    seen: list[PreferenceBatch] = []

    def source(inner: Iterator[PreferenceBatch]) -> Iterator[PreferenceBatch]:
        for batch in inner:
            seen.append(batch)
            yield batch

    run.source = source(run.source)
    return seen


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_three_shapes_train_and_resume_bit_for_bit(
    prepare: Start, run_training: Go, read_metrics: Metrics, read_state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"gradient_accumulation_steps": 2, "beta": 5000.0}
    run = prepare("whole", **settings)
    told = capsys.readouterr().err
    assert "3 of 9 aspect-ratio buckets have pairs" in told
    assert [line.split()[:4] for line in told.splitlines() if " x " in line][1:] == [
        ["48", "x", "16", "4"],
        ["32", "x", "32", "5"],
        ["24", "x", "40", "4"],
    ]
    batches = watched(run)
    train(run)
    whole = run.folder
    assert {tuple(batch.latents.shape[-2:]) for batch in batches} == SHAPES
    for batch in batches:
        assert batch.cond.time_ids is not None
        height, width = (4 * side for side in batch.latents.shape[-2:])
        original = {(32, 32): (64, 64), (24, 40): (48, 80), (48, 16): (90, 30)}[height, width]
        assert batch.cond.time_ids.tolist() == [[[*original, 0, 0, height, width]] * 2] * 2
    run_training("parts", **settings, max_train_steps=2)
    parts = run_training("parts", **settings, resume_from_checkpoint="latest")
    assert_same(read_state(parts, 3), read_state(whole, 3))
    assert read_metrics(parts) == read_metrics(whole)
    lines = read_metrics(whole)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[1]["loss"] != lines[0]["loss"]


@pytest.mark.parametrize("flip_mode", ["shared", "independent"])
def test_kept_latents_train_the_same_bit_for_bit(flip_mode: str, run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    fresh, kept = (run_training(f"run-{flag}", cache_latents=flag, flip_mode=flip_mode, max_train_steps=8) for flag in (False, True))
    assert_same(read_state(kept, 8), read_state(fresh, 8))
    assert read_metrics(kept) == read_metrics(fresh)


def test_the_mode_of_flips_matters(run_training: Go, read_metrics: Metrics) -> None:
    shared, independent = (read_metrics(run_training(mode, flip_mode=mode)) for mode in ("shared", "independent"))
    assert shared != independent


@pytest.mark.slow  # the default tier has the same for the plain order
def test_two_ranks_are_one_rank_with_twice_the_accumulation(
    base_settings: Settings, run_training: Go, read_state: State, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = base_settings | {"beta": 100.0, "output_dir": tmp_path / "two", "flip_mode": "independent"}
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run([sys.executable, *launcher, str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run_manifest.json").read_text())["num_processes"] == 2
    one = run_training("one", gradient_accumulation_steps=2, flip_mode="independent")
    assert_same(read_state(tmp_path / "two", 3), read_state(one, 3))


def test_epochs_see_every_pair_and_end_there(prepare: Start) -> None:
    run = prepare("run", num_train_epochs=2, train_batch_size=3)
    assert run.config.max_train_steps == 10  # two visits of 4, 5 and 4 pairs are 3, 4 and 3 batches of three
    batches = watched(run)
    train(run)
    seen = Counter(name for batch in batches for name in batch.pair_ids)
    assert len(batches) == 10
    assert len(seen) == 13
    assert set(seen.values()) == {2, 3}
    assert len({(name, visit) for batch in batches for name, visit in zip(batch.pair_ids, batch.visits, strict=True)}) == 30


def test_held_out_pairs_are_measured_in_their_own_buckets(run_training: Go, read_metrics: Metrics) -> None:
    folder = run_training("run", held_out_pairs=5, validation_steps=3, num_validation_images=1, vae_encode_batch_size=3)
    (line,) = [line for line in read_metrics(folder) if "eval/implicit_accuracy" in line]
    assert line["eval/num_pairs"] >= 5


def test_attention_kernels_are_tried_in_the_shapes_of_all_buckets(
    prepare: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, tried = attention.kernel, set()

    def picky(query: Tensor, *rest: Any) -> Tensor:
        tried.add(query.shape[1])
        if query.shape[1] == 12 and rest[-1] is attention.KERNELS["native_math"]:
            raise RuntimeError("no kernel for 12 tokens")
        return own(query, *rest)

    monkeypatch.setattr(attention, "kernel", picky)
    prepare("run", attention="native_math")
    assert "attention native_math cannot be used here (no kernel for 12 tokens)" in capsys.readouterr().err
    assert {16, 15, 12} <= tried


@pytest.mark.parametrize("cache_latents", [False, True])
def test_the_autoencoder_gets_few_pictures_at_once(cache_latents: bool, run_training: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    given, encode = [], AutoencoderKL.encode

    def spy(self: AutoencoderKL, x: Tensor) -> Any:
        given.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", spy)
    settings = {"train_batch_size": 3, "vae_encode_batch_size": 4, "held_out_pairs": 3, "validation_steps": 3, "num_validation_images": 1}
    run_training("run", **settings, cache_latents=cache_latents)
    assert given[0] == 1  # the check of the model, before anything is trained
    assert set(given[1:]) == {3}  # six pictures of a micro-batch in two equal parts


@pytest.mark.parametrize(
    ("batch_size", "limit", "expected"), [(1, 8, 2), (3, 8, 6), (3, 5, 3), (16, 8, 8), (16, 5, 4), (7, 4, 2), (4, 1, 1)]
)
def test_pictures_at_once_divide_a_micro_batch(batch_size: int, limit: int, expected: int) -> None:
    assert pictures_at_once(TrainConfig(train_batch_size=batch_size, vae_encode_batch_size=limit)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bucket_step": 12}, "bucket_step is 12; this model needs a multiple of 8 .* for example 16"),
        ({"bucket_step": 32}, "bucket_step is 32, which leaves only the square at resolution 32"),
        ({"bucket_step": 24}, "resolution is 32; .* multiple of bucket_step 24, such as 24"),
        ({"aspect_ratio_buckets": False}, "bucket_step is 8, but there are no buckets"),
        ({"streaming": True}, "aspect_ratio_buckets is true together with streaming"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Settings, message: str, prepare: Start, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare("run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_the_size_of_its_micro_batches(run_training: Go) -> None:
    run_training("run", max_train_steps=1)
    with pytest.raises(ValueError, match="train_batch_size: 2 -> 1"):
        run_training("run", train_batch_size=1, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    run_training("run", vae_encode_batch_size=1, resume_from_checkpoint="latest")
