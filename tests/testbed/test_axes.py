"""MCDPO's axes on the testbed's pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from diffpref.data.pairs import load_pairs
from diffpref.testbed.axes_results import ENDS, axes_table, with_axes
from diffpref.testbed.recipe import read_recipe
from diffpref.testbed.users import Candidates, write_user_pairs
from tests.testbed.test_users import candidates  # noqa: F401  # base samples of 40 prompts


def test_axes_are_read_from_the_pictures(candidates: Candidates, tmp_path: Path) -> None:  # noqa: F811
    write_user_pairs(candidates, tmp_path)
    table = with_axes(pq.read_table(tmp_path / "left+high" / "train.parquet"))
    (tmp_path / "axes").mkdir()
    pq.write_table(table, tmp_path / "axes" / "train.parquet")
    pairs = load_pairs(str(tmp_path / "axes"), check_images=False)
    assert set(read_recipe("mcdpo")["axes"]) == set(ENDS.values()) <= set(pairs.scores)
    for axis, wanted in (("left", 0.7), ("high", 0.7)):
        scores = np.asarray(pairs.scores[axis])  # (N, 2)
        assert scores.min() >= 0
        assert scores.max() <= 1
        p0 = np.array([pairs.row(i).p0 for i in range(len(pairs))])
        moved = scores[:, 0] != scores[:, 1]
        assert ((scores[:, 0] > scores[:, 1]) == (p0 > 0.5))[moved].mean() > wanted  # what this user prefers has more of it


def test_table() -> None:
    row = {sign: {name: 0.5 for name in ENDS.values()} | {"follow": -0.01} for sign in "+-"}
    text = axes_table({"axes": {"left": row | {"between_ends": {"mean": 1.0, "low": 0.5, "high": 1.5}}}})
    assert "| -left | +0.50 | +0.50 | +0.50 | +0.50 | -0.010 |" in text
    assert text.endswith("between the ends: left 1.00 (0.50 to 1.50)")
