"""Memory, decoding processes and numbers that break: what was lost is named, and what was saved is whole."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.reliability.faults import Fault, Limits
from tests.reliability.harness import Trainer, final_state, leftovers, lines_of, newest_step, wait_until

Tried = Callable[..., None]


@pytest.mark.parametrize(
    ("step", "saved"),
    [pytest.param(1, 0, marks=pytest.mark.reliability_full("O1")), pytest.param(8, 6, marks=pytest.mark.reliability_full("O1"))],
)
def test_a_step_that_does_not_fit(step: int, saved: int, trainer: Trainer, whole: str, tmp_path: Path, tried: Tried) -> None:
    folder = tmp_path / "run"
    outcome = trainer.run(folder, Fault("oom", "backward", count=2 * step - 1))
    assert outcome.code == 6, outcome.errors
    for word in ("did not fit into the memory of cpu", "counted: ", "use ", "--resume_from_checkpoint latest"):
        assert word in outcome.last_line
    assert newest_step(folder) == saved
    tried("O1", step - 1 - saved)
    assert trainer.run(folder, resume=True).code == 0
    assert trainer.result(folder) == whole


@pytest.mark.reliability_full("O2")
def test_a_picture_that_does_not_fit_into_a_worker(
    make_trainer: Callable[..., Trainer], pair_columns: dict[str, list[Any]], tmp_path: Path, tried: Tried
) -> None:
    """Workers may take 16 MB more than they begin with; one picture needs 48 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000), "red").save(buffer, "PNG")
    pictures = [*pair_columns["jpg_0"][:5], buffer.getvalue(), *pair_columns["jpg_0"][6:]]
    pq.write_table(pa.table(pair_columns | {"jpg_0": pictures}), tmp_path / "train.parquet")
    settings = {"train_data_dir": tmp_path / "train.parquet", "cache_dir": tmp_path / "cache"}
    settings |= {"max_train_samples": 24, "dataloader_num_workers": 1}
    folder = tmp_path / "run"
    outcome = make_trainer(**settings).run(folder, limits=Limits(worker_bytes=16_000_000))
    assert outcome.code == 6, outcome.errors
    for word in ("a decoding process", "dataloader_num_workers", "--resume_from_checkpoint latest"):
        assert word in outcome.last_line
    done = lines_of(folder / "metrics.jsonl")
    tried("O2", done - newest_step(folder))
    assert make_trainer(**settings).run(folder, resume=True).code == 0


@pytest.mark.reliability_full("D11")
def test_a_worker_that_is_killed_is_replaced(make_trainer: Callable[..., Trainer], whole: str, tmp_path: Path, tried: Tried) -> None:
    """The run is held in a step while its only decoding process is killed."""
    folder = tmp_path / "run"
    process, end = make_trainer(dataloader_num_workers=1).start(folder, False, Fault("SIGSTOP", "backward", count=2 * 4))
    wait_until(lambda: (folder / "checkpoint-3").exists() and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    os.kill(process.pid, signal.SIGCONT)
    outcome = end()
    assert outcome.code == 0, outcome.errors
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events.count("workers lost") == 1
    assert final_state(folder) == whole
    tried("D11", 0)
    assert leftovers(folder) == []
    assert not worker.is_running()


@pytest.mark.reliability_full("D11")
def test_workers_that_hang_are_given_up(
    rows: list[dict[str, Any]], make_trainer: Callable[..., Trainer], tmp_path: Path, tried: Tried
) -> None:
    """A file never opens: the worker is replaced once, then the run ends, with what was saved and with nobody left behind."""
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i, row in enumerate(rows[:8]):
        for side in (0, 1):
            (data / f"{i}-{side}.png").write_bytes(row[f"jpg_{side}"])
        lines.append({"prompt": row["caption"], "image_0": f"{i}-0.png", "image_1": f"{i}-1.png", "label_0": row["label_0"]})
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = make_trainer(train_data_dir=data, cache_dir=tmp_path / "cache", dataloader_num_workers=1)
    folder = tmp_path / "run"
    process, end = trainer.start(folder, False, Fault("hang", "open", r"5-0\.png"))
    wait_until(lambda: lines_of(folder / "metrics.jsonl") > 0)
    workers = psutil.Process(process.pid).children()
    outcome = end()
    assert outcome.code == 2, outcome.errors
    assert "workers were lost twice at step" in outcome.last_line
    assert '"workers lost"' in (folder / "events.jsonl").read_text()
    assert not any(worker.is_running() for worker in workers)
    tried("D11", 0)


@pytest.mark.reliability_full("N2")
def test_a_huge_learning_rate_ends_the_run_with_good_checkpoints(
    make_trainer: Callable[..., Trainer], tmp_path: Path, tried: Tried
) -> None:
    folder = tmp_path / "run"
    outcome = make_trainer(learning_rate=1e12, lr_scheduler="constant", lr_warmup_steps=0, checkpointing_steps=1).run(folder)
    assert outcome.code == 3, outcome.errors
    assert "Lower learning_rate" in outcome.last_line
    saved = [load_file(path) for path in folder.glob("checkpoint-*/weights.safetensors")]
    assert all(bool(torch.isfinite(x).all()) for named in saved for x in named.values())
    tried("N2", 0)
