"""Scores of several models on the same prompts and seeds, and what follows from them.

P prompts, S seeds per prompt. Prompts are the independent units: the S pictures of a prompt are averaged before anything is
resampled or counted, so that more seeds make a prompt's verdict surer but do not pretend to be more prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.evaluation.stats import holm, paired_bootstrap, sign_test, wilson_interval


@dataclass(frozen=True)
class ScoreTable:
    """Every score that was given."""

    prompts: list[str]  # (P,)
    seeds: np.ndarray  # (P, S) int64
    scores: dict[str, dict[str, np.ndarray]]  # model -> scorer -> (P, S) float64

    def save(self, path: Path) -> None:
        """One row per model and picture, one column per scorer."""
        prompt, seed = (axis.ravel() for axis in np.indices(self.seeds.shape))
        tables = []
        for model, columns in self.scores.items():
            rows: dict[str, Any] = {
                "model": [model] * len(prompt),
                "prompt_index": pa.array(prompt, pa.int64()),
                "picture": pa.array(seed, pa.int64()),
                "seed": pa.array(self.seeds.ravel(), pa.int64()),
                "prompt": [self.prompts[i] for i in prompt],
            }
            rows |= {name: pa.array(x.ravel(), pa.float64(), from_pandas=True) for name, x in columns.items()}  # NaN: null
            tables.append(pa.table(rows))
        pq.write_table(pa.concat_tables(tables), path, compression="zstd")


@dataclass(frozen=True)
class Comparison:
    """One scorer's verdict on a model against the base."""

    model: str
    scorer: str
    mean_base: float
    mean: float
    median_base: float
    median: float
    difference: float
    difference_low: float
    difference_high: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    wins: int
    losses: int
    ties: int
    p_value: float  # sign test over prompts
    p_value_holm: float  # corrected for the scorers of this model
    num_prompts: int


def win_shares(base: np.ndarray, model: np.ndarray) -> np.ndarray:
    """(P,): share of a prompt's S pictures that score higher than the base's picture of the same seed; a tie counts one half."""
    return ((model > base) + 0.5 * (model == base)).mean(1)


def compare_model(model: str, base: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> list[Comparison]:
    """A model against the base with every scorer they share; scores are (P, S) each, intervals are 95 %.

    A prompt with a picture that a scorer refused (NaN), of the base or of the model, is left out for that scorer. Raises ValueError
    when none is left.
    """
    found = {name: _compare(name, base[name], x) for name, x in scores.items() if name in base}
    corrected = holm({name: float(values["p_value"]) for name, values in found.items()})
    return [
        Comparison(model=model, scorer=name, p_value_holm=corrected[name], **values)  # type: ignore[arg-type]
        for name, values in found.items()
    ]


def _compare(name: str, base: np.ndarray, model: np.ndarray) -> dict[str, float | int]:
    known = (np.isfinite(base) & np.isfinite(model)).all(1)
    if not known.any():
        raise ValueError(f"scorer {name!r} refused pictures of all {len(known)} prompts; the reasons are in rejected_rows.jsonl")
    base, model = base[known], model[known]
    shares = win_shares(base, model)
    low, high = wilson_interval(float(shares.sum()), len(shares))
    difference = paired_bootstrap(model.mean(1) - base.mean(1))
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    return {
        "mean_base": float(base.mean()),
        "mean": float(model.mean()),
        "median_base": float(np.median(base)),
        "median": float(np.median(model)),
        "difference": difference[0],
        "difference_low": difference[1],
        "difference_high": difference[2],
        "win_rate": float(shares.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "wins": wins,
        "losses": losses,
        "ties": len(shares) - wins - losses,
        "p_value": sign_test(wins, losses),
        "num_prompts": len(shares),
    }


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a table for people."""
    head = "| model | scorer | base | model mean | difference (95 %) | win rate (95 %) | p (Holm) |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for c in comparisons:
        difference = f"{c.difference:+.4g} ({c.difference_low:+.4g} to {c.difference_high:+.4g})"
        rate = f"{100 * c.win_rate:.1f} % ({100 * c.win_rate_low:.1f} to {100 * c.win_rate_high:.1f})"
        lines.append(f"| {c.model} | {c.scorer} | {c.mean_base:.4g} | {c.mean:.4g} | {difference} | {rate} | {c.p_value_holm:.2g} |")
    return "\n".join(lines) + "\n"
