"""What an evaluation found, and writing it down: `report.json` for programs, `report.html` for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffpref.evaluation.chart import Point
from diffpref.evaluation.page import render_page

THIS_RUN = "this run"
"""`Control.measured` of a control that was measured together with the aligned model."""


@dataclass(frozen=True)
class Control:
    """A comparison that puts the headline in proportion, such as the same training on shuffled labels."""

    name: str
    win_rate: float  # share in [0, 1], against the base model
    low: float  # 95 % interval
    high: float
    num_prompts: int
    measured: str  # THIS_RUN, or when and where: "2024-05-01, runs/shuffled/report.json"
    note: str = ""  # what the control shows, one sentence


@dataclass(frozen=True)
class Picture:
    """One prompt drawn by both models from the same seed."""

    prompt: str
    seed: int
    base: np.ndarray  # uint8 (H, W, 3)
    aligned: np.ndarray  # uint8 (H, W, 3)
    score_base: float
    score_aligned: float


@dataclass(frozen=True)
class ImplicitAccuracy:
    """How often the implicit reward puts the chosen image of a held-out pair first."""

    accuracy: float  # share in [0, 1]
    label_ceiling: float  # share in [0, 1] that a perfect judge would reach, because labels are noisy; NaN if unknown
    num_pairs: int
    by_timestep: list[tuple[str, float]] = field(default_factory=list)  # (timestep range, accuracy), least noise first


@dataclass(frozen=True, kw_only=True)
class Report:
    """One evaluation of an aligned model against its base. Intervals are 95 %; a number that is unknown is NaN."""

    title: str
    summary: str  # what was done, one sentence
    score_name: str = "score"  # what is scored, as it reads in "the mean ..."
    win_rate: float  # share in [0, 1] of prompts on which the aligned picture scores higher; a tie counts one half
    win_rate_low: float
    win_rate_high: float
    num_prompts: int
    score_base: float  # mean over prompts
    score_aligned: float
    score_difference: float  # aligned - base, mean over prompts
    score_difference_low: float
    score_difference_high: float
    best_of_n_equivalent: float  # base samples per prompt whose best scores as high as one aligned sample
    best_of_n_reached: bool  # False: more than best_of_n_samples
    best_of_n_samples: int  # base samples drawn per prompt
    prompt_following_base: dict[str, float]  # attribute -> share in [0, 1]; the key "all" holds the overall share
    prompt_following_aligned: dict[str, float]
    score_parts_base: dict[str, float] = field(default_factory=dict)  # mean over prompts
    score_parts_aligned: dict[str, float] = field(default_factory=dict)
    diversity: dict[str, float] = field(default_factory=dict)  # attribute -> spread of aligned over spread of base, and "mean"
    controls: list[Control] = field(default_factory=list)
    implicit_accuracy: ImplicitAccuracy | None = None
    settings: dict[str, str | float | int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)  # seconds
    pictures: list[Picture] = field(default_factory=list)
    pictures_note: str = ""  # how the pictures were picked, one sentence
    curves: dict[str, dict[str, list[Point]]] = field(default_factory=dict)  # panel -> series -> (step, value)


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.json` and `report.html` into `folder` (created if missing) and return the path of the page.

    Each file appears whole or not at all. The JSON holds every field but the pictures; NaN and infinity become null.

    Raises:
        ValueError: a picture is not uint8 (H, W, 3); neither file is written then.
    """
    page = render_page(report)
    numbers = json.dumps(as_json(report), indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "report.json", numbers)
    _replace(folder / "report.html", page)
    return folder / "report.html"


def as_json(report: Report) -> dict[str, object]:
    """Every field but the pictures, in JSON types; numbers that are not finite become None.

    Raises:
        TypeError: a value has no counterpart in JSON.
    """
    fields = dataclasses.asdict(dataclasses.replace(report, pictures=[]))
    del fields["pictures"]
    return {name: _plain(value) for name, value in fields.items()}


def three_lines(report: Report) -> str:
    """The result in three lines for a terminal: win rate; score and best-of-N; prompt following and diversity."""
    r = report
    sign = "more than " if not r.best_of_n_reached else ""
    following = [_overall(shares) for shares in (r.prompt_following_base, r.prompt_following_aligned)]
    lines = [
        f"win rate {_percent(r.win_rate)} against the base "
        f"(95 % interval {_percent(r.win_rate_low)} to {_percent(r.win_rate_high)}, {r.num_prompts} prompts; 50 % means no change)",
        f"{r.score_name} {r.score_base:.4g} -> {r.score_aligned:.4g} "
        f"({r.score_difference:+.3g}, {r.score_difference_low:+.3g} to {r.score_difference_high:+.3g}); "
        f"one aligned picture matches the best of {sign}{r.best_of_n_equivalent:.1f} base pictures",
        f"prompt following {_percent(following[0])} -> {_percent(following[1])}; "
        f"diversity of unrewarded attributes x {r.diversity.get('mean', math.nan):.2f} of the base",
    ]
    return "\n".join(lines).replace("nan %", "unknown").replace("nan", "unknown")


def _overall(shares: Mapping[str, float]) -> float:
    if "all" in shares:
        return shares["all"]
    known = [share for share in shares.values() if math.isfinite(share)]
    return sum(known) / len(known) if known else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no counterpart in JSON; pass a number or a text")


def _replace(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader never sees half a file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
