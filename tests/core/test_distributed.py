"""Batch statistics: alone, and on two processes that must agree with one."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpref.core.distributed import all_max, all_mean, all_sum, world_size

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_process_group() -> None:
    assert world_size() == 1
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert all_sum(x).tolist() == [1, 2]
    assert not all_sum(x).requires_grad
    assert float(all_mean(x.sum(), 2)) == 1.5
    assert all_mean(x, torch.tensor([2.0, 0.0])).tolist() == [0.5, 2.0]
    assert all_mean(torch.zeros(1), 0).tolist() == [0]
    assert all_max(3, torch.device("cpu")) == 3


# Every process holds its rows of one batch of KTO, and inverts pairs with its own timesteps.
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from diffpref.core.distributed import all_max, all_mean, world_size
from diffpref.core.noisy_labels import updated_reliability
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, Evaluation, PathStep, PreferenceBatch
from diffpref.methods.diffusion_kto import DiffusionKTO
from diffpref.paths.inversion import DdimInversion
from diffpref.training.launcher import leave_processes

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
errors = torch.linspace(0.01, 0.2, 8, dtype=torch.float64).reshape(8, 1)
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
found = {"world": world_size(), "average": float(all_mean(errors[mine].sum(), 8 // world)), "max": all_max(rank, torch.device("cpu"))}
for point in ("mean", "class_means"):
    leaf = errors[mine].clone().requires_grad_()
    prediction = leaf.sqrt().reshape(-1, 1, 1, 1, 1)
    reference = (0.7 * errors[mine].flip(0) + 0.05 * rank + 0.06).sqrt().reshape(-1, 1, 1, 1, 1) if world > 1 else None
    if reference is None:
        reference = torch.cat([0.7 * errors[:4].flip(0) + 0.06, 0.7 * errors[4:].flip(0) + 0.11]).sqrt().reshape(-1, 1, 1, 1, 1)
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.float64)[mine, None]
    step = PathStep(0 * prediction.detach(), labels.long(), 0 * prediction.detach(), torch.ones_like(labels))
    batch = PreferenceBatch(step.x_t, Conditioning(step.x_t), labels, ("a",) * len(labels), (0,) * len(labels))
    out = DiffusionKTO(beta=40, reference_point=point).loss(batch, [Evaluation(step, prediction, reference)])
    out.per_group.mean().backward()
    found[point] = [out.per_group.tolist(), (leaf.grad / world).flatten().tolist(), float(out.metrics["diffusion_kto/reference_point"])]
annotators = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0])[mine]
start = torch.full((4,), 0.9, dtype=torch.float64)
found["reliability"] = updated_reliability(start, errors[mine, 0], annotators, decay=0.5, floor=0).tolist()
forwards = []
def network(x, t, c):
    forwards.append(t.numel())
    return 0 * x
process = DdpmProcess.from_betas(torch.linspace(0.03, 0.11, 1000, dtype=torch.float64) ** 2)
latents = torch.zeros(2, 2, 1, 2, 2)
batch = PreferenceBatch(latents, Conditioning(latents), torch.ones(2, 2), ("a", "b"), (0, 0))
DdimInversion(equal_forwards=True).invert(network, process, latents, [30, 180 + 500 * rank], batch.cond, batch.random(0))
found["forwards"] = forwards
print(json.dumps(found))
leave_processes(0)
"""


def run(world: int, store: Path) -> list[dict[str, Any]]:
    """What every process found."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    started = [
        subprocess.Popen([*command, str(rank), str(world), str(store)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    (alone,), both = run(1, tmp_path / "none"), run(2, tmp_path / "store")
    assert [found["world"] for found in (alone, *both)] == [1, 2, 2]
    assert [found["max"] for found in both] == [1, 1]
    for found in both:
        assert found["average"] == pytest.approx(alone["average"], rel=1e-12)
        assert found["reliability"] == pytest.approx(alone["reliability"], rel=1e-12)
    for point in ("mean", "class_means"):
        for i in (0, 1):  # losses and gradients of the mean loss
            joined = [x for found in both for x in found[point][i]]
            assert joined == pytest.approx(alone[point][i], rel=1e-12)
        assert [found[point][2] for found in both] == pytest.approx([alone[point][2]] * 2, rel=1e-12)
    assert alone["average"] > 0.1
    assert both[0]["forwards"] == [4, 4, 2, 2, 2, 2, 2, 2]  # the last five for nothing
    assert both[1]["forwards"] == [4, 4, 2, 2, 2, 2, 2, 2]
