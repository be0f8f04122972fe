"""What a training step of SD1.5 or SDXL takes, counted without weights and without a GPU: memory, FLOPs and kernels.

    python benchmarks/step_counts.py --config configs/sdxl/memory/lora_12gb.yaml
    python benchmarks/step_counts.py --family sd15 --tune full --resolution 512 --base_dtype bf16 --mixed_precision bf16

Takes any setting of `diffpref train`. The numbers are those of the preflight on a GPU; the last line is the same as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from diffpref.models.configs import FAMILIES
from diffpref.training.config import TrainConfig
from diffpref.training.estimate import estimate
from diffpref.training.memory import words
from diffpref.training.objective import all_names, build_objective
from diffpref.training.settings import build, names_of, parse_flags, read_yaml


def counts(settings: dict[str, Any], family: str) -> dict[str, Any]:
    """Bytes by part, and what one micro-batch computes. Raises ValueError for another family than sd15 and sdxl."""
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; accepted: {', '.join(FAMILIES)}")
    config = build(TrainConfig, {name: x for name, x in settings.items() if name in names_of(TrainConfig)})
    costs = estimate(config, build_objective(config.method, settings), family)
    step, parts = costs.step(config), costs.parts()
    return {
        "memory": parts,
        "bytes": sum(parts.values()),
        "kept_for_backward": step.kept,
        "tflop_per_pair": costs.flops_per_pair / 1e12,
        "kernels_per_micro_batch": costs.kernels,
    }


def main(argv: list[str]) -> int:
    """Count and print; the exit code."""
    known = ["config", "family", *names_of(TrainConfig), *all_names()]
    flags = parse_flags(argv, known)
    path = flags.pop("config", None)
    settings = (read_yaml(str(path), known) if path else {}) | flags
    family = str(settings.pop("family", "sd15" if "sd15" in str(path) else "sdxl"))
    found = counts(settings, family)
    for name, size in sorted(found["memory"].items(), key=lambda part: -part[1]):
        print(f"{name:<20}{words(size):>10}")
    print(f"{'together':<20}{words(found['bytes']):>10}")
    print(f"kept from forward to backward pass: {words(found['kept_for_backward'])}")
    print(f"{found['tflop_per_pair']:.2f} TFLOP per pair, {found['kernels_per_micro_batch']:,} kernels per micro-batch, uncompiled")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
