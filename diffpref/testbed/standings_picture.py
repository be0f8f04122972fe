"""The picture of the leaderboard: win rates of every method in the three regimes, with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffpref.evaluation.stats import wilson_interval
from diffpref.testbed.stored_runs import Results, Rows

SCALE = 2  # drawn at twice the size, then reduced
LEFT, RIGHT, TOP, ROW, BOTTOM, WIDTH = 150, 30, 56, 30, 44, 860
SERIES = (
    ("own pairs", {"regime": "own"}, (31, 95, 170), "dot"),
    ("worse generator", {"regime": "mismatch"}, (214, 120, 30), "dot"),
    ("noisy labels", {"regime": "noisy"}, (60, 140, 80), "dot"),
    ("shuffled labels", {"labels": "shuffled"}, (120, 120, 120), "ring"),
    ("inverted labels", {"labels": "inverted"}, (190, 60, 70), "ring"),
)


def draw_standings(results: Results, methods: Sequence[str], path: Path) -> None:
    """Write a PNG with a row per method, best first."""
    height = TOP + ROW * max(len(methods), 1) + BOTTOM
    picture = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
    pen = ImageDraw.Draw(picture)
    _scale(pen, height)
    for i, method in enumerate(methods):
        y = TOP + ROW * (i + 0.5)
        if i % 2 == 0:
            pen.rectangle(_box(0, y - ROW / 2, WIDTH, y + ROW / 2), fill=(247, 248, 250))
            _lines(pen, y - ROW / 2, y + ROW / 2)
        _text(pen, (LEFT - 12, y), method, anchor="rm")
        for k, (_, which, colour, mark) in enumerate(SERIES):
            rows = results.rows(method, **which)
            if rows is not None:
                _mark(pen, rows, y + (k - 2) * 3.4, colour, mark)
    picture.resize((WIDTH, height), Image.Resampling.LANCZOS).save(path)


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    return x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, anchor: str, size: int = 13) -> None:
    pen.text((at[0] * SCALE, at[1] * SCALE), text, fill=(40, 40, 40), font=ImageFont.load_default(size * SCALE), anchor=anchor)


def _scale(pen: ImageDraw.ImageDraw, height: int) -> None:
    """Grid, percentages below, legend above."""
    _lines(pen, TOP, height - BOTTOM)
    for tenth in range(0, 11, 2):
        _text(pen, (_x(tenth / 10), height - BOTTOM + 14), f"{10 * tenth} %", anchor="mm", size=12)
    _text(pen, (_x(0.5), height - 12), "win rate against the base model, 500 test prompts, 95 % intervals", anchor="mm", size=12)
    x = LEFT
    for name, _, colour, mark in SERIES:
        _symbol(pen, x, 26, colour, mark)
        _text(pen, (x + 10, 26), name, anchor="lm")
        x += 136


def _lines(pen: ImageDraw.ImageDraw, top: float, bottom: float) -> None:
    for tenth in range(11):
        middle = tenth == 5
        pen.line(_box(_x(tenth / 10), top, _x(tenth / 10), bottom), fill=(90, 90, 90) if middle else (225, 225, 225), width=SCALE)


def _mark(pen: ImageDraw.ImageDraw, rows: Rows, y: float, colour: tuple[int, int, int], mark: str) -> None:
    low, high = wilson_interval(rows.win_rate * len(rows.base), len(rows.base))
    pen.line(_box(_x(low), y, _x(high), y), fill=colour, width=SCALE)
    _symbol(pen, _x(rows.win_rate), y, colour, mark)


def _symbol(pen: ImageDraw.ImageDraw, x: float, y: float, colour: tuple[int, int, int], mark: str) -> None:
    r = 4.2
    pen.ellipse(_box(x - r, y - r, x + r, y + r), fill=colour if mark == "dot" else "white", outline=colour, width=2 * SCALE)
