"""What an evaluation found, as data: scores.parquet, report.json and report.md. The page is in model_page.py."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.data.prompts import PromptSet
from diffpref.evaluation.generate import Drawing
from diffpref.evaluation.pictures import Measured, diversity, drift
from diffpref.evaluation.score_table import (
    Combined,
    Comparison,
    ScoreTable,
    combine_scorers,
    combined_markdown,
    compare_model,
    markdown,
)
from diffpref.evaluation.work import write_text

REJECTED_FILE = "rejected_rows.jsonl"
"""Entries and pictures that were left out, with the reasons."""
BASE = "base"
"""Name of the model that the others are compared with."""


@dataclass(frozen=True)
class ModelReport:
    """Models against a base, with several scorers."""

    settings: dict[str, Any]
    prompts: PromptSet
    drawing: Drawing
    models: dict[str, dict[str, Any]]  # name -> where it comes from; the base first
    scorers: dict[str, dict[str, Any]]  # name -> version, convention, checksum
    measured: dict[str, Measured]
    comparisons: list[Comparison]
    trained_on: str | None
    run_metrics: dict[str, list[dict[str, Any]]]  # model -> lines of its training run, if they lie beside it

    @property
    def table(self) -> ScoreTable:
        """All scores."""
        return ScoreTable(self.prompts.texts, self.drawing.seeds, {name: m.scores for name, m in self.measured.items()})

    @property
    def combined(self) -> list[Combined]:
        """All scorers together, for every model."""
        base = self.measured[BASE].scores
        return [c for name, m in self.measured.items() if name != BASE for c in combine_scorers(name, base, m.scores)]

    def statistics(self) -> dict[str, dict[str, float]]:
        """Model -> mean of every picture statistic, diversity over the seeds of a prompt, and drift from the base."""
        base = self.measured[BASE].thumbnails
        found = {}
        for name, m in self.measured.items():
            means = {key: float(values.mean()) for key, values in m.statistics.items()}
            found[name] = means | {"diversity": diversity(m.thumbnails), "drift": drift(base, m.thumbnails)}
        return found

    def as_json(self) -> dict[str, Any]:
        """The report without pictures, for machines."""
        return _plain(
            {
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "prompt_set": {
                    "name": self.prompts.name,
                    "hash": self.prompts.hash,
                    "num_prompts": len(self.prompts.texts),
                    "left_out": self.prompts.rejected,
                },
                "pictures_per_prompt": self.drawing.pictures_per_prompt,
                "rejected_pictures": sum(len(m.problems) for m in self.measured.values()),
                "settings": self.settings,
                "models": self.models,
                "scorers": self.scorers,
                "trained_on": self.trained_on,
                "comparisons": [dataclasses.asdict(c) for c in self.comparisons],
                "combined": [dataclasses.asdict(c) for c in self.combined],
                "statistics": self.statistics(),
            }
        )

    def summary(self) -> str:
        """What was compared, and what was left out, in a few sentences."""
        count, drawing = len(self.prompts.texts), self.drawing
        sentences = [
            f"{count} prompts of {self.prompts.name} (hash {self.prompts.hash}), {drawing.pictures_per_prompt} picture(s) per prompt and "
            f"model, same seeds and starting latents, {drawing.num_inference_steps} steps, guidance {drawing.guidance_scale:g}.",
            *left_out(self.prompts, self.measured),
        ]
        if count < 500:
            sentences.append(f"{count} prompts are few: a win rate is claimed from 500 upwards.")
        return " ".join(sentences)

    def as_markdown(self) -> str:
        """The report as a table for people."""
        lines = [
            "# Evaluation\n",
            f"{self.summary()}\n",
            markdown(self.comparisons),
            "Win: the model's picture scores higher than the base's of the same seed, a tie counts one half; intervals are Wilson's over "
            "prompts. Difference: bootstrap over prompts. p: exact sign test over prompts, corrected over the scorers of a model.\n",
            *([combined_markdown(self.combined)] if self.combined else []),
            _statistics_table(self.statistics()),
        ]
        return "\n".join(lines)


def left_out(prompts: PromptSet, measured: Mapping[str, Measured]) -> list[str]:
    """What does not count in the comparisons, as sentences; empty when everything does."""
    found = []
    if prompts.rejected:
        found.append(f"{len(prompts.rejected)} entries of the set hold no prompt and were left out.")
    if refused := {i for m in measured.values() for i, _ in m.problems}:
        pictures = sum(len(m.problems) for m in measured.values())
        found.append(f"{pictures} pictures of {len(refused)} prompts were refused by a scorer; those prompts do not count for it.")
    return [*found, f"Reasons: {REJECTED_FILE}."] if found else []


def rejected_rows(prompts: PromptSet, measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Everything that was left out, with its reason: entries of the prompt set, then pictures."""
    rows: list[dict[str, Any]] = [{"prompt_set": prompts.name, "reason": reason} for reason in prompts.rejected]
    for model, m in measured.items():
        for (i, k), reason in m.problems.items():
            rows.append({"model": model, "prompt_index": i, "picture": k, "prompt": prompts.texts[i], "reason": reason})
    return rows


def report_of(
    settings: Mapping[str, Any],
    prompts: PromptSet,
    drawing: Drawing,
    models: Mapping[str, Mapping[str, Any]],
    scorers: Mapping[str, object],
    measured: Mapping[str, Measured],
    trained_on: str | None = None,
    run_metrics: Mapping[str, list[dict[str, Any]]] | None = None,
) -> ModelReport:
    """Compare every model with the base. models and measured have the same names, "base" among them."""
    base = measured[BASE].scores
    comparisons = [c for name, m in measured.items() if name != BASE for c in compare_model(name, base, m.scores)]
    return ModelReport(
        settings=dict(settings),
        prompts=prompts,
        drawing=drawing,
        models={name: dict(origin) for name, origin in models.items()},
        scorers={name: scorer_facts(scorer) for name, scorer in scorers.items()},
        measured=dict(measured),
        comparisons=comparisons,
        trained_on=trained_on,
        run_metrics=dict(run_metrics or {}),
    )


def scorer_facts(scorer: object) -> dict[str, Any]:
    """What a scorer says about itself."""
    return {key: getattr(scorer, key) for key in ("name", "version", "convention", "checksum") if getattr(scorer, key, None) is not None}


def write_data(report: ModelReport, folder: Path) -> None:
    """scores.parquet, report.json and report.md."""
    report.table.save(folder / "scores.parquet")
    write_text(folder / "report.json", json.dumps(report.as_json(), indent=1))
    write_text(folder / "report.md", report.as_markdown())


def strength_curves(report: ModelReport) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """LoRA -> scorer -> (strength, mean difference to the base), with (0, 0) for the base, for LoRAs of several strengths."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for c in report.comparisons:
        origin = report.models[c.model]
        if origin.get("lora_scale") is not None:
            points = curves.setdefault(str(origin["label"]), {}).setdefault(c.scorer, [(0.0, 0.0)])
            points.append((float(origin["lora_scale"]), c.difference))
    found = {label: {name: sorted(points) for name, points in lines.items()} for label, lines in curves.items()}
    return {label: lines for label, lines in found.items() if all(len(points) > 2 for points in lines.values())}


def _statistics_table(statistics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(statistics.values())))
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for model, values in statistics.items():
        lines.append(f"| {model} | " + " | ".join("-" if math.isnan(values[n]) else f"{values[n]:.4g}" for n in names) + " |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """JSON values: NaN becomes null, numpy numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
