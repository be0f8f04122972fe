"""Experiment trackers beside metrics.jsonl, all through accelerate: which ones, where they write, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from diffpref.evaluation.generate import Images

_PACKAGES = {"comet_ml": "comet-ml"}
"""Package of a tracker, where it is not the tracker's name."""


def tracker_names(report_to: str) -> list[str]:
    """Names in report_to: "none" is nothing, "all" every installed tracker, else a list separated by commas.

    Raises ValueError for unknown trackers and for those that are not installed.
    """
    known = sorted(str(name) for name in LoggerType if name != LoggerType.ALL)
    installed = [str(name) for name in get_available_trackers()]
    wanted = [name.strip() for name in report_to.split(",") if name.strip()]
    if wanted == ["none"]:
        return []
    if wanted == ["all"]:
        if not installed:
            raise ValueError("report_to is 'all', but no tracker is installed; pip install diffpref[trackers], or use none")
        return installed
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"report_to is {report_to!r}; accepted: none, all, or names separated by commas from {', '.join(known)}")
    missing = [_PACKAGES.get(name, name) for name in wanted if name not in installed]
    if missing:
        raise ValueError(f"report_to is {report_to!r}, but it is not installed; pip install {' '.join(missing)}, or use none")
    return list(dict.fromkeys(wanted))


def start_trackers(accelerator: Accelerator, project: str, settings: Mapping[str, Any], first_step: int) -> None:
    """Begin a run in every tracker of the accelerator, with the settings but the hub token. Files go to its logging_dir."""
    if not (accelerator.log_with and accelerator.is_main_process):
        return
    folder = Path(accelerator.logging_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {n: v for n, v in settings.items() if isinstance(v, bool | int | float | str) and n != "hub_token"}
    where = {"wandb": {"dir": str(folder)}, "tensorboard": {"purge_step": first_step + 1}}  # a resumed run writes no step twice
    accelerator.init_trackers(project, plain, where)


def tell_trackers(accelerator: Accelerator, tell: Callable[[Any], None], lost: Callable[[str], None]) -> None:
    """Do something with every tracker. One that fails is told nothing more, and `lost` is told why: a run never ends for its tracker."""
    for tracker in list(accelerator.trackers):
        try:
            tell(tracker)
        except Exception as error:  # trackers raise types of their own, and those of what carries them
            accelerator.trackers.remove(tracker)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            lost(f"the tracker {tracker.name} failed ({why}) and is told nothing more; training goes on")


def log_images(tracker: Any, step: int, images: Mapping[str, Images], prompts: list[str]) -> None:
    """Hand pictures uint8 (N, H, W, 3) by name to a tracker, if it takes any; for the others there are the files."""
    for name, pictures in images.items():
        if len(pictures):
            _log_images(tracker, step, name, pictures, prompts)


def _log_images(tracker: Any, step: int, name: str, pictures: np.ndarray, prompts: list[str]) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: pictures}, step=step, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({name: list(pictures)}, step=step)
    elif tracker.name in ("aim", "clearml"):  # one picture per name
        for i, picture in enumerate(pictures):
            value = (picture, prompts[i]) if tracker.name == "aim" else picture
            tracker.log_images({f"{name}/{i}": value}, step=step)
