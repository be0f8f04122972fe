"""A training script that is not ours, with the usual weaknesses: it writes checkpoints in place, trusts them, and knows no signals."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--every", type=int, required=True)
parser.add_argument("--continue", dest="resume", action="store_true")
given = parser.parse_args()

torch.set_num_threads(1)
weight, first = torch.zeros(1000, requires_grad=True), 0
given.out.mkdir(parents=True, exist_ok=True)
saved = sorted(given.out.glob("state-*"), key=lambda path: int(path.name.split("-")[1]))
if given.resume and saved:
    with (saved[-1] / "weight.pt").open("rb") as file:
        state = torch.load(file, weights_only=True)
    weight, first = state["weight"].requires_grad_(), state["step"]
for step in range(first, given.steps):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(step))
    loss = ((weight - x) ** 2).sum()
    loss.backward()
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    weight.grad = None
    if (step + 1) % given.every == 0:
        folder = given.out / f"state-{step + 1}"
        folder.mkdir(exist_ok=True)
        (folder / "about.txt").write_text(f"step {step + 1}")
        with (folder / "weight.pt").open("wb") as file:
            torch.save({"weight": weight.detach(), "step": step + 1}, file)
(given.out / "result.bin").write_bytes(weight.detach().numpy().tobytes())
