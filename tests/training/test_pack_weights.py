"""A run with packed weights is the run, resumes bit for bit, is counted beforehand, and is refused where it cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.models import packed
from diffpref.models.packed import PackedConv2d, PackedLinear, packable_bytes
from diffpref.training.config import TrainConfig
from diffpref.training.memory import PACKED, Counts, as_flags, memory_parts, remedies
from diffpref.training.objective import build_objective
from diffpref.training.run import Run

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a build of torch without MKL")
Go = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's matrices are far smaller than those that are worth it."""
    monkeypatch.setattr(packed, "LEAST", 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recipe": "inpo", "lora_targets": "all"},
        {"validation_steps": 1, "held_out_pairs": 2},
        {"train_text_encoder": True, "use_ema": True, "gradient_checkpointing": True},
    ],
    ids=["dpo", "inpo", "validated", "text encoder"],
)
def test_a_packed_run_is_the_run_and_resumes(
    settings: dict[str, Any],
    run_training: Go,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    read_state: Callable[[Path, int], dict[str, Tensor]],
) -> None:
    recipe = settings.get("recipe")
    objective = build_objective(recipe, {}) if recipe else None
    settings = {name: x for name, x in settings.items() if name != "recipe"}
    settings = {**settings, "max_train_steps": 3, "learning_rate": 1e-3, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    plain = run_training("plain", objective, **settings)
    whole = run_training("whole", objective, **settings, pack_weights=True)
    rows = [[row for row in read_metrics(folder) if "loss" in row] for folder in (plain, whole)]
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "error/policy_chosen", "rewards/margins"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    run_training("parts", objective, **{**settings, "max_train_steps": 2}, pack_weights=True)
    parts = run_training("parts", objective, **settings, pack_weights=True, resume_from_checkpoint="latest")
    expected, found = read_state(whole, 3), read_state(parts, 3)
    assert found.keys() == expected.keys() == read_state(plain, 3).keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    run_training("parts", objective, **{**settings, "max_train_steps": 4}, resume_from_checkpoint="latest")  # and goes on without


def test_frozen_layers_are_packed_and_counted(prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpref.training.run_costs.PLENTY", 10**9)  # count, however small it is
    run = prepare("run", pack_weights=True, lora_targets="all")
    network = run.backbone.denoiser
    assert any(isinstance(layer, PackedConv2d) for layer in network.modules())
    assert any(isinstance(layer, PackedLinear) for layer in network.modules())
    assert run.preflight.found["memory"]["packed weights"] == PACKED * packable_bytes(network) > 0


def test_the_preflight_advises_against_it_first() -> None:
    config = TrainConfig(pack_weights=True)
    counts = Counts(weights=4 * 10**9, unet=3 * 10**9, trained=10**6, factored=10**5, adapter=10**6, packed=3 * 10**9)

    def needs(config: TrainConfig, counts: Counts) -> int:
        return sum(memory_parts(config, True, counts, 10**9).values())

    assert needs(config, counts) - needs(dataclasses.replace(config, pack_weights=False), counts) == PACKED * 3 * 10**9
    (found,) = remedies(config, "no", counts, needs, 6e9, on_gpu=False)
    assert found[0] == {"pack_weights": False}
    assert as_flags(found[0]) == "--pack_weights false"
    lowest = remedies(config, "no", counts, needs, 4.5e9, on_gpu=False)
    assert [changes["pack_weights"] for changes, _ in lowest] == [False]  # and something else


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune": "full"}, "pack_weights is true together with tune full; .* use tune lora, or leave pack_weights out"),
        ({"base_dtype": "bf16"}, "together with base_dtype bf16"),
        ({"compile": True}, "together with compile True; .* use compile false"),
        ({"shard": "weights"}, "together with shard weights"),
        ({"aspect_ratio_buckets": True}, "together with aspect_ratio_buckets True"),
        ({"channels_last": True}, "together with channels_last True; .* use channels_last false"),
        ({"gradient_checkpointing": "selective"}, "gradient_checkpointing is selective together with pack_weights"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings, pack_weights=True)


def test_half_precision_is_refused(prepare: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="pack_weights is true on cpu with mixed_precision bf16"):
        prepare("run", pack_weights=True, mixed_precision="bf16")


def test_a_build_of_torch_without_the_kernels_is_refused(prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no oneDNN or MKL kernels; leave it out"):
        prepare("run", pack_weights=True)
