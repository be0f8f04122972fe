"""Where Inversion-DPO's targets lead on the testbed: towards what the chosen picture shows, if the reference is told where its input is."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn.functional import cosine_similarity

from diffpref.locations import asset
from diffpref.methods.inversion_dpo import InversionDPO
from diffpref.paths.trajectory import InversionTrajectory
from diffpref.training.config import TrainConfig
from diffpref.training.objective import Objective
from diffpref.training.run import Run, prepare_run

NODES = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An untrained run on sixteen pairs of the testbed."""
    config = TrainConfig(
        pretrained_model_name_or_path=str(asset("testbed", "pipeline")),
        train_data_dir=str(asset("testbed", "pairs")),
        split="own",
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_train_samples=16,
        train_batch_size=16,
        max_train_steps=1,
        no_hflip=True,
        proportion_empty_prompts=0.0,
        preflight="off",
    )
    made = prepare_run(config, Objective(InversionDPO(), InversionTrajectory(num_steps=NODES, guidance_scale=1.0)))
    made.log.close()
    return made


@pytest.mark.parametrize(("told", "sign"), [("source", 1), ("destination", -1)])
def test_targets_lead_to_the_picture_that_they_belong_to(told: Literal["source", "destination"], sign: int, run: Run) -> None:
    """The clean picture that a target implies, less the one that the reference sees, along this picture less the other of its pair."""
    batch, reference = next(run.source), run.reference
    assert reference is not None
    path = InversionTrajectory(num_steps=NODES, guidance_scale=1.0, network_timestep=told)
    along = batch.latents - batch.latents.flip(1)
    with torch.no_grad():
        for step in path(batch, run.process, batch.random(0), None, reference)[2:]:
            seen, implied = (
                run.process.x_0(step.x_t, x, step.timesteps) for x in (reference(step.x_t, step.timesteps, batch.cond), step.target)
            )
            assert sign * float(cosine_similarity((implied - seen).flatten(2), along.flatten(2), dim=2).mean()) > 0.05
