"""The gates of the CPU benchmark stop it, and so leave no numbers behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import fixture
import parity
import pytest
import torch
from bench_cpu import reference_gate
from parity import check, our_run, replay


def run_with(folder: Path, *losses: float) -> Path:
    """A run's folder with these logged losses."""
    folder.mkdir()
    lines = [{"step": 0, "eval/implicit_accuracy": 0.5}, *({"step": i + 1, "loss": x} for i, x in enumerate(losses))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_that_does_not_start_as_its_reference_has_no_speed(tmp_path: Path) -> None:
    in_float32 = float(torch.tensor(math.log(2)))
    assert reference_gate(run_with(tmp_path / "equal", in_float32, 0.5))["passed"]
    for name, losses, said in (("other", (0.6930, 0.5), "the first loss of other is 0.693, not log 2"), ("none", (), "is missing")):
        with pytest.raises(SystemExit, match=said):
            reference_gate(run_with(tmp_path / name, *losses))


def test_a_peer_that_computes_something_else_fails_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.make(tmp_path, "tiny", pairs=4, side=128)
    run = our_run(tmp_path, rank=4, learning_rate=5e-4)
    unet, draws = run.backbone.pipeline.unet, torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    shapes = {"x_t": (2, 4, 16, 16), "target": (2, 4, 16, 16), "embeds": (2, 77, unet.config.cross_attention_dim), "pooled": (2, pooled)}
    step = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    step |= {"t": torch.tensor([500, 500]), "time_ids": torch.full((2, 6), 128.0)}
    trace = {"before": {name: p.detach().clone() for name, p in run.trainable.items()}, "steps": [step, step]}
    trace |= replay(run, trace)
    run.log.close()
    other = {name: 1.001 * x for name, x in trace["gradients"].items()}
    for change, passed in (({}, True), ({"gradients": other}, False), ({"losses": [trace["losses"][0] + 1e-5, trace["losses"][1]]}, False)):
        shutil.rmtree(tmp_path / "runs")
        torch.save(trace | change, tmp_path / "trace.pt")
        assert check(tmp_path / "trace.pt", tmp_path, rank=4, learning_rate=5e-4)["passed"] == passed
    monkeypatch.setattr(parity, "FROM_FLOAT64", 0.0)
    torch.save(trace, tmp_path / "trace.pt")
    found = check(tmp_path / "trace.pt", tmp_path, rank=4, learning_rate=5e-4)
    assert not found["passed"]
    assert 0 < found["packed"]["gradient_from_float64"] < 1e-3
