"""Checkpoints: tensors in safetensors, numbers in JSON, complete or invisible.

A checkpoint is written into a hidden folder, listed in a manifest with sizes and SHA-256, flushed to disk and renamed. A
kill or a full disk at any moment therefore leaves the newest complete one in place; the oldest is removed afterwards.
Nothing is unpickled, and no generator state is needed: every draw of the run is keyed (core/random.py).

A checkpoint holds what is trained; with early stopping best-<step> holds the weights of the best validation, in the same format.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_MANIFEST = "manifest.json"


def save_checkpoint(
    run_folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int | None
) -> Path:
    """Write checkpoint-<step> with one safetensors file per entry of `tensors` and trainer_state.json, then prune to `keep`.

    Raises OSError when the disk is full, after removing what was begun, and FloatingPointError for a non-finite tensor.
    """
    final = write_folder(run_folder / f"checkpoint-{step}", step, tensors, state)
    for old in checkpoints(run_folder)[: -keep if keep else 0]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_best(run_folder: Path, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write best-<step> as `save_checkpoint` does, then remove the best one before it. Raises as `save_checkpoint` does."""
    final = write_folder(run_folder / f"best-{step}", step, {"weights": weights}, state)
    for old in run_folder.glob("best-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def drop_best_after(run_folder: Path, step: int) -> None:
    """Remove best-<later step>: a run that continues from `step` has not seen it yet."""
    for folder in run_folder.glob("best-*"):
        if folder.name.removeprefix("best-").isdigit() and int(folder.name.removeprefix("best-")) > step:
            shutil.rmtree(folder, ignore_errors=True)


def load_best(run_folder: Path, step: int) -> dict[str, Tensor] | None:
    """The weights of best-<step>; None if it is damaged or gone."""
    folder = run_folder / f"best-{step}"
    return load_checkpoint(folder)[0]["weights"] if is_complete(folder) else None


def write_folder(final: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a folder that is complete or not there; one that is there and complete stays as it is."""
    run_folder, hidden = final.parent, final.with_name(f".tmp-{final.name}-{os.getpid()}")
    if is_complete(final):
        return final
    for part, named in tensors.items():
        bad = [name for name, x in named.items() if not torch.isfinite(x).all()]
        if bad:
            raise FloatingPointError(f"checkpoint of step {step} not written: {part} {bad[0]} is not finite")
    try:
        hidden.mkdir(parents=True)
        for part, named in tensors.items():
            save_file(_separate(named), hidden / f"{part}.safetensors")
        (hidden / "trainer_state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in sorted(hidden.iterdir())}
        (hidden / _MANIFEST).write_text(json.dumps(files, indent=1))
        for path in (*hidden.iterdir(), hidden):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
        hidden.rename(final)
        _flush(run_folder)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return final


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own: parameters may share a table, which safetensors refuses to write twice."""
    found, seen = {}, set()
    for name, x in named.items():
        x = x.detach().cpu().contiguous()
        found[name] = x.clone() if x.data_ptr() in seen else x
        seen.add(x.data_ptr())
    return found


def checkpoints(run_folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    found = [p for p in run_folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size and SHA-256."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())
        return all((folder / n).stat().st_size == f["bytes"] and _digest(folder / n) == f["sha256"] for n, f in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(run_folder: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that resume_from_checkpoint asks for, and a warning per damaged one that was passed over.

    "latest" is the newest complete one, None if there is none at all; a path or a name must exist and be complete. Damaged
    folders are renamed to bad-... . Raises ValueError when the wanted one is unusable or all are damaged.
    """
    for left in (*run_folder.glob(".tmp-checkpoint-*"), *run_folder.glob(".tmp-best-*")):
        shutil.rmtree(left, ignore_errors=True)
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else run_folder / wanted
        if not is_complete(folder):
            raise ValueError(f"resume_from_checkpoint {wanted!r} is no complete checkpoint; give a checkpoint-<step> folder, or latest")
        return folder, []
    warnings: list[str] = []
    for folder in reversed(checkpoints(run_folder)):
        if is_complete(folder):
            return folder, warnings
        aside = folder.with_name(f"bad-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        warnings.append(f"{folder.name} is damaged or incomplete and was renamed to {aside.name}")
    damaged = sorted(p.name for p in run_folder.glob("bad-checkpoint-*"))
    if damaged:
        raise ValueError(
            f"resume_from_checkpoint latest: no complete checkpoint in {run_folder}, only {', '.join(damaged)}; "
            "start again in another output_dir"
        )
    return None, warnings


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by part, state). Raises ValueError for another format version."""
    state = json.loads((folder / "trainer_state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {state.get('format')}; this version reads format {FORMAT}")
    return {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}, state


def optimizer_tensors(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimizer's state as `<parameter>/<entry>`, quantised ones as `<parameter>/<entry>.<part>`."""
    found: dict[str, Tensor] = {}
    for name, p in named.items():
        for key, x in optimizer.state.get(p, {}).items():
            if isinstance(x, Tensor):
                found |= {f"{name}/{key}{part}": inner for part, inner in _inner(x).items()}
    return found


def optimizer_numbers(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The rest of the optimizer's state for JSON: counters per parameter, and what it keeps in its groups beside the rates."""
    counters = {f"{name}/{key}": x for name, p in named.items() for key, x in optimizer.state.get(p, {}).items() if _is_number(x)}
    groups = [{key: x for key, x in group.items() if key not in ("params", *_RATES)} for group in optimizer.param_groups]
    assert not any(isinstance(x, Tensor) for group in groups for x in group.values()), "a tensor in a group would be lost"
    return {"counters": counters, "groups": [{key: x for key, x in group.items() if _is_number(x)} for group in groups]}


_RATES = ("lr", "initial_lr")  # the schedule's


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float)


def _inner(x: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a tensor is made of: itself, or the codes and scales of a quantised one."""
    if not hasattr(x, "__tensor_flatten__"):
        return {"": x}
    return {f".{name}": getattr(x, name) for name in x.__tensor_flatten__()[0]}


def restore(
    named: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Copy weights and optimizer state into the existing parameters; numbers: as `optimizer_numbers` gave them.

    Raises ValueError unless checkpoint and model have exactly the same trainable tensors.
    """
    weights, moments = tensors["weights"], tensors["optimizer"]
    differing = sorted(set(weights) ^ set(named)) or [n for n, p in named.items() if weights[n].shape != p.shape]
    if differing:
        raise ValueError(f"checkpoint does not fit the model: {len(differing)} trainable tensors differ, first {differing[0]}")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in named.values()}, "the optimizer must hold exactly the model's trainable parameters"
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(weights[name])
    for key, value in moments.items():
        name, _, entry = key.rpartition("/")
        _put(optimizer, named[name], entry, value)
    numbers = numbers or {"counters": {}, "groups": []}
    for key, number in numbers["counters"].items():
        name, _, entry = key.rpartition("/")
        optimizer.state[named[name]][entry] = number
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=False):
        group.update({key: x for key, x in saved.items() if key in group})


def _put(optimizer: torch.optim.Optimizer, p: Tensor, entry: str, value: Tensor) -> None:
    """Set one entry of a parameter's state. Step counters stay on the CPU unless the kernel reads them on the device."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    entry, _, part = entry.partition(".")
    if part:
        if entry not in state:  # torchao's own way to make an empty quantised moment; the first moment has a sign
            state[entry] = optimizer._new_buffer(p, entry == "exp_avg")  # type: ignore[attr-defined]
        getattr(state[entry], part).copy_(value)
    else:
        on_cpu = entry == "step" and not (group.get("fused") or group.get("capturable"))
        state[entry] = value.clone() if on_cpu else value.to(p.device)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
