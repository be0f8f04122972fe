"""The arithmetic of memory and disk: against the tensors that are counted, and remedies that do what they say."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest
import torch

from diffpref.training.config import TrainConfig
from diffpref.training.memory import (
    OPTIMIZER_BYTES,
    Counts,
    as_flags,
    checkpoint_bytes,
    export_bytes,
    factored_numbers,
    memory_parts,
    num_checkpoints,
    optimizer_bytes,
    remedies,
    words,
)
from diffpref.training.optim import _PACKAGES, new_optimizer
from diffpref.training.settings import build, names_of, parse_flags

SDXL = 2_567_463_684
FULL = Counts(weights=4 * SDXL, unet=4 * SDXL, trained=SDXL, factored=SDXL // 4, adapter=23_224_320)
LORA = Counts(weights=4 * SDXL + 4 * 23_224_320, unet=4 * SDXL, trained=23_224_320, factored=1_000_000, adapter=23_224_320)


def test_full_training_of_sdxl_takes_16_bytes_a_parameter_and_a_copy() -> None:
    parts = memory_parts(TrainConfig(tune="full"), True, FULL, 10**9)
    assert parts == {
        "weights": 4 * SDXL,
        "reference copy": 4 * SDXL,
        "gradients": 4 * SDXL,
        "optimizer": 8 * SDXL,
        "activations": 10**9,
    }
    alone = memory_parts(TrainConfig(tune="full"), False, FULL, 0)
    assert sum(alone.values()) == 16 * SDXL


def test_an_adapter_needs_no_copy() -> None:
    parts = memory_parts(TrainConfig(tune="lora"), True, LORA, 0)
    assert "reference copy" not in parts
    assert parts["gradients"] == 4 * 23_224_320
    assert parts["optimizer"] == 8 * 23_224_320


def test_averages_ranks_and_caches_are_added() -> None:
    before = memory_parts(TrainConfig(tune="full"), True, FULL, 0)
    counts = dataclasses.replace(FULL, num_processes=2, cache=77)
    after = memory_parts(TrainConfig(tune="full", use_ema=True), True, counts, 0)
    assert {name: after[name] for name in after if name not in before} == {
        "gradient buckets": 4 * SDXL,
        "moving average": 4 * SDXL,
        "latent cache": 77,
    }


def test_every_optimizer_of_the_settings_has_its_size() -> None:
    assert set(typing.get_args(typing.get_type_hints(TrainConfig)["optimizer"])) == {*OPTIMIZER_BYTES, "adafactor"}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_8bit", "adamw_4bit", "prodigy", "schedule_free"])
def test_the_state_of_an_optimizer_is_what_is_counted(name: str) -> None:
    if name in _PACKAGES:
        pytest.importorskip(_PACKAGES[name])
    shapes = [(64,), (512, 512), (64, 64, 3, 3), (64, 96, 1, 1)]
    tensors = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = new_optimizer(TrainConfig(optimizer=name), tensors, 1e-5)
    for x in tensors:
        x.grad = torch.ones_like(x)
    optimizer.step()
    held = sum(s.nbytes for x in tensors for s in optimizer.state[x].values() if torch.is_tensor(s) and s.ndim)
    counts = Counts(0, 0, trained=sum(math.prod(s) for s in shapes), factored=factored_numbers(shapes), adapter=0)
    assert optimizer_bytes(name, counts) == pytest.approx(held, rel=0.02)


def test_sizes_on_disk() -> None:
    lora, full = TrainConfig(), TrainConfig(tune="full", use_ema=True)
    assert checkpoint_bytes(lora, LORA) == 12 * LORA.trained
    assert checkpoint_bytes(full, FULL) == 16 * SDXL
    assert export_bytes(full, FULL) == FULL.weights
    assert export_bytes(lora, LORA) == 4 * LORA.trained
    assert export_bytes(dataclasses.replace(lora, merge_lora=True), LORA) == 4 * LORA.trained + LORA.weights


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize(("steps", "every", "first"), [(10, 3, 0), (10, 3, 7), (9, 3, 6), (2, 500, 0), (10, 5, 10)])
def test_number_of_checkpoints(steps: int, every: int, first: int, limit: int | None) -> None:
    written = sum(step % every == 0 or step == steps for step in range(first + 1, steps + 1))
    config = TrainConfig(max_train_steps=steps, checkpointing_steps=every, checkpoints_total_limit=limit)
    assert num_checkpoints(config, first) == (written if limit is None else min(written, limit + 1))


def needs(config: TrainConfig, counts: Counts) -> int:
    """8 GB per pair, a quarter of it with checkpointing, and the state."""
    activations = config.train_batch_size * {"off": 8, "selective": 5, "full": 2}[config.gradient_checkpointing] * 10**9
    return sum(memory_parts(config, True, counts, activations).values())


def advised(config: TrainConfig, counts: Counts, gigabytes: float, on_gpu: bool = True) -> list[dict[str, Any]]:
    """The changes without their sizes; the sizes are checked."""
    found = remedies(config, "bf16", counts, needs, gigabytes * 1e9, on_gpu)
    assert all(size <= gigabytes * 1e9 for _, size in found)
    return [changes for changes, _ in found]


def test_remedies_leave_the_result_alone_as_long_as_they_can() -> None:
    config = TrainConfig(train_batch_size=6, gradient_accumulation_steps=2)
    assert advised(config, LORA, 46) == [{"gradient_checkpointing": "selective"}]
    assert advised(config, LORA, 30) == [{"gradient_checkpointing": "full"}]
    assert advised(dataclasses.replace(config, compile=True), LORA, 46) == [{"gradient_checkpointing": "full"}]
    smaller = {"gradient_checkpointing": "full", "train_batch_size": 2, "gradient_accumulation_steps": 6}
    assert advised(config, LORA, 16) == [smaller]
    frugal = dataclasses.replace(config, gradient_checkpointing=True)
    assert advised(frugal, LORA, 18) == [{"train_batch_size": 3, "gradient_accumulation_steps": 4}]


def test_then_they_change_what_is_trained() -> None:
    config = TrainConfig(tune="full", gradient_checkpointing=True, train_batch_size=2, gradient_accumulation_steps=1)
    smallest = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    half = {"base_dtype": "bf16", "mixed_precision": "bf16", "optimizer": "adafactor"}
    assert advised(config, FULL, 43) == [
        {**smallest, "tune": "lora"},
        {**smallest, "optimizer": "adamw_8bit"},
        {**smallest, "optimizer": "adafactor"},
        {**smallest, **half},
    ]
    assert advised(config, FULL, 43, on_gpu=False) == [
        {**smallest, "tune": "lora"},
        {**smallest, "optimizer": "adafactor"},
        {**smallest, **half},
    ]
    assert advised(config, FULL, 24) == [{**smallest, "tune": "lora"}, {**smallest, **half}]
    assert advised(config, FULL, 14) == [{**smallest, "tune": "lora"}]
    assert advised(config, FULL, 5) == []
    lora = TrainConfig(gradient_checkpointing=True)
    assert advised(lora, LORA, 9) == [{"base_dtype": "bf16", "mixed_precision": "bf16"}]


def test_remedies_that_other_settings_forbid_are_not_named() -> None:
    assert advised(TrainConfig(gradient_checkpointing=True, use_dora=True), LORA, 9) == []


def test_remedies_can_be_typed() -> None:
    changes = {"gradient_checkpointing": "full", "train_batch_size": 3, "gradient_accumulation_steps": 4, "tune": "lora"}
    flags = as_flags(changes)
    assert flags == "--gradient_checkpointing full --train_batch_size 3 --gradient_accumulation_steps 4 --tune lora"
    config = build(TrainConfig, parse_flags(flags.split(), names_of(TrainConfig)))
    assert {name: getattr(config, name) for name in changes} == changes


def test_words() -> None:
    assert (words(41_079_418_944), words(12_300_000), words(6_900)) == ("41.1 GB", "12 MB", "7 kB")
