"""The run folder: who may write into it, the resolved settings, and the manifest of what ran."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from diffpref.models.backbone import Backbone
from diffpref.training.checkpoint import find_checkpoint
from diffpref.training.config import TrainConfig
from diffpref.training.device import effective_learning_rate, pairs_per_update
from diffpref.training.objective import Objective
from diffpref.training.settings import Settings, to_flat
from diffpref.training.stopping import FolderInUse

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "diffpref_config.yaml"
MANIFEST_FILE = "run_manifest.json"

_MAY_CHANGE = {
    "resume_from_checkpoint",
    "allow_change",
    "restart",
    "output_dir",
    "dataloader_num_workers",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "save_in_background",
    "rank_timeout",
    "non_finite",
    "validation_steps",
    "validation_prompts",
    "num_validation_images",
    "report_to",
    "logging_dir",
    "tracker_project_name",
    "push_to_hub",
    "hub_model_id",
    "merge_lora",
    "check_images",
    "cache_latents",
    "latent_cache",
    "reference_errors",
    "cache_dir",
    "vae_encode_batch_size",
    "gradient_checkpointing",
    "attention",
    "channels_last",
    "pack_weights",
    "compile",
    "compile_backend",
    "shard",
    "preflight",
    "train_batch_size",
    "gradient_accumulation_steps",
}
"""Settings that a resumed run may change: they do not change what is learned, or are checked together elsewhere."""


def claim(config: TrainConfig, method: Objective, accelerator: Accelerator) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None). Writes nothing: a run that cannot start leaves no trace.

    Raises ValueError when the folder belongs to a run with other settings, or holds a run and no resume was asked for, and FolderInUse
    while another process writes into it.
    """
    return claim_folder(Path(str(config.output_dir)), to_flat(config, *method.parts), config.resume_from_checkpoint, accelerator)


def claim_folder(folder: Path, settings: Settings, wanted: str | None, accelerator: Accelerator) -> tuple[Path, Path | None]:
    """`claim` for any kind of run: its flat settings, and the checkpoint that is `wanted`."""
    stored = folder / CONFIG_FILE
    wished: list[str] = []
    if stored.exists():
        check_links(folder)
        if accelerator.is_main_process:
            hold(folder)
        wished, differences = _changes(yaml.safe_load(stored.read_text()) or {}, settings)
        if differences:
            raise ValueError(
                f"output_dir {str(folder)!r} holds a run with other settings ({'; '.join(differences)}); choose another output_dir, or "
                "name the settings in allow_change to go on from its checkpoint with the new values"
            )
        if wanted is None:
            raise ValueError(
                f"output_dir {str(folder)!r} already holds this run; add --resume_from_checkpoint latest or choose another output_dir"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.name != LOCK_FILE for path in folder.iterdir())):
        raise ValueError(f"output_dir {str(folder)!r} is not empty and no run of diffpref; choose another output_dir")
    resume = None
    if wanted:
        with accelerator.main_process_first():  # it renames damaged checkpoints; the others then look at what is left
            resume, warnings = find_checkpoint(folder, wanted, restart=bool(settings.get("restart")))
        if wished and accelerator.is_main_process:
            warnings.append(f"continues with other settings than the run began with, as allow_change says: {'; '.join(wished)}")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    accelerator.wait_for_everyone()
    return folder, resume


LOCK_FILE = ".lock"
_held: dict[Path, int] = {}
"""Open lock files of this process by run folder. They stay open: the kernel gives the lock up when the process ends, however it ends."""


def hold(folder: Path) -> None:
    """Lock a run folder for the life of this process. Without effect where there is no fcntl, or no lock on the file system.

    Raises FolderInUse while another process holds it, and ValueError when the folder cannot be written.
    """
    if fcntl is None:
        return
    path, handle = folder / LOCK_FILE, _held.get(folder.absolute())
    if handle is not None and path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be written ({error.strerror}); choose another output_dir") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by workers, which may outlive a killed run
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(handle)
            raise FolderInUse(in_use(folder)) from error
    _held[folder.absolute()] = handle


def in_use(folder: Path) -> str:
    """What to say when another run has the folder."""
    return f"output_dir {str(folder)!r} is being written by another run; wait until it ends, or choose another output_dir"


def make_folder(folder: Path) -> None:
    """Create and lock the run folder, unless `claim` has locked it. Raises ValueError when it cannot be made, or FolderInUse."""
    is_new = folder.absolute() not in _held
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be created ({error.strerror}); choose another output_dir") from error
    hold(folder)
    if is_new and (folder / CONFIG_FILE).exists():  # a run that began and ended while this one was loading
        raise FolderInUse(in_use(folder))


def check_links(folder: Path) -> None:
    """Raises ValueError for a link out of a run folder: what is written there would land elsewhere."""
    home = folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(
                f"output_dir {str(folder)!r}: {path.name} is a link to {str(path.resolve())!r}, outside of it; remove the link"
            )


def compare(stored: Settings, settings: Settings) -> list[str]:
    """Settings that differ and must not: "name: stored -> new"."""
    allowed = set(_MAY_CHANGE)
    if str(settings.get("lr_scheduler", "")).startswith("constant"):
        allowed |= {"max_train_steps", "num_train_epochs"}  # under a constant schedule a longer run begins like the shorter one
    if settings.get("num_train_epochs") is not None:
        allowed.add("max_train_steps")  # follows from the epochs and the data, which are compared themselves
    if settings.get("aspect_ratio_buckets"):
        allowed.discard("train_batch_size")  # a micro-batch lies in one bucket, so its size decides which pairs come when
    allowed |= {name for name in ("score_min", "score_max") if settings.get(name) is None}  # fitted to the data, which is compared itself
    names = [name for name in {**stored, **settings} if name not in allowed]
    return [f"{n}: {stored.get(n)} -> {settings.get(n)}" for n in names if stored.get(n) != settings.get(n)]


def _changes(stored: Settings, settings: Settings) -> tuple[list[str], list[str]]:
    """Differences that allow_change names, and the others. Raises ValueError for a name that is no setting of the run."""
    names = tuple(settings.get("allow_change") or ())
    unknown = [name for name in names if name not in settings]
    if unknown:
        raise ValueError(f"allow_change has {unknown[0]!r}, which is no setting of this run; accepted: {', '.join(sorted(settings))}")
    found = compare(stored, settings)
    wished = [line for line in found if line.partition(":")[0] in names]
    return wished, [line for line in found if line not in wished]


def open_folder(
    folder: Path,
    config: TrainConfig,
    method: Objective,
    data: Mapping[str, Any],
    accelerator: Accelerator,
    backbone: Backbone,
    notes: Sequence[str] = (),
    preflight: Mapping[str, Any] | None = None,
) -> None:
    """Create the run folder with resolved settings and manifest, now that everything is loaded.

    The manifest holds versions, revision, what is known of the `data`, what the preflight found, and the numbers that are usually
    hidden: rate and pairs per update.
    """
    if not accelerator.is_main_process:
        return
    make_folder(folder)
    write_whole(folder / CONFIG_FILE, yaml.safe_dump(to_flat(config, *method.parts), sort_keys=False))
    per_update, rate = pairs_per_update(config, accelerator), effective_learning_rate(config, accelerator)
    manifest = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [word.replace(config.hub_token, "***") for word in sys.argv] if config.hub_token else sys.argv,
        "notes": list(notes),
        "settings": to_flat(config, *method.parts),
        "effective_learning_rate": rate,
        "objective": [type(part).__name__ for part in method.parts],
        "pairs_per_update": per_update,
        "beta_convention": "beta multiplies half the difference of mean squared errors",
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "model_family": backbone.family,
        "prediction_type": backbone.process.prediction_type,
        "data": dict(data),
        "preflight": dict(preflight or {}),
        "git_revision": git_revision(),
        "versions": versions(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    write_json(folder / MANIFEST_FILE, manifest)
    print(f"learning rate {rate:g} as used, {per_update} pairs per update, {config.max_train_steps} updates", file=sys.stderr)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    names = ("diffpref", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "Pillow")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def git_revision() -> str | None:
    """Revision of the checkout that the package runs from, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed.strip() else "")


def write_json(path: Path, content: Any) -> None:
    """Write JSON complete or not at all."""
    write_whole(path, json.dumps(content, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file complete or not at all; the old one stays when the disk is full."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with hidden.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    except OSError:
        hidden.unlink(missing_ok=True)
        raise
