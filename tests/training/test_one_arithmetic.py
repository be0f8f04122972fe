"""The gate before any number of speed: on every path that can be switched on, an untouched policy computes what its reference computes.

beta multiplies rounding, so a policy and a reference with other kernels, types or layouts would begin with margins of their own.
And no path waits for the device within an accumulation window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffpref.methods.recipes import RECIPES
from diffpref.training.loop import learn, update
from diffpref.training.objective import build_objective
from diffpref.training.run import Run, prepare_run

Settings = dict[str, Any]

ENABLED: dict[str, Settings] = {
    "lora": {},
    "full": {"tune": "full"},
    "one pair": {"train_batch_size": 1},
    "three pairs": {"train_batch_size": 3},
    "bf16 autocast, lora": {"mixed_precision": "bf16"},
    "bf16 autocast, full": {"mixed_precision": "bf16", "tune": "full"},
    "bf16 weights": {"mixed_precision": "bf16", "base_dtype": "bf16"},
    "recomputed activations, lora": {"gradient_checkpointing": True},
    "recomputed activations, full": {"gradient_checkpointing": True, "tune": "full"},
    "kept latents": {"cache_latents": True},
    "all layers": {"lora_targets": "all"},
    "rank-stabilised": {"use_rslora": True},
    "sdxl": {"family": "sdxl"},
    "sdxl in bf16": {"family": "sdxl", "mixed_precision": "bf16", "gradient_checkpointing": True},
    "8-bit optimizer state is made later": {"optimizer": "adafactor", "tune": "full"},
    "moving average": {"use_ema": True},
    "cheap activations recomputed, lora": {"gradient_checkpointing": "selective"},
    "cheap activations recomputed, full, bf16": {"gradient_checkpointing": "selective", "tune": "full", "mixed_precision": "bf16"},
    "all weights in bf16": {"tune": "full", "base_dtype": "bf16", "mixed_precision": "bf16", "optimizer": "adafactor"},
    "channels last": {"channels_last": True, "tune": "full"},
    "channels last, sdxl in bf16": {"channels_last": True, "family": "sdxl", "mixed_precision": "bf16", "base_dtype": "bf16"},
    "packed weights": {"pack_weights": True},
    "packed weights, all layers, recomputed, sdxl": {
        **{"pack_weights": True, "lora_targets": "all", "gradient_checkpointing": True},
        "family": "sdxl",
    },
    "packed weights, DoRA": {"pack_weights": True, "use_dora": True},
    "DoRA": {"use_dora": True},
    "DoRA, bf16 autocast, all layers": {"use_dora": True, "mixed_precision": "bf16", "lora_targets": "all"},
    "scaled adapters": {"lora_alpha": 7.0, "lora_targets": "all"},
    "buckets, sdxl": {"aspect_ratio_buckets": True, "bucket_step": 8, "family": "sdxl"},
    "buckets, another attention, bf16": {
        **{"aspect_ratio_buckets": True, "bucket_step": 8, "attention": "native_flash", "mixed_precision": "bf16"},
    },
    "another attention, lora": {"attention": "native_math"},
    "another attention, full, recomputed": {"attention": "native_flash", "tune": "full", "gradient_checkpointing": True},
    "another attention, sdxl in bf16": {"attention": "native_flash", "family": "sdxl", "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("case", ENABLED)
def test_the_untouched_policy_is_the_reference(case: str, prepare: Callable[..., Run], sdxl_folder: Path) -> None:
    settings = dict(ENABLED[case])
    if settings.pop("family", None):
        settings["pretrained_model_name_or_path"] = str(sdxl_folder)
    run = prepare("run", beta=5000.0, **settings)
    out = learn(run, next(run.source))
    assert torch.equal(out.per_group, torch.full_like(out.per_group, math.log(2)))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert float(out.metrics[name]) == 0, name
    assert any(p.grad is not None and bool(p.grad.any()) for p in run.trainable.values())  # and yet it learns


class Waits(TorchDispatchMode):
    """Counts the operators that wait for a device: those that bring a value, or a number of elements, to the host."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


WITHOUT_SCORES = [
    name
    for name, recipe in RECIPES.items()
    if recipe.groups in ("pairs", "images") and not (recipe.source or recipe.conditioning or "score" in recipe.settings)
    if name not in ("odpo", "smpo") and recipe.path != "inversion"  # which reads its draws on the host, see test_waits.py
]
LEAN: dict[str, Settings] = {
    "selective, another attention": {"gradient_checkpointing": "selective", "attention": "native_math", "mixed_precision": "bf16"},
    "bf16 weights, channels last": {"tune": "full", "base_dtype": "bf16", "mixed_precision": "bf16", "channels_last": True},
}


@pytest.mark.parametrize("recipe", [*WITHOUT_SCORES, *LEAN])
def test_nothing_waits_for_the_device_within_an_accumulation_window(
    recipe: str, base_settings: Settings, prepare: Callable[..., Run], tmp_path: Path
) -> None:
    config = prepare("plain", gradient_accumulation_steps=3).config
    if recipe in LEAN:
        run = prepare("lean", gradient_accumulation_steps=3, **LEAN[recipe])
    else:
        config = type(config)(**base_settings, method=recipe, output_dir=str(tmp_path / "run"))
        run = prepare_run(config, build_objective(recipe, {}))
    batches = [next(run.source) for _ in range(3)]  # made on the host, ahead of the device
    with Waits() as waits:
        for batch in batches:
            out = learn(run, batch)
            run.log.collect(out.per_group.mean(), out.metrics)
    assert not waits.seen
    with Waits() as waits:  # the counter counts
        update(run, run.log.means()["loss"])
    run.log.close()
    assert waits.seen["_local_scalar_dense"] > 0
