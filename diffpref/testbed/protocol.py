"""The protocol of the leaderboard as data: which method is trained with which settings, on which labels, for how long.

Read from configs/testbed/leaderboard.yaml, which was fixed before the first run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from diffpref.locations import config_file
from diffpref.methods.recipes import RECIPES
from diffpref.testbed.pairs import CANDIDATES
from diffpref.training.settings import Settings

REGIMES = ("own", "mismatch", "noisy")
LABELS = ("given", "shuffled", "inverted", "scorer")
"""As the judge gave them; the control of random order; of reversed order; by the testbed's own reward model."""
BUDGETS = ("pairs", "time", "half", "times4", "times12")
"""The protocol's updates; Diffusion-DPO's CPU seconds; and multiples of the updates for single findings."""
MULTIPLES = {"pairs": 1.0, "half": 0.5, "times4": 4.0, "times12": 12.0}


@dataclass(frozen=True)
class Entry:
    """One method under the protocol."""

    method: str  # a recipe
    grid: tuple[Settings, ...]  # one of which is chosen
    settings: Settings = field(default_factory=dict)  # of every run
    data: str = "pairs"  # or lists
    is_variant: bool = False  # of a loss, measured in one regime

    @property
    def pictures_per_group(self) -> int:
        """Pictures that are compared with each other, or slots that show them."""
        return {"images": 1, "lists": CANDIDATES}.get(RECIPES[self.method].groups, 2)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and its measurement."""

    method: str
    regime: str
    labels: str
    budget: str
    seed: int
    setting: int | None = None  # position in the grid; none: the chosen one

    @property
    def name(self) -> str:
        """Its file and folder."""
        setting = "" if self.setting is None else f"-setting{self.setting}"
        return f"{self.method}-{self.regime}-{self.labels}-{self.budget}-{self.seed}{setting}"

    @property
    def is_choice(self) -> bool:
        """Whether it serves to choose a setting, on validation prompts."""
        return self.setting is not None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """See the comments in the file."""

    version: int
    pairs: int
    pairs_per_update: int
    updates: int
    seeds: tuple[int, ...]
    control_seeds: tuple[int, ...]
    controls_on_all_seeds: tuple[str, ...]
    choice_seed: int
    choice_prompts: int
    test_prompts: int
    grid_size: int
    largest_loss_of_following: float
    smallest_time_difference: float
    common: dict[str, Any]
    entries: dict[str, Entry]
    findings: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        for entry in self.entries.values():
            if len(entry.grid) != self.grid_size:
                raise ValueError(
                    f"method {entry.method} has {len(entry.grid)} settings in its grid; the protocol gives every method {self.grid_size}"
                )
            if entry.data not in ("pairs", "lists"):
                raise ValueError(f"data of method {entry.method} is {entry.data!r}; accepted: pairs, lists")

    def choices(self, method: str) -> list[Run]:
        """The runs among which the setting of a method is chosen."""
        return [
            Run(method=method, regime="own", labels="given", budget="pairs", seed=self.choice_seed, setting=i)
            for i in range(self.grid_size)
        ]

    def runs(self, method: str, has_time_budget: bool) -> list[Run]:
        """The reported runs of a method with its chosen setting, the most telling ones first."""
        return [
            Run(method=method, regime=regime, labels=labels, budget=budget, seed=seed)
            for regime, labels, budget, seeds in self._rows(self.entries[method], has_time_budget)
            for seed in seeds
        ]

    def _rows(self, entry: Entry, has_time_budget: bool) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
        controls = self.seeds if entry.method in self.controls_on_all_seeds else self.control_seeds
        yield "own", "given", "pairs", self.seeds
        yield "own", "shuffled", "pairs", controls
        yield "own", "inverted", "pairs", controls
        for further in self.findings:
            if further["method"] == entry.method:
                yield further["regime"], further["labels"], further["budget"], tuple(further.get("seeds", self.seeds))
        if not entry.is_variant:
            yield "noisy", "given", "pairs", self.seeds
            yield "noisy", "shuffled", "pairs", controls
            yield "mismatch", "given", "pairs", self.seeds
            if has_time_budget:
                yield "own", "given", "time", self.seeds

    def updates_of(self, run: Run, time_ratio: float | None = None) -> int:
        """Optimizer steps of a run. time_ratio: CPU seconds of an update of its method in those of Diffusion-DPO."""
        if run.budget == "time":
            assert time_ratio is not None, "the budget of equal time needs the cost of an update"
            return max(1, round(self.updates / time_ratio))
        return round(self.updates * MULTIPLES[run.budget])


def load_protocol(text: str | None = None) -> Protocol:
    """The shipped protocol, or one from YAML text. Raises ValueError for a grid of another size and for unknown names."""
    loaded: dict[str, Any] = yaml.safe_load(text or config_file("testbed", "leaderboard.yaml").read_text())
    entries = {}
    for part, is_variant in (("methods", False), ("variants", True)):
        for method, given in (loaded.pop(part) or {}).items():
            entries[method] = Entry(
                method, tuple(given["grid"]), given.get("settings", {}), given.get("data", "pairs"), is_variant=is_variant
            )
    findings = tuple(_checked(further, entries) for further in loaded.pop("findings") or ())
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in loaded.items()}
    return Protocol(entries=entries, findings=findings, **fields)


def _checked(further: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    for name, accepted in (("method", tuple(entries)), ("regime", REGIMES), ("labels", LABELS), ("budget", BUDGETS)):
        if further[name] not in accepted:
            raise ValueError(f"{name} of a finding is {further[name]!r}; accepted: {', '.join(accepted)}")
    return dict(further)
