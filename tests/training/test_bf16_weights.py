"""All weights trained in bf16: rounding that loses nothing on average, optimizers with float32 moments, and a run from start to export."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpref.training.config import TrainConfig
from diffpref.training.export import export
from diffpref.training.loop import train
from diffpref.training.optim import new_optimizer
from diffpref.training.optimizers import Rounding, adamw, rounded
from diffpref.training.run import Run

BF16: dict[str, Any] = {"tune": "full", "base_dtype": "bf16", "mixed_precision": "bf16"}


def test_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.full((40_000,), 1 + 1 / 512)  # a quarter of the way from 1 to the next number, 1 + 1/128
    found = rounded(x, draw).float()
    assert set(found.tolist()) == {1.0, 1 + 1 / 128}
    assert float(found.mean()) == pytest.approx(1 + 1 / 512, abs=4 * 0.0034 / 200)  # four standard errors
    assert float(rounded(-x, draw).float().mean()) == pytest.approx(-1 - 1 / 512, abs=4 * 0.0034 / 200)
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, 1e30]).bfloat16()
    assert torch.equal(rounded(exact.float(), draw), exact)
    strange = rounded(torch.tensor([math.inf, -math.inf, math.nan]), draw)
    assert strange[:2].tolist() == [math.inf, -math.inf]
    assert bool(strange[2].isnan())


def test_adamw_is_torchs_with_float32_weights() -> None:
    ours, theirs = (nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizers = Rounding([ours], adamw, 0, **options), torch.optim.AdamW([theirs], **options)
    for _ in range(4):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_small_updates_are_not_lost(name: Any) -> None:
    """200 steps of 1e-4 on weights of 1, whose neighbours in bf16 are 0.0039 and 0.0078 away."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    config = TrainConfig(**BF16, optimizer=name, adam_weight_decay=0.0)
    optimizer = new_optimizer(config, [weight], 1e-4)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert {x.dtype for x in optimizer.state[weight].values() if torch.is_tensor(x)} == {torch.float32}
    assert float(weight.float().mean()) == pytest.approx(1 - 200e-4, abs=2e-3)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(200):
        nearest -= 1e-4
    assert float(nearest) == 1


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_run_resumes_bit_for_bit(
    optimizer: str, run_training: Callable[..., Path], read_state: Callable[[Path, int], dict[str, Tensor]]
) -> None:
    settings = {**BF16, "optimizer": optimizer, "learning_rate": 1e-4}
    whole = read_state(run_training("whole", **settings, max_train_steps=3), 3)
    run_training("parts", **settings, max_train_steps=2)
    parts = read_state(run_training("parts", **settings, max_train_steps=3, resume_from_checkpoint="latest"), 3)
    assert {x.dtype for name, x in whole.items() if name.startswith("weights/")} == {torch.bfloat16}
    assert whole.keys() == parts.keys()
    assert [name for name, x in whole.items() if not torch.equal(x, parts[name])] == []


def test_it_starts_at_log_two_and_exports_a_pipeline(
    prepare: Callable[..., Run], read_metrics: Callable[[Path], list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare("run", **BF16, optimizer="adafactor", max_train_steps=2, beta=5000.0, validation_steps=2, validation_prompts=("a",))
    assert "weights are kept in bf16 and rounded stochastically" in capsys.readouterr().err
    train(run)
    first, second = read_metrics(run.folder)[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 != second["rewards/margins"]
    export(run.backbone.pipeline, run.folder, "full", merge_lora=False)
    plain = DiffusionPipeline.from_pretrained(run.folder, torch_dtype=torch.bfloat16)
    for name, x in plain.unet.state_dict().items():
        assert torch.equal(x, run.trainable[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_dtype": "fp16", "mixed_precision": "fp16"}, "updates are lost in fp16; use base_dtype bf16"),
        ({"optimizer": "prodigy"}, "optimizer prodigy rounds to the nearest; use adafactor or adamw"),
        ({"use_ema": True}, "use_ema is True, whose small moves are lost"),
        ({"reference_update_steps": 2, "reference_decay": 0.9}, "reference_decay is 0.9, whose small moves are lost"),
    ],
)
def test_what_would_lose_updates_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**BF16, **settings})
