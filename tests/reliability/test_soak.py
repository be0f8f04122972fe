"""Two thousand steps: memory, open files and threads stay where they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate.state import AcceleratorState, GradientState

from diffpref.methods import METHODS
from diffpref.training.config import TrainConfig
from diffpref.training.loop import train
from diffpref.training.objective import Objective
from diffpref.training.run import prepare_run
from diffpref.training.run_log import RunLog

STEPS = int(os.environ.get("SOAK_STEPS", "2000"))


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_nothing_grows(background: bool, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    own = {"max_train_steps": STEPS, "checkpointing_steps": 20, "checkpoints_total_limit": 2, "gradient_accumulation_steps": 1}
    own |= {"output_dir": str(tmp_path / "run"), "save_in_background": background, "dataloader_num_workers": 0}
    run = prepare_run(TrainConfig(**settings | own), Objective(METHODS["diffusion_dpo"]()))
    process, seen = psutil.Process(), []
    write: Callable[..., None] = RunLog.write

    def and_look(self: RunLog, step: int, values: dict[str, float]) -> None:
        write(self, step, values)
        if step % (STEPS // 20) == 0:
            seen.append((process.memory_info().rss, process.num_fds(), threading.active_count()))

    monkeypatch.setattr(RunLog, "write", and_look)
    try:
        train(run)
    finally:
        run.log.close()
    early, late = seen[3:8], seen[-5:]
    growth = max(rss for rss, _, _ in late) - max(rss for rss, _, _ in early)
    print(f"{STEPS} steps: {growth / 1e6:.1f} MB more, {[fds for _, fds, _ in seen]} files, {[n for _, _, n in seen]} threads")
    assert growth < 30e6
    assert max(fds for _, fds, _ in late) <= max(fds for _, fds, _ in early) + 2
    assert max(n for _, _, n in late) <= max(n for _, _, n in early) + 1
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
