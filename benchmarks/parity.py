"""The gate before any number of speed: fed with a peer's own inputs, our step has to compute what the peer computed.

A trace holds the inputs of some steps of a peer's script (under_clock.py --trace). Our step is the loop's own: objective, backward,
clipping, optimizer, with the network in training mode as the peer has it. (Ours trains in evaluation mode: dropout of probability 0 only
changes layouts, and so rounding.) Losses, first gradients and final weights are compared; the first loss has to be log 2, because the
policy is then its reference.

Frozen weights that are packed (docs/speed.md) round in another way. The gradients of the two pictures of a pair nearly cancel, so that
rounding shows: there the first gradient has to be as near to the one in float64 as the peer's is.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from diffpref.core.types import Conditioning, PathStep, PreferenceBatch
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.paths.recorded import Recorded
from diffpref.training.config import TrainConfig
from diffpref.training.loop import learn, update
from diffpref.training.objective import Objective
from diffpref.training.run import Run, prepare_run

LOSS, GRADIENT = 1e-6, 1e-5
"""Largest difference of the first loss, and relative difference of the first gradient."""
FROM_FLOAT64 = 1.5
"""The first gradient with packed weights may be this many times as far from the one in float64 as the peer's is."""


def recorded_batch(step: dict[str, torch.Tensor], number: int) -> PreferenceBatch:
    """One pair as the peer saw it: its pictures follow each other, the better one first."""
    pair = {name: x[None] for name, x in step.items()}
    place = PathStep(pair["x_t"], pair["t"], pair["target"], torch.ones(1, 2))
    return PreferenceBatch(
        latents=pair["x_t"],
        cond=Conditioning(prompt_embeds=pair["embeds"], pooled_prompt_embeds=pair["pooled"], time_ids=pair["time_ids"]),
        relevance=torch.tensor([[1.0, 0.0]]),
        pair_ids=(str(number),),
        visits=(0,),
        steps=(place,),
    )


def replay(run: Run, trace: dict[str, Any]) -> dict[str, Any]:
    """Our losses, first gradients and final weights on the recorded steps."""
    with torch.no_grad():
        for name, p in run.trainable.items():
            p.copy_(trace["before"][name])
    losses, gradients = [], {}
    for number, step in enumerate(trace["steps"]):
        out = learn(run, recorded_batch(step, number))
        losses.append(float(out.per_group.mean()))
        if number == 0:
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in run.trainable.values() if p.grad is not None]))
            scale = min(1.0, run.config.max_grad_norm / (float(norm) + 1e-6))  # the peer's were recorded after clipping
            gradients = {name: p.grad * scale for name, p in run.trainable.items() if p.grad is not None}
        update(run, losses[-1])
    return {"losses": losses, "gradients": gradients, "after": {name: p.detach() for name, p in run.trainable.items()}}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of b, all tensors together."""
    apart = math.sqrt(sum(float((a[name] - x).double().square().sum()) for name, x in b.items()))
    return apart / math.sqrt(sum(float(x.double().square().sum()) for x in b.values()))


def our_run(folder: Path, rank: int, learning_rate: float, pack_weights: bool = False) -> Run:
    """Ours with the peer's settings, on steps that are given to it."""
    shutil.rmtree(folder / "runs" / "parity", ignore_errors=True)
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder / "model"),
        train_data_dir=str(folder / "pickapic"),
        cache_dir=str(folder / "tables"),
        output_dir=str(folder / "runs" / "parity"),
        resolution=128,
        rank=rank,
        learning_rate=learning_rate,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        gradient_accumulation_steps=1,
        max_train_steps=1000,
        check_images=False,
        mixed_precision="no",
        preflight="off",
        pack_weights=pack_weights,
    )
    run = prepare_run(config, Objective(DiffusionDPO(beta=5000)))
    run.objective = dataclasses.replace(run.objective, path=Recorded())
    run.backbone.denoiser.train()
    return run


def doubled(x: torch.Tensor) -> torch.Tensor:
    """In float64 if it is a real number."""
    return x.double() if x.is_floating_point() else x


def packed(trace: dict[str, Any], folder: Path, rank: int, learning_rate: float) -> dict[str, Any]:
    """The first step with packed weights and the peer's, beside the same step in float64, and whether ours is as near to it."""
    first = trace | {"steps": trace["steps"][:1]}
    exact = our_run(folder, rank, learning_rate)
    exact.backbone.denoiser.double()
    truth = replay(exact, first | {"steps": [{name: doubled(x) for name, x in step.items()} for step in first["steps"]]})["gradients"]
    exact.log.close()
    run = our_run(folder, rank, learning_rate, pack_weights=True)
    own = replay(run, first)
    run.log.close()
    far, peer = (relative({name: x.double() for name, x in g.items()}, truth) for g in (own["gradients"], trace["gradients"]))
    is_reference = torch.tensor(own["losses"][0]) == torch.tensor(math.log(2))
    passed = bool(is_reference) and far <= FROM_FLOAT64 * peer
    return {"first_loss": own["losses"][0], "gradient_from_float64": far, "peers_from_float64": peer, "passed": passed}


def check(path: Path, folder: Path, rank: int, learning_rate: float) -> dict[str, Any]:
    """Facts of the comparison and whether the gate is passed. Raises ValueError when the two train other tensors."""
    trace = torch.load(path, weights_only=True)
    run = our_run(folder, rank, learning_rate)
    if run.trainable.keys() != trace["before"].keys():
        raise ValueError(f"the peer trains {len(trace['before'])} tensors and we {len(run.trainable)}, not the same ones")
    try:
        own = replay(run, trace)
    finally:
        run.log.close()
    apart = [abs(a - b) for a, b in zip(own["losses"], trace["losses"], strict=True)]
    found = {
        "steps": len(apart),
        "first_loss": own["losses"][0],
        "first_loss_apart": apart[0],
        "largest_loss_apart": max(apart),
        "first_gradient_apart": relative(own["gradients"], trace["gradients"]),
        "weights_apart": relative(own["after"], trace["after"]),
        "identical_losses": own["losses"] == trace["losses"],
    }
    is_reference = torch.tensor(found["first_loss"]) == torch.tensor(math.log(2))  # in float32
    found["packed"] = packed(trace, folder, rank, learning_rate)
    same = apart[0] <= LOSS and found["first_gradient_apart"] <= GRADIENT
    found["passed"] = bool(is_reference) and same and found["packed"]["passed"]
    return found
