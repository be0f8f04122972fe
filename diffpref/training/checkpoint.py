"""Checkpoints: tensors in safetensors, numbers in JSON, complete or invisible.

A checkpoint is written into a hidden folder, listed in a manifest with sizes and SHA-256, flushed to disk and renamed. A
kill or a full disk at any moment therefore leaves the newest complete one in place; the oldest is removed afterwards.
Who writes into a run folder holds its lock (run_folder.py), so that nobody takes a checkpoint that is being written for a leftover.
Nothing is unpickled, and no generator state is needed: every draw of the run is keyed (core/random.py).

A checkpoint holds what is trained; with early stopping best-<step> holds the weights of the best validation, in the same format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref.training.sharding import collected, split_as

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
        if old != final:  # which is the oldest when somebody copied later ones into the folder
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


def set_aside_after(run_folder: Path, step: int) -> list[str]:
    """Rename checkpoints of later steps to later-... and return their names: a run that continues from `step` has another future.

    Kept as they are they would be resumed from in its place, or push its own out when old ones are removed.
    """
    later = [folder for folder in checkpoints(run_folder) if _step_of(folder) > step]
    for folder in later:
        _rename_away(folder, "later")
    return [folder.name for folder in later]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _rename_away(folder: Path, why: str) -> Path:
    """Rename a folder to <why>-<its name>, numbered when there is one already: nothing is overwritten."""
    names = [f"{why}-{folder.name}", *(f"{why}-{folder.name}-{n}" for n in range(2, 1000))]
    aside = next(place for name in names if not (place := folder.with_name(name)).exists())
    return folder.rename(aside)


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
    needed, free = num_bytes(tensors), shutil.disk_usage(run_folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
    try:
        hidden.mkdir(mode=0o700)  # nobody else reads or adds anything before the manifest is written
        for part, named in tensors.items():
            _save_tensors(_separate(named), hidden / f"{part}.safetensors")
        (hidden / "trainer_state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in sorted(hidden.iterdir())}
        (hidden / _MANIFEST).write_text(json.dumps(files, indent=1))
        for path in (*hidden.iterdir(), hidden):
            _flush(path)
        if final.exists():  # only a damaged one can be there
            shutil.rmtree(final)
        hidden.chmod(run_folder.stat().st_mode & 0o777)
        hidden.rename(final)
        _flush(run_folder)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return final


def num_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Size of all tensors."""
    return sum(x.numel() * x.element_size() for named in tensors.values() for x in named.values())


def _save_tensors(named: dict[str, Tensor], path: Path) -> None:
    """Raises OSError also where the library raises a type of its own, as it does for a full disk."""
    try:
        save_file(named, path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error)) from error


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
    return sorted(found, key=_step_of)


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size and SHA-256, and its step is that of its name."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())
        if not files or any(Path(n).name != n for n in files):  # a manifest names files beside it
            return False
        named, step = folder.name.rpartition("-")[2], json.loads((folder / "trainer_state.json").read_text())["step"]
        if named.isdigit() and int(named) != step:
            return False  # a renamed folder would continue at the wrong step
        return all((folder / n).stat().st_size == f["bytes"] and _digest(folder / n) == f["sha256"] for n, f in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(run_folder: Path, wanted: str, restart: bool = False) -> tuple[Path | None, list[str]]:
    """The checkpoint that resume_from_checkpoint asks for, and a warning per damaged one that was passed over.

    "latest" is the newest complete one, None if there is none at all; a path or a name must exist and be complete. Damaged
    folders are renamed to bad-... . Raises ValueError when the wanted one is unusable, or all are damaged and `restart` is not given.
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
        aside = _rename_away(folder, "bad")
        warnings.append(f"{folder.name} is damaged or incomplete and was renamed to {aside.name}")
    damaged = sorted(p.name for p in run_folder.glob("bad-checkpoint-*"))
    if damaged and not restart:
        raise ValueError(
            f"resume_from_checkpoint latest: no complete checkpoint in {run_folder}, only {', '.join(damaged)}; "
            "start again in another output_dir, or with --restart true in this one"
        )
    if damaged:
        warnings.append("no complete checkpoint is left; begins again at step 0, as restart says")
    return None, warnings


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by part, state) of the files in the manifest; others beside them are not looked at. Raises ValueError for another format."""
    state = json.loads((folder / "trainer_state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {state.get('format')}; this version reads format {FORMAT}")
    listed = sorted(name for name in json.loads((folder / _MANIFEST).read_text()) if name.endswith(".safetensors"))
    return {name.removesuffix(".safetensors"): load_file(folder / name) for name in listed}, state


def optimizer_tensors(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimizer's state as `<parameter>/<entry>`, quantised ones as `<parameter>/<entry>.<part>`."""
    found: dict[str, Tensor] = {}
    for name, p in named.items():
        for key, x in optimizer.state.get(p, {}).items():
            if isinstance(x, Tensor):
                found |= {f"{name}/{key}{part}": inner for part, inner in _inner(collected(x)).items()}
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
            p.copy_(split_as(weights[name], p))
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
        state[entry] = value.clone() if on_cpu else split_as(value.to(p.device), p)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
