"""The written report: promised keys, nothing unescaped, nothing fetched, numbers that a browser and a parser can read."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpref.evaluation.chart import finite_runs, interval_bar, line_chart, nice_ticks, thinned, tick_labels
from diffpref.evaluation.report import THIS_RUN, Control, ImplicitAccuracy, Picture, Report, as_json, three_lines, write_report

EVIL = "a <script>alert('x')</script> & \"cross\""
VOID = {"meta", "img", "br", "link", "input"}


def report(**changes: Any) -> Report:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    minimal = Report(
        title="a run",
        summary="One model was aligned.",
        win_rate=0.75,
        win_rate_low=0.7,
        win_rate_high=0.8,
        num_prompts=400,
        score_base=0.5,
        score_aligned=0.6,
        score_difference=0.1,
        score_difference_low=0.08,
        score_difference_high=0.12,
        best_of_n_equivalent=4.2,
        best_of_n_reached=True,
        best_of_n_samples=16,
        prompt_following_base={"colour": 0.9, "shape": 0.8},
        prompt_following_aligned={"colour": 0.91, "shape": 0.79},
        score_parts_base={"upright": 0.5},
        score_parts_aligned={"upright": 0.7},
        diversity={"hue": 0.9, "mean": 0.9},
        controls=[Control("shuffled labels", 0.5, 0.45, 0.55, 400, THIS_RUN)],
        implicit_accuracy=ImplicitAccuracy(0.68, 0.8, 1000, [("0 to 499", 0.7), ("500 to 999", 0.6)]),
        settings={"beta": 2000.0, "steps": 100},
        timings={"training": 75.0},
        pictures=[Picture("a red circle", 7, pixels, 255 - pixels, 0.4, 0.7)],
        curves={"loss": {"loss": [(0, 0.7), (10, 0.6)]}},
    )
    return dataclasses.replace(minimal, **changes)


class Page(HTMLParser):
    """Collects tags and attributes, and fails on an element that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(folder: Path, found: Report) -> tuple[str, dict[str, Any]]:
    page = write_report(found, folder)
    assert page == folder / "report.html"
    return page.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_json_has_every_field_but_the_pictures(tmp_path: Path) -> None:
    _, numbers = written(tmp_path / "new" / "run", report())
    assert set(numbers) == {field.name for field in dataclasses.fields(Report)} - {"pictures"}
    assert numbers["win_rate"] == 0.75
    assert numbers["best_of_n_equivalent"] == 4.2
    assert numbers["prompt_following_aligned"] == {"colour": 0.91, "shape": 0.79}
    assert numbers["controls"][0]["measured"] == "this run"
    assert numbers["curves"] == {"loss": {"loss": [[0, 0.7], [10, 0.6]]}}


def test_json_keeps_the_promised_keys() -> None:
    promised = {"win_rate", "win_rate_low", "win_rate_high", "num_prompts", "score_base", "score_aligned", "best_of_n_equivalent"}
    assert promised | {"prompt_following_base", "prompt_following_aligned", "controls"} <= set(as_json(report()))


def test_unknown_numbers_are_null_and_read_as_such(tmp_path: Path) -> None:
    odd = report(
        win_rate_low=math.nan,
        win_rate_high=math.nan,
        score_difference=np.float32("nan"),
        diversity={"hue": math.inf, "mean": math.nan},
        curves={"loss": {"loss": [(0, math.nan), (10, np.float32(0.5))], "empty": []}},
        implicit_accuracy=ImplicitAccuracy(0.6, math.nan, 10),
    )
    page, numbers = written(tmp_path, odd)
    assert "NaN" not in (tmp_path / "report.json").read_text(encoding="utf-8")
    assert numbers["win_rate_low"] is None
    assert numbers["diversity"] == {"hue": None, "mean": None}
    assert numbers["curves"]["loss"]["loss"] == [[0, None], [10, 0.5]]
    assert "n/a" in page
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page))
    assert "unknown" in three_lines(odd)
    assert "nan" not in three_lines(odd)


def test_a_value_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="no counterpart in JSON"):
        as_json(report(settings={"folder": Path("x")}))


@pytest.mark.reliability("S13")
def test_all_text_is_escaped(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    page, _ = written(
        tmp_path,
        report(
            title=EVIL,
            summary=EVIL,
            score_name=EVIL,
            prompt_following_base={EVIL: 0.5},
            score_parts_aligned={EVIL: 0.5},
            diversity={EVIL: 0.5},
            controls=[Control(EVIL, 0.5, 0.4, 0.6, 9, EVIL, EVIL)],
            implicit_accuracy=ImplicitAccuracy(0.5, 0.9, 3, [(EVIL, 0.5)]),
            settings={EVIL: EVIL},
            timings={EVIL: 1.0},
            pictures=[Picture(EVIL, 0, pixels, pixels, 0.0, 0.0)],
            pictures_note=EVIL,
            curves={EVIL: {EVIL: [(0, 1.0), (1, 2.0)]}},
        ),
    )
    assert "script" not in Page(page).tags
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 18


def test_page_is_self_contained(tmp_path: Path) -> None:
    page, _ = written(tmp_path, report())
    found = Page(page)
    assert not re.search(r"https?://", page.replace("http://www.w3.org/2000/svg", ""))
    assert {"script", "link", "iframe", "object"}.isdisjoint(found.tags)
    assert all(value.startswith("data:image/png;base64,") for name, value in found.values if name == "src")
    assert not [name for name, _ in found.values if name.startswith("on") or name == "href"]
    assert "url(" not in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in [value for _, value in found.values]
    assert "prefers-color-scheme: dark" in page


def test_embedded_pictures_are_the_given_ones(tmp_path: Path) -> None:
    found = report()
    page, _ = written(tmp_path, found)
    sources = [value.partition(",")[2] for name, value in Page(page).values if name == "src"]
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    np.testing.assert_array_equal(pixels, [found.pictures[0].base, found.pictures[0].aligned])
    assert "+0.300" in page


def test_large_pictures_are_reduced_without_distortion(tmp_path: Path) -> None:
    pixels = np.zeros((512, 1024, 3), np.uint8)
    page, _ = written(tmp_path, report(pictures=[Picture("wide", 0, pixels, pixels, 0.0, 0.0)]))
    source = next(value for name, value in Page(page).values if name == "src").partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (256, 128)


@pytest.mark.parametrize("pixels", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)])
def test_a_wrong_picture_is_refused_and_nothing_is_written(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        write_report(report(pictures=[Picture("x", 0, pixels, pixels, 0.0, 0.0)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rewriting_leaves_only_the_two_files(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    _, numbers = written(tmp_path, report(title="second"))
    assert numbers["title"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_empty_parts_leave_no_headings(tmp_path: Path) -> None:
    empty: dict[str, Any] = {
        name: {} for name in ("prompt_following_base", "prompt_following_aligned", "diversity", "settings", "timings", "curves")
    }
    empty |= {"score_parts_base": {}, "score_parts_aligned": {}, "controls": [], "pictures": [], "implicit_accuracy": None}
    page, _ = written(tmp_path, report(**empty))
    assert "h2" not in Page(page).tags
    assert "75.0&nbsp;%" in page


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.6, 0.8, "lies above"), (0.2, 0.4, "lies below"), (0.45, 0.55, "no difference can be claimed")]
)
def test_the_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, words: str) -> None:
    page, _ = written(tmp_path, report(win_rate_low=low, win_rate_high=high))
    assert words in page


def test_three_lines_say_the_result() -> None:
    lines = three_lines(report()).splitlines()
    assert len(lines) == 3
    assert "75.0 %" in lines[0]
    assert "400 prompts" in lines[0]
    assert "best of 4.2" in lines[1]
    assert "85.0 % -> 85.0 %" in lines[2]
    beyond = three_lines(report(best_of_n_reached=False, best_of_n_equivalent=16.0, prompt_following_base={"a": 0.1, "all": 0.3}))
    assert "more than 16" in beyond
    assert "30.0 %" in beyond


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.37, 0.412), (3.0, 3.0), (0.0, 0.0), (1e-7, 3e-7), (990.0, 100_300.0)])
def test_ticks_enclose_the_range_and_their_labels_differ(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert len(set(tick_labels(ticks))) == len(ticks)


def test_thinning_keeps_the_mean_and_short_lines() -> None:
    points = [(float(step), float(step**2)) for step in range(1000)]
    short = thinned(points, 100)
    assert len(short) == 100
    np.testing.assert_allclose(np.mean(short, axis=0), np.mean(points, axis=0))
    assert thinned(points[:100], 100) == points[:100]


def test_a_gap_splits_a_line() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, 1.0), (3.0, 2.0)]
    assert list(finite_runs(points)) == [[(0.0, 1.0)], [(2.0, 1.0), (3.0, 2.0)]]
    chart = line_chart({"x": points})
    assert chart.count("<circle") == 1
    assert chart.count("<polyline") == 1


def test_chart_points_lie_inside_the_picture() -> None:
    chart = line_chart({"a": [(0.0, -5.0), (7.0, 12.0)], "b": [(3.0, 4.0)]})
    path = re.search(r'points="([^"]*)"', chart)
    assert path
    placed = np.array([pair.split(",") for pair in path[1].split()], float)
    assert np.all(placed >= 0)
    assert np.all(placed <= [480, 250])
    assert placed[0, 0] < placed[1, 0]
    assert placed[0, 1] > placed[1, 1]  # larger values stand higher
    assert "No values" in line_chart({"a": [(0.0, math.nan)]})


def test_interval_bar_stays_on_its_scale() -> None:
    assert "whisker" in interval_bar(0.7, 0.6, 0.8)
    assert "whisker" not in interval_bar(0.7, math.nan, 0.8)
    assert 'class="fill"' not in interval_bar(math.nan, 0.1, 0.2)
    assert 'width="120.0"' in interval_bar(7.0, math.nan, math.nan)
