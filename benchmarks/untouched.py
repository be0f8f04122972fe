"""An untouched policy against its reference, pair by pair: the gate before numbers of speed, and the test of a path on a card.

    python benchmarks/untouched.py --batches 3 --method diffusion_dpo --pretrained_model_name_or_path ... (any setting of a run)

The run is prepared as for training, and learns from some batches without an update: in all of them the loss of every pair has to be
ln 2. Prints, as JSON, the logits that the losses stand for (means over a batch would not do: signs cancel), and as notes what the machine
cannot do and another kernel did.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import torch
from torch import Tensor

from diffpref.cli import _train_settings
from diffpref.training.config import TrainConfig
from diffpref.training.loop import learn, next_batch
from diffpref.training.run import Run, prepare_run
from diffpref.training.settings import build, names_of, split_flags

LIMIT = 0.01
"""Largest logit of an untouched policy; on a GPU kernels may differ with the shape of a batch."""


def logits(losses: Tensor) -> Tensor:
    """z of losses -log sigmoid(z)."""
    return -torch.log(torch.expm1(losses.double()))


def first_losses(run: Run, batches: int) -> Tensor:
    """Losses of the pairs of the first batches, float32, without an update between them."""
    return torch.cat([learn(run, next_batch(run, 0, 0)).per_group.float() for _ in range(batches)])


def judged(losses: Tensor) -> dict[str, Any]:
    """What is kept of the losses, and whether the policy answers as its reference."""
    found = logits(losses)
    largest = float(found.abs().max())
    rms = float(found.square().mean().sqrt())
    return {"pairs": len(found), "largest_logit": largest, "rms_logit": rms, "passed": largest < LIMIT}


def main(argv: list[str]) -> None:
    """Print the result as the last line."""
    own, rest = split_flags(argv, ("batches",))
    settings = _train_settings(rest)
    assert settings is not None
    given, objective, _ = settings
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run = prepare_run(build(TrainConfig, {name: x for name, x in given.items() if name in names_of(TrainConfig)}), objective)
    notes = [line for line in said.getvalue().splitlines() if "in its place" in line]  # a path that is not the one that was asked for
    try:
        losses = first_losses(run, int(own[1]) if own else 1)
    finally:
        run.log.close()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    print(json.dumps(judged(losses.cpu()) | {"peak_bytes": peak, "notes": notes}))


if __name__ == "__main__":
    main(sys.argv[1:])
