"""Pictures and scores are kept as they are made: interrupted work goes on, ranks share it, contracts are checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpref.evaluation.generate import Drawing
from diffpref.inference import pictures
from diffpref.inference.pictures import draw_missing, picture_path, read_measured, score_missing
from diffpref.models.backbone import load_pipeline

PROMPTS = [f"a red circle, number {i}" for i in range(5)]
DRAWING = Drawing(PROMPTS, 2, 100, 2, 1.0, 4)


def mean(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """A scorer."""
    return np.array([np.asarray(image).mean() for image in images])


@pytest.fixture
def drawn(sd_folder: Path, tmp_path: Path) -> Path:
    """A folder with all pictures of one model."""
    assert draw_missing(tmp_path, "base", DRAWING, lambda: load_pipeline(str(sd_folder))) == 10
    return tmp_path


def test_every_picture_has_its_own_seed(drawn: Path) -> None:
    assert DRAWING.seeds.tolist() == [[100, 101], [102, 103], [104, 105], [106, 107], [108, 109]]
    found = {picture_path(drawn, "base", i, k).read_bytes() for i in range(5) for k in range(2)}
    assert len(found) == 10


def test_missing_pictures_are_drawn_again_and_no_others(drawn: Path, sd_folder: Path) -> None:
    lost = picture_path(drawn, "base", 3, 1)
    before = {p: np.asarray(Image.open(p)).astype(int) for p in (drawn / "pictures" / "base").iterdir()}
    lost.write_bytes(lost.read_bytes()[:-20])  # as a disk that lost power leaves it
    times = {p: p.stat().st_mtime_ns for p in before if p != lost}
    assert draw_missing(drawn, "base", DRAWING, lambda: load_pipeline(str(sd_folder))) == 1
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert np.abs(np.asarray(Image.open(lost)).astype(int) - before[lost]).max() <= 1  # drawn in another batch: rounding

    def never() -> Any:
        raise AssertionError("loaded although nothing is missing")

    assert draw_missing(drawn, "base", DRAWING, never) == 0


def test_two_ranks_draw_what_one_draws(drawn: Path, sd_folder: Path) -> None:
    other = drawn / "other"
    counts = [draw_missing(other, "base", DRAWING, lambda: load_pipeline(str(sd_folder)), rank, 2) for rank in (0, 1)]
    assert counts == [6, 4]
    for i in range(5):
        for k in range(2):
            one, two = (np.asarray(Image.open(picture_path(f, "base", i, k))).astype(int) for f in (drawn, other))
            assert np.abs(one - two).max() <= 1  # another batch: rounding


def test_scores_are_read_back_in_place(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK", 2)
    assert score_missing(drawn, "base", DRAWING, {"mean": mean}, rank=1, world=2) == 1
    assert score_missing(drawn, "base", DRAWING, {"mean": mean}) == 2
    assert score_missing(drawn, "base", DRAWING, {"mean": mean}) == 0
    found = read_measured(drawn, "base", DRAWING)
    assert found.scores["mean"].shape == (5, 2)
    for i in range(5):
        for k in range(2):
            assert found.scores["mean"][i, k] == np.asarray(Image.open(picture_path(drawn, "base", i, k))).mean()
    assert found.thumbnails.shape == (5, 2, 32, 32, 3)
    assert set(found.statistics) == {"saturation", "contrast", "sharpness", "jpeg_size"}


def test_a_scorer_that_breaks_its_contract_is_named(drawn: Path) -> None:
    with pytest.raises(ValueError, match=r"scorer 'odd' returned shape \(10, 1\) for 10 pictures"):
        score_missing(drawn, "base", DRAWING, {"odd": lambda images, prompts: np.zeros((len(images), 1))})
    assert not list((drawn / "scores").glob("base-*"))


def test_a_refused_picture_costs_its_own_row_only(drawn: Path) -> None:
    def choosy(images: Any, prompts: Sequence[str]) -> np.ndarray:
        if any(prompt.endswith("3") for prompt in prompts):
            raise ValueError("no threes")
        return mean(images, prompts)

    score_missing(drawn, "base", DRAWING, {"mean": mean, "choosy": choosy})
    found = read_measured(drawn, "base", DRAWING)
    assert np.isnan(found.scores["choosy"]).tolist() == [[i == 3] * 2 for i in range(5)]
    assert np.array_equal(found.scores["choosy"][:3], found.scores["mean"][:3])
    assert found.problems == {(3, 0): "choosy: no threes", (3, 1): "choosy: no threes"}
