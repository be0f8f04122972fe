"""Many scorers over many pictures: names, refusals, and what a refusal costs in the comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffpref.data.prompts import PromptSet
from diffpref.evaluation.generate import Drawing
from diffpref.evaluation.model_page import render
from diffpref.evaluation.model_report import BASE, rejected_rows, report_of, write_data
from diffpref.evaluation.pictures import Measured
from diffpref.evaluation.score_table import compare_model
from diffpref.evaluation.scoring import load_scorers, score_pictures, split_spec, try_scorers


def length(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """A scorer that refuses short prompts and answers infinity to "inf"."""
    if any(len(p) < 2 for p in prompts):
        raise ValueError("too\nshort")
    return np.array([np.inf if p == "inf" else len(p) for p in prompts])


def test_a_refusal_costs_its_own_row() -> None:
    calls: list[int] = []

    def counting(images: Any, prompts: Sequence[str]) -> np.ndarray:
        calls.append(len(prompts))
        return np.zeros(len(prompts))

    found = score_pictures({"length": length, "zero": counting}, [None] * 4, ["abc", "x", "inf", "ab"])
    assert found.scores["length"].tolist()[::3] == [3.0, 2.0]
    assert np.isnan(found.scores["length"][1:3]).all()
    assert found.problems == [None, "length: too short", "length: the score is inf", None]
    assert calls == [4]  # one forward pass while nothing is refused
    assert score_pictures({"length": length}, [], []).scores["length"].shape == (0,)


def test_scorers_are_tried_before_anything_is_drawn() -> None:
    try_scorers({"length": length}, ["x", "abc"])
    with pytest.raises(ValueError, match="scorer 'length' refuses a grey picture of 64 x 64 for prompt 'x': too short"):
        try_scorers({"length": length}, ["x", "y"])


def test_scorers_may_have_names_of_their_own() -> None:
    assert split_spec("pickscore") == ("pickscore", "pickscore")
    assert split_spec("pickscore=C:/x") == ("pickscore", "pickscore=C:/x")
    assert split_spec("mine:pickscore=a/b") == ("mine", "pickscore=a/b")
    loaded = load_scorers(["pickscore", "mine:pickscore=a"], lambda spec: lambda images, prompts: spec)
    assert {name: score([], []) for name, score in loaded.items()} == {"pickscore": "pickscore", "mine": "pickscore=a"}
    with pytest.raises(ValueError, match="names 'pickscore' twice; write NAME:pickscore=PLACE"):
        load_scorers(["pickscore", "pickscore=a"], lambda spec: length)
    with pytest.raises(ValueError, match="names one 'a b'"):
        load_scorers(["a b:pickscore"], lambda spec: length)


def test_a_prompt_with_a_refused_picture_does_not_count_for_that_scorer() -> None:
    base = {"s": np.array([[1.0, 1.0], [np.nan, 1.0], [2.0, 2.0]]), "t": np.zeros((3, 2))}
    model = {"s": np.array([[2.0, 2.0], [5.0, 5.0], [1.0, np.nan]]), "t": np.ones((3, 2))}
    s, t = compare_model("m", base, model)
    assert (s.num_prompts, s.wins, s.losses, s.mean_base, s.mean) == (1, 1, 0, 1.0, 2.0)
    assert t.num_prompts == 3
    with pytest.raises(ValueError, match=r"scorer 's' refused pictures of all 3 prompts; the reasons are in rejected_rows\.jsonl"):
        compare_model("m", base, {"s": np.full((3, 2), np.nan)})


def test_the_report_says_what_was_left_out(tmp_path: Path) -> None:
    prompts = PromptSet("own", ["one", "two"], ["", ""], ["entry 3: empty"])
    thumbnails = np.zeros((2, 1, 2, 2, 3), np.float32)
    refused = Measured({"s": np.array([[1.0], [np.nan]])}, {}, thumbnails, {(1, 0): "s: no"})
    whole = Measured({"s": np.array([[0.0], [1.0]])}, {}, thumbnails)
    measured = {BASE: whole, "model": refused}
    report = report_of({}, prompts, Drawing(prompts.texts, 1, 0, 2, 1.0, 2), {BASE: {}, "model": {}}, {"s": length}, measured)
    write_data(report, tmp_path)
    for text in ((tmp_path / "report.md").read_text(), render(report, lambda model, i: np.zeros((8, 8, 3), np.uint8), 5)):
        assert "1 entries of the set hold no prompt and were left out." in text
        assert "1 pictures of 1 prompts were refused by a scorer" in text
    assert json.loads((tmp_path / "report.json").read_text())["rejected_pictures"] == 1
    assert [row["reason"] for row in rejected_rows(prompts, measured)] == ["entry 3: empty", "s: no"]
    assert pq.read_table(tmp_path / "scores.parquet").column("s").to_pylist() == [0.0, 1.0, 1.0, None]
