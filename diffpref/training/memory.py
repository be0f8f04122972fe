"""How much memory and disk a run needs, as a function of its settings and of counts; nothing here looks at the machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffpref.training.config import TrainConfig

Changes = dict[str, Any]
"""Settings by name, to be changed together."""

OPTIMIZER_BYTES: Mapping[str, float] = {"adamw": 8, "adamw_8bit": 2.1, "adamw_4bit": 1.1, "prodigy": 16, "schedule_free": 8}
"""State per trained number: two float32 moments; two of 8 or 4 bits with their block scales; four float32 tensors for prodigy.
Adafactor's depends on the shapes."""


PACKED = 3
"""Times the packed weights that they take in addition: two layouts, and what the heap keeps of a mirrored copy made on the way (measured
2.7 for the 97 M network of the benchmarks)."""


@dataclass(frozen=True)
class Counts:
    """What is known of a model and its data before the first step."""

    weights: int  # bytes of all networks, adapter included, frozen copy not
    unet: int  # bytes of the UNet without adapter
    trained: int  # trained numbers
    factored: int  # numbers that Adafactor keeps for them
    adapter: int  # numbers of the adapter that the settings attach, or would attach if tune were lora
    cache: int = 0  # bytes of cached latents on the device that trains
    packed: int = 0  # bytes of the weights that pack_weights would keep in two further layouts
    num_processes: int = 1


def factored_numbers(shapes: Iterable[Sequence[int]]) -> int:
    """Numbers that Adafactor keeps: a row and a column per matrix of the last two axes, everything of vectors."""
    return sum(math.prod(shape[:-2]) * sum(shape[-2:]) if len(shape) > 1 else math.prod(shape) for shape in shapes)


def optimizer_bytes(optimizer: str, counts: Counts) -> int:
    """Bytes of the optimizer's state."""
    return 4 * counts.factored if optimizer == "adafactor" else int(OPTIMIZER_BYTES[optimizer] * counts.trained)


def number_bytes(config: TrainConfig) -> int:
    """Bytes of a trained number and of its gradient."""
    return 2 if config.tune == "full" and config.base_dtype != "fp32" else 4


def memory_parts(config: TrainConfig, needs_reference: bool, counts: Counts, activations: int, trajectory: int = 0) -> dict[str, int]:
    """Part -> bytes at the peak of a step, parts of no size left out; their sum is what the device has to hold.

    activations: those of one micro-batch under these settings. trajectory: latents of its path, where that has many steps.
    """
    parts = {
        "weights": counts.weights,
        "reference copy": counts.unet if config.tune == "full" and needs_reference else 0,
        "gradients": number_bytes(config) * counts.trained,
        "gradient buckets": number_bytes(config) * counts.trained if counts.num_processes > 1 and config.shard == "no" else 0,
        "optimizer": optimizer_bytes(config.optimizer, counts),
        "moving average": 4 * counts.trained if config.use_ema else 0,
        "latent cache": counts.cache,
        "packed weights": PACKED * counts.packed if config.pack_weights else 0,
        "activations": activations,
        "trajectory": trajectory,
    }
    if config.shard != "no":  # with `gradients`, all weights of the policy are there between forward and backward pass
        n = counts.num_processes
        parts |= {name: parts[name] // n for name in ("reference copy", "gradients", "optimizer")}
        if config.shard == "weights":
            parts["weights"] += counts.unet // n - counts.unet
    return {name: size for name, size in parts.items() if size}


def remedies(
    config: TrainConfig,
    precision: str,
    counts: Counts,
    needs: Callable[[TrainConfig, Counts], int],
    budget: float,
    on_gpu: bool,
) -> list[tuple[Changes, int]]:
    """Changes of settings that bring `needs` down to `budget` bytes, each with what it needs then; empty if none does.

    The first that leaves the result as it is (checkpointing, smaller micro-batches with more accumulation) is enough. Only if none of
    them fits, those that change what is trained or how are tried on top of them, and all that fit are named.
    """
    neutral: Changes = {}
    for change in _neutral(config):
        neutral = neutral | change
        size = needs(dataclasses.replace(config, **neutral), counts)
        if size <= budget:
            return [(neutral, size)]
    found = []
    for change in _alternatives(config, precision, on_gpu):
        try:
            changed = dataclasses.replace(config, **neutral, **change)
        except ValueError:  # another setting of the run does not go with it
            continue
        size = needs(changed, _recounted(changed, counts, change))
        if size <= budget:
            found.append(({**neutral, **change}, size))
    return found


def larger_micro_batch(
    config: TrainConfig, parts: Mapping[str, int], needs: Callable[[TrainConfig], int], budget: float
) -> tuple[Changes, int] | None:
    """The largest micro-batch with as many pairs per update whose step leaves a tenth of `budget` free, and the bytes that it takes.

    parts: what the run takes as it is. Only sizes that fit if activations grow with the size are counted. None where there is none.
    """
    size, accumulation, rest = config.train_batch_size, config.gradient_accumulation_steps, sum(parts.values()) - parts["activations"]
    for times in range(accumulation, 1, -1):
        if accumulation % times or rest + times * parts["activations"] > 0.9 * budget:
            continue
        change: Changes = {"train_batch_size": size * times, "gradient_accumulation_steps": accumulation // times}
        found = needs(dataclasses.replace(config, **change))
        if found <= 0.9 * budget:
            return change, found
    return None


def _neutral(config: TrainConfig) -> list[Changes]:
    ways = ["selective", "full"] if config.gradient_checkpointing == "off" and not config.compile else ["full"]
    steps: list[Changes] = [{"pack_weights": False}] if config.pack_weights else []
    steps += [{"gradient_checkpointing": how} for how in ways if how != config.gradient_checkpointing]
    size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    smaller = [n for n in range(size - 1, 0, -1) if size % n == 0]
    return steps + [{"train_batch_size": n, "gradient_accumulation_steps": accumulation * size // n} for n in smaller]


def _alternatives(config: TrainConfig, precision: str, on_gpu: bool) -> list[Changes]:
    if config.tune == "full":
        lighter = ["adamw_8bit", "adafactor"] if on_gpu else ["adafactor"]
        all_half: Changes = {"base_dtype": "bf16", "mixed_precision": "bf16", "optimizer": "adafactor"}
        return [
            {"tune": "lora"},
            *({"optimizer": name} for name in lighter if name != config.optimizer),
            *([all_half] if config.base_dtype == "fp32" else []),
        ]
    half = precision if precision != "no" else "bf16"
    return [{"base_dtype": half, "mixed_precision": half}] if config.base_dtype == "fp32" else []


def _recounted(config: TrainConfig, counts: Counts, change: Changes) -> Counts:
    """The counts after a change; what an adapter adds to the weights is counted, what it saves in activations is not."""
    if change.get("tune") == "lora":
        small = {"trained": counts.adapter, "factored": counts.adapter}
        return dataclasses.replace(counts, weights=counts.weights + 4 * counts.adapter, **small)
    if "base_dtype" in change:
        return dataclasses.replace(counts, weights=counts.weights - counts.unet // 2, unet=counts.unet // 2)
    return counts


def as_flags(changes: Changes) -> str:
    """Changes as they are written on a command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {str(value).lower()}" for name, value in changes.items())


def checkpoint_bytes(config: TrainConfig, counts: Counts) -> int:
    """Size of one checkpoint: trained weights, their moving average if there is one, the optimizer's state."""
    average = 4 * counts.trained if config.use_ema else 0
    return number_bytes(config) * counts.trained + average + optimizer_bytes(config.optimizer, counts)


def export_bytes(config: TrainConfig, counts: Counts) -> int:
    """Size of what a finished run leaves beside its checkpoints: the result, and under early stopping two of the best weights."""
    best = 0 if config.early_stopping_patience is None else 2 * number_bytes(config) * counts.trained
    if config.tune == "full":
        return counts.weights + best
    return 4 * counts.trained + (counts.weights if config.merge_lora else 0) + best


def num_checkpoints(config: TrainConfig, first_step: int) -> int:
    """Checkpoints that are still to be written and then lie there at once; the oldest goes after the newest is complete."""
    ahead = math.ceil(config.max_train_steps / config.checkpointing_steps) - first_step // config.checkpointing_steps
    limit = config.checkpoints_total_limit
    return ahead if limit is None else min(ahead, limit + 1)


def latent_cache_bytes(pictures: int, mirrored: bool, latent_numbers: int) -> int:
    """Mean and deviation of the latents of all pictures in float32, also of mirrored ones.

    latent_numbers: C x h x w of one latent.
    """
    return pictures * (2 if mirrored else 1) * 2 * latent_numbers * 4


def words(size: float) -> str:
    """Bytes for people: 3.4 GB, 12 MB, 7 kB."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
