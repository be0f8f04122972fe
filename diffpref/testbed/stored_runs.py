"""The stored runs of the leaderboard: a method under one regime, labelling and budget, and all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.evaluation.stats import paired_bootstrap
from diffpref.testbed.protocol import Protocol

Interval = tuple[float, float, float]
"""Mean, and the 95 % interval of it under resampling of prompts."""


@dataclass(frozen=True)
class Rows:
    """The runs of one row: a method under one regime, labelling and budget, one per seed."""

    runs: tuple[dict[str, Any], ...]
    base: np.ndarray  # (P,) scores of the base model

    @cached_property
    def scores(self) -> np.ndarray:
        """(P,) mean over the seeds."""
        return np.mean([run["scores"] for run in self.runs], axis=0)

    @property
    def win_rate(self) -> float:
        """Mean over the seeds."""
        return self.mean("win_rate")

    def gain(self, over: Rows | None = None) -> Interval:
        """Reward above the base, or above other rows, paired by prompt."""
        return paired_bootstrap(self.scores - (self.base if over is None else over.scores))

    def mean(self, name: str) -> float:
        """Mean of a number of the runs."""
        return float(np.mean([run[name] for run in self.runs]))

    def held_out(self, name: str) -> float:
        """Mean of what was measured on the held-out pairs."""
        return float(np.mean([run["held_out"][name] for run in self.runs]))

    def following(self, name: str) -> float:
        """Mean share of pictures that show a stated attribute."""
        return float(np.mean([run["following"][name] for run in self.runs]))


class Results:
    """The stored runs of a folder."""

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        self.folder, self.protocol = folder, protocol
        self.base = json.loads((folder / "base.json").read_text())
        self.base_scores = np.array(self.base["test"]["scores"])

    def rows(self, method: str, regime: str = "own", labels: str = "given", budget: str = "pairs") -> Rows | None:
        """The runs of a row of the protocol, in the order of their seeds; None unless it has them and all are there."""
        wanted = (regime, labels, budget)
        known = self.protocol.runs(method, has_time_budget=True) if method in self.protocol.entries else []
        runs = [run for run in known if (run.regime, run.labels, run.budget) == wanted]
        paths = [self.folder / f"{run.name}.json" for run in runs]
        if not paths or not all(path.exists() for path in paths):
            return None
        return Rows(tuple(json.loads(path.read_text()) for path in paths), self.base_scores)

    def cost(self, method: str) -> dict[str, float] | None:
        """What an update costs."""
        path = self.folder / f"{method}-cost.json"
        return json.loads(path.read_text()) if path.exists() else None
