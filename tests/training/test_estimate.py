"""Counts of the real models: equal to those of the plan, and the memory presets below their limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffpref.training.config import TrainConfig
from diffpref.training.estimate import estimate
from diffpref.training.memory import memory_parts
from diffpref.training.objective import build_objective
from diffpref.training.run_costs import RunCosts
from diffpref.training.settings import build, names_of, read_yaml

PRESETS = sorted((Path(__file__).resolve().parents[2] / "configs" / "sdxl" / "memory").glob("*.yaml"))
HALF: dict[str, Any] = {"base_dtype": "bf16", "mixed_precision": "bf16", "rank": 8, "gradient_accumulation_steps": 1}


def counted(family: str, resolution: int, tune: str, recompute: str, on_gpu: bool = False) -> tuple[float, float, float]:
    """(TFLOP forward, TFLOP forward and backward, GB kept for the backward pass) per picture, bf16 everywhere."""
    config = TrainConfig(tune=tune, resolution=resolution, gradient_checkpointing=recompute, optimizer="adafactor", **HALF)  # type: ignore[arg-type]
    costs = estimate(config, build_objective("diffusion_dpo", {}), family)
    costs.on_gpu = on_gpu  # normalisation in bf16, as the plan counts it
    step = costs.step(config)
    return step.forward_flops / 2e12, step.flops / 2e12, step.kept / 2e9


# Counted independently of this code, from the same public configurations: matrix products, convolutions and attention, two FLOPs per
# multiply-add; bytes of distinct saved tensors.
PLAN = {
    ("sd15", 512, "full", "off"): (0.803, 2.407, 0.94),
    ("sd15", 512, "full", "full"): (0.803, 3.002, 0.15),
    ("sd15", 512, "lora", "off"): (0.803, 1.718, None),
    ("sdxl", 1024, "full", "off"): (6.761, 20.231, 6.89),
    ("sdxl", 1024, "full", "full"): (6.761, 25.443, 0.59),
    ("sdxl", 1024, "lora", "off"): (6.761, 14.126, 5.60),
    ("sdxl", 1024, "lora", "full"): (6.761, 19.253, 0.49),
}
CASES = [pytest.param(case, marks=[pytest.mark.slow] if case[0] == "sdxl" else []) for case in PLAN]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_and_kept_bytes_are_those_of_the_plan(case: tuple[str, int, str, str]) -> None:
    forward, both, kept = counted(*case)
    expected_forward, expected_both, expected_kept = PLAN[case]
    lora = 1.006 if case[2] == "lora" else 1.0005  # the plan's forward pass is without adapter
    assert expected_forward / 1.0005 < forward < expected_forward * lora
    assert both == pytest.approx(expected_both, rel=2e-3)
    if expected_kept is not None:
        assert kept == pytest.approx(expected_kept, rel=0.06)


def preset(path: Path) -> tuple[TrainConfig, RunCosts, float]:
    """The settings of a file, their costs and the limit in GB that its name says."""
    settings = read_yaml(path, [*names_of(TrainConfig), "beta"])
    config = build(TrainConfig, {name: x for name, x in settings.items() if name != "beta"})
    limit = re.search(r"_(\d+)gb$", path.stem)
    assert limit is not None
    return config, estimate(config, build_objective(config.method, {"beta": settings["beta"]}), "sdxl"), float(limit[1])


def test_there_are_presets_for_lora_and_for_all_weights() -> None:
    assert [path.stem for path in PRESETS] == ["full_24gb", "full_40gb", "lora_12gb", "lora_16gb"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_preset_holds_besides_activations_leaves_them_room(path: Path) -> None:
    config, costs, limit = preset(path)
    assert config.tune == path.stem.partition("_")[0]
    head = path.read_text()
    assert f"--config configs/sdxl/memory/{path.name}" in head
    per_update = config.train_batch_size * config.gradient_accumulation_steps
    assert f"{per_update} pairs per update, effective learning rate {config.learning_rate:g}." in head
    rest = sum(memory_parts(config, True, costs.counts, 0).values())
    assert rest < 1e9 * limit - 2.7e9  # of which encoding one picture of 1024 pixels takes most


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_stays_below_its_limit(path: Path) -> None:
    _, costs, limit = preset(path)
    needed = sum(costs.parts().values()) / 1e9
    told = re.search(r"^# Memory: ([\d.]+) GB by the count", path.read_text(), re.MULTILINE)
    assert told is not None
    assert needed == pytest.approx(float(told[1]), abs=0.06)
    assert needed < 0.93 * limit
