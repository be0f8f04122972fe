"""Compiled blocks: policy and reference are one graph, weights keep their names, and a run trains and resumes as one without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from diffpref.models.execution import REGIONS, eager
from diffpref.training.config import TrainConfig
from diffpref.training.loop import learn
from diffpref.training.run import Run

COMPILED: dict[str, Any] = {"compile": True, "compile_backend": "aot_eager"}
Go = Callable[..., Path]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_policy_and_reference_are_one_graph_per_kind_of_block(tune: str, prepare: Callable[..., Run]) -> None:
    """The gate of test_one_arithmetic.py, for compiled blocks."""
    run = prepare("run", **COMPILED, tune=tune, beta=5000.0, mixed_precision="bf16")
    denoiser = run.backbone.denoiser
    blocks = [m for m in denoiser.modules() if type(m).__name__ in REGIONS]
    kinds = set()

    def note(block: Any, given: Any, out: Tensor) -> None:  # before the first adapter nothing is recorded, which is a graph of its own
        kinds.add((type(block), given[0].shape, out.shape, given[0].requires_grad))

    hooks = [m.register_forward_hook(note) for m in blocks]
    batch = next(run.source)
    with eager(denoiser):
        run.policy(batch.latents, torch.zeros(batch.group_shape, dtype=torch.int64), batch.cond)
    for hook in hooks:
        hook.remove()
    assert not counters["stats"]
    out = learn(run, batch)
    assert torch.equal(out.per_group, torch.full_like(out.per_group, math.log(2)))
    assert all(float(out.metrics[f"rewards/{name}"]) == 0 for name in ("chosen", "rejected", "margins"))
    assert counters["stats"]["unique_graphs"] == len(kinds) <= len(blocks)
    assert not counters["graph_break"]
    learn(run, next(run.source))
    with torch.no_grad():  # as in validation
        run.policy(batch.latents, torch.zeros(batch.group_shape, dtype=torch.int64), batch.cond)
    assert counters["stats"]["unique_graphs"] == len(kinds)
    assert not any("_orig_mod" in name for name in [*denoiser.state_dict(), *run.trainable])


@pytest.mark.parametrize(
    "settings",
    [{"tune": "full"}, pytest.param({"tune": "lora", "gradient_checkpointing": "full"}, marks=pytest.mark.slow)],
    ids=["full", "lora"],
)
def test_a_compiled_run_is_the_run_and_resumes(
    settings: dict[str, Any],
    run_training: Go,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    read_state: Callable[[Path, int], dict[str, Tensor]],
) -> None:
    settings = {**settings, "max_train_steps": 3, "learning_rate": 1e-3}
    plain = read_metrics(run_training("plain", **settings))
    whole = run_training("whole", **settings, **COMPILED)
    for a, b in zip(plain, read_metrics(whole), strict=True):
        for name in ("loss", "grad_norm", "error/policy_chosen", "error/reference_chosen", "rewards/margins"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    run_training("parts", **{**settings, "max_train_steps": 2}, **COMPILED)
    parts = run_training("parts", **settings, **COMPILED, resume_from_checkpoint="latest")
    expected, found = read_state(whole, 3), read_state(parts, 3)
    assert found.keys() == expected.keys() == read_state(whole.with_name("plain"), 3).keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ValueError, match="compile_backend is 'eager', but nothing is compiled"):
        TrainConfig(compile_backend="eager")
    with pytest.raises(ValueError, match="gradient_checkpointing is selective together with compile"):
        TrainConfig(compile=True, gradient_checkpointing="selective")
    with pytest.raises(ValueError, match="use_dora is true together with compile"):
        TrainConfig(compile=True, use_dora=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_inductor_gives_the_untouched_policy_its_reference(tune: str, precision: str, prepare: Callable[..., Run]) -> None:
    run = prepare("run", compile=True, tune=tune, mixed_precision=precision, beta=5000.0)
    out = learn(run, next(run.source))
    assert torch.equal(out.per_group, torch.full_like(out.per_group, math.log(2)))
    assert float(out.metrics["rewards/margins"]) == 0
