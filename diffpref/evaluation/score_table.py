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

from diffpref.evaluation.combine import RULES
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


@dataclass(frozen=True)
class Combined:
    """The verdict of all scorers together on a model against the base."""

    model: str
    rule: str
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    undecided: float  # share of the pictures
    num_prompts: int


TOGETHER = ("mean_z", "log_sigmoid", "majority", "pareto")
"""Rules of `combine` that differ between two pictures; win_count is majority there."""


def combine_scorers(model: str, base: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> list[Combined]:
    """Every rule's verdict between the model's and the base's picture; scores are (P, S) each. Empty for fewer than two scorers.

    Prompts that a scorer refused are left out, and so are scorers that give every picture the same score.
    """
    shared = [name for name in scores if name in base]
    if len(shared) < 2:
        return []
    known = np.all([np.isfinite(base[n]) & np.isfinite(scores[n]) for n in shared], axis=0).all(1)
    shape = (int(known.sum()), next(iter(base.values())).shape[1])
    pairs = {n: np.stack([scores[n][known].ravel(), base[n][known].ravel()], 1) for n in shared}
    pairs = {n: values for n, values in pairs.items() if values.size and values.std() > 0}
    found = []
    for rule in TOGETHER if len(pairs) > 1 else ():
        verdict = RULES[rule](pairs)[:, 0, 1].reshape(shape)
        shares = ((verdict > 0) + 0.5 * (verdict == 0)).mean(1)
        low, high = wilson_interval(float(shares.sum()), len(shares))
        found.append(Combined(model, rule, float(shares.mean()), low, high, float((verdict == 0).mean()), len(shares)))
    return found


def combined_markdown(combined: Sequence[Combined]) -> str:
    """The verdicts of all scorers together as a table for people."""
    lines = ["| model | all scorers together | win rate (95 %) | undecided |", "|---|---|---|---|"]
    for c in combined:
        rate = f"{100 * c.win_rate:.1f} % ({100 * c.win_rate_low:.1f} to {100 * c.win_rate_high:.1f})"
        lines.append(f"| {c.model} | {c.rule} | {rate} | {100 * c.undecided:.1f} % |")
    return "\n".join(lines) + "\n"


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
