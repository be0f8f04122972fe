"""Evaluation and labelling killed at any moment and begun again: nothing finished is done twice, nothing is lost or doubled."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState

from diffpref.inference import pictures
from diffpref.inference.evaluate import EvaluateConfig, evaluate
from diffpref.labelling.command import LabelConfig, label

PROMPTS = tuple(f"a red circle, number {i}" for i in range(6))


def brightness(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """A scorer."""
    return np.array([np.asarray(image).mean() for image in images])


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every complete file of the work: place -> (identity, time), by which one that was written again shows."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".png", ".parquet") and not p.name.startswith(".")]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in kept if not p.name.startswith(("train-", "scores.parquet"))}


def dies_after(writes: int, work_to_do: Callable[[], object]) -> None:
    """Do the work in this process, which is killed in the middle of its n-th write: the file is there under its hidden name."""
    done = 0
    replace = Path.replace

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        if done == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return replace(path, target)

    Path.replace = counted  # type: ignore[method-assign,assignment]
    work_to_do()


def killed_again_and_again(folder: Path, steps: Sequence[int], work_to_do: Callable[[], object]) -> None:
    """Start the work in processes of their own, each killed after some writes, until one ends; what was finished must stay as it was."""
    context = multiprocessing.get_context("fork")
    for writes in (*steps, 10_000):
        before = finished(folder)
        process = context.Process(target=dies_after, args=(writes, work_to_do))
        process.start()
        process.join(60)
        after = finished(folder)
        assert before.items() <= after.items()
        assert process.exitcode == (0 if writes == 10_000 else -signal.SIGKILL)


@pytest.mark.parametrize("steps", [(0, 1, 4), (9, 5)])
def test_evaluation(steps: Sequence[int], sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK", 4)

    def run(folder: Path) -> None:
        settings = {"prompts": PROMPTS, "scorers": ("bright",), "num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 2}
        config = EvaluateConfig(aligned=(f"again={sd_folder}",), output_dir=str(folder), **settings)
        evaluate(config, {"bright": brightness}, str(sd_folder))

    run(tmp_path / "whole")
    killed_again_and_again(tmp_path / "parts", steps, partial(run, tmp_path / "parts"))
    whole, parts = (pq.read_table(tmp_path / name / "scores.parquet").to_pylist() for name in ("whole", "parts"))
    assert len(parts) == len(whole) == 2 * len(PROMPTS)
    for one, other in zip(whole, parts, strict=True):
        assert {**one, "bright": 0} == {**other, "bright": 0}
        assert abs(one["bright"] - other["bright"]) < 0.5  # pictures of another batch differ by rounding
    assert json.loads((tmp_path / "parts" / "report.json").read_text())["comparisons"][0]["num_prompts"] == len(PROMPTS)


@pytest.mark.parametrize("steps", [(0, 3, 8)])
def test_labelling_of_new_pairs(steps: Sequence[int], sd_folder: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        settings = {"scorers": ("bright",), "num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 2, "shard_size": 2}
        config = LabelConfig(
            prompts=PROMPTS, pretrained_model_name_or_path=str(sd_folder), num_images_per_prompt=2, output_dir=str(folder), **settings
        )
        label(config, {"bright": brightness})

    run(tmp_path / "whole")
    killed_again_and_again(tmp_path / "parts", steps, partial(run, tmp_path / "parts"))
    whole, parts = (rows_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["caption"] for row in parts] == [row["caption"] for row in whole] == list(PROMPTS)
    for one, other in zip(whole, parts, strict=True):
        assert one["label_0"] == other["label_0"]
        assert abs(one["bright_0"] - other["bright_0"]) < 0.5
    assert [p.name for p in (tmp_path / "parts").iterdir() if p.name.startswith(".")] == []


def test_labelling_of_existing_pairs(pairs_file: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        config = LabelConfig(
            train_data_dir=str(pairs_file), scorers=("bright",), shard_size=5, output_dir=str(folder), cache_dir=str(tmp_path / "cache")
        )
        label(config, {"bright": brightness})

    run(tmp_path / "whole")
    killed_again_and_again(tmp_path / "parts", (0, 1, 2, 3, 4), partial(run, tmp_path / "parts"))
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def as_rank(rank: int, port: int, work_to_do: Callable[[], object]) -> None:
    """Do the work as one of two processes; the second is slow to draw."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    if rank == 1:
        draw = pictures.generate
        pictures.generate = lambda *args, **more: (time.sleep(0.3), draw(*args, **more))[1]  # type: ignore[assignment]
    work_to_do()


def test_two_processes_share_an_evaluation(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK", 4)

    def run(folder: Path) -> None:
        settings = {"prompts": PROMPTS, "scorers": ("bright",), "num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 2}
        config = EvaluateConfig(aligned=(f"again={sd_folder}",), output_dir=str(folder), **settings)
        evaluate(config, {"bright": brightness}, str(sd_folder))

    run(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=as_rank, args=(rank, port, partial(run, tmp_path / "two"))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    one, two = (pq.read_table(tmp_path / name / "scores.parquet").to_pylist() for name in ("one", "two"))
    assert [{**row, "bright": 0} for row in one] == [{**row, "bright": 0} for row in two]
    assert max(abs(a["bright"] - b["bright"]) for a, b in zip(one, two, strict=True)) < 0.5


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The pairs that training will read."""
    return pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("train-*.parquet"))]).to_pylist()  # type: ignore[no-any-return]
