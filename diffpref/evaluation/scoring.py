"""Scores of many pictures of which some may be refused: a bad picture costs its own row, never the work around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Score = Callable[[Any, Sequence[str]], Any]
"""(list of N RGB pictures, N prompts) -> N scores, higher is better. Raises ValueError for a picture or prompt that it refuses."""

_TRIED = 8  # prompts that a scorer is tried on before the first picture is drawn


@dataclass(frozen=True)
class Scored:
    """N pictures as every scorer sees them."""

    scores: dict[str, np.ndarray]  # scorer -> (N,) float64, NaN where it refused
    problems: list[str | None]  # (N,) why the first scorer that refused did so


def score_pictures(scorers: Mapping[str, Score], images: Sequence[Any], prompts: Sequence[str]) -> Scored:
    """Every picture by every scorer. Raises ValueError for a scorer that returns another number of scores."""
    scores: dict[str, np.ndarray] = {}
    problems: list[str | None] = [None] * len(prompts)
    for name, score in scorers.items():
        scores[name], reasons = _scores(name, score, images, prompts)
        problems = [before or (reason and f"{name}: {reason}") for before, reason in zip(problems, reasons, strict=True)]
    return Scored(scores, problems)


def _scores(name: str, score: Score, images: Sequence[Any], prompts: Sequence[str]) -> tuple[np.ndarray, list[str | None]]:
    """Scores (N,), NaN where refused, and the reasons; one picture at a time once a batch is refused."""
    if not len(prompts):
        return np.zeros(0), []
    try:
        values = np.asarray(score(images, prompts), dtype=np.float64)
    except ValueError as error:
        if len(prompts) == 1:
            return np.full(1, np.nan), [" ".join(str(error).split())[:300]]
        parts = [_scores(name, score, images[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        return np.concatenate([found for found, _ in parts]), [reason for _, reasons in parts for reason in reasons]
    if values.shape != (len(prompts),):
        raise ValueError(f"scorer {name!r} returned shape {values.shape} for {len(prompts)} pictures; it must return ({len(prompts)},)")
    finite = np.isfinite(values)
    return np.where(finite, values, np.nan), [None if good else f"the score is {x}" for good, x in zip(finite, values, strict=True)]


def split_spec(spec: str) -> tuple[str, str]:
    """(name in the report, scorer) of "pickscore", "pickscore=place" or "name:pickscore=place"."""
    kind, equals, place = spec.partition("=")
    name, colon, scorer = kind.partition(":")
    return (name, f"{scorer}{equals}{place}") if colon else (kind, spec)


def load_scorers(specs: Sequence[str], load: Callable[[str], Score]) -> dict[str, Score]:
    """{name: scorer} of specs. Raises ValueError for a name that comes twice or cannot be a column."""
    found = [split_spec(spec) for spec in specs]
    names = [name for name, _ in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"scorers names {twice[0]!r} twice; write NAME:{twice[0]}=PLACE with a name of its own")
    bad = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name)), None)
    if bad is not None:
        raise ValueError(f"scorers names one {bad!r}; accepted: letters, digits and . _ + -, as in NAME:pickscore=PLACE")
    return {name: load(scorer) for name, scorer in found}


def try_scorers(scorers: Mapping[str, Score], prompts: Sequence[str], side: int = 64) -> None:
    """Score a grey picture for the first prompts, so that what cannot work is said before hours of drawing.

    Raises ValueError when a scorer refuses all of them.
    """
    for name, score in scorers.items():
        texts = list(prompts[:_TRIED])
        grey = [Image.new("RGB", (side, side), (128, 128, 128))] * len(texts)
        found, reasons = _scores(name, score, grey, texts)
        if not np.isfinite(found).any():
            raise ValueError(f"scorer {name!r} refuses a grey picture of {side} x {side} for prompt {texts[0]!r}: {reasons[0]}")
