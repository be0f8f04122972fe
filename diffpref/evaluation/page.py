"""The page of a report: one self-contained HTML file, no script, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffpref.evaluation import parts
from diffpref.evaluation.chart import interval_bar, line_chart
from diffpref.evaluation.style import STYLE_SHEET

if TYPE_CHECKING:  # report.py imports this module; only the annotations need it back
    from diffpref.evaluation.report import Control, ImplicitAccuracy, Picture, Report

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LARGEST_PICTURE = 256
"""Longer side of an embedded picture in pixels: dozens of full-size ones would make the page unwieldy."""
_SMALL_PICTURE = 128
"""Pictures up to this width are enlarged to it, pixel by pixel."""


def render_page(report: Report) -> str:
    """The whole page as text. All text of the report is escaped; a number that is not finite reads n/a.

    Raises:
        ValueError: a picture is not uint8 (H, W, 3).
    """
    sections = [
        _headline(report),
        _pictures(report),
        _controls(report),
        parts.columns(_prompt_following(report), _score_parts(report)),
        parts.columns(_diversity(report.diversity), _implicit_accuracy(report.implicit_accuracy)),
        _curves(report),
        _settings(report),
    ]
    title = html.escape(report.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{title}</h1><p class="lead">{html.escape(report.summary)}</p></header>\n'
        f"{''.join(sections)}"
        f'<footer class="muted">The file report.json beside this page holds the same numbers.</footer>\n</main>\n</body>\n</html>\n'
    )


def _headline(report: Report) -> str:
    low, high = report.win_rate_low, report.win_rate_high
    verdict = "The interval includes 50&nbsp;%: on this many prompts no difference can be claimed."
    if low > 0.5:
        verdict = "The whole interval lies above 50&nbsp;%: the aligned model wins more often than it loses."
    elif high < 0.5:
        verdict = "The whole interval lies below 50&nbsp;%: the aligned model loses more often than it wins."
    elif math.isnan(low + high):
        verdict = ""
    return (
        '<section class="headline"><div class="hero"><div>'
        f'<p class="label">Win rate against the base model</p><p class="big">{parts.percent(report.win_rate)}</p></div>'
        f'<div class="hero-side">{interval_bar(report.win_rate, low, high, "accent")}{parts.SCALE}'
        f'<p class="interval">95&nbsp;% interval {parts.interval(low, high, parts.percent)}, {report.num_prompts:,} prompts</p></div></div>'
        f"<p>Both models draw every prompt from the same seed. A <b>win</b> is a prompt on which the aligned picture has the higher "
        f"{html.escape(report.score_name)}; a tie counts one half. Two equal models would stand at 50&nbsp;%. {verdict}</p>"
        f'<div class="facts">{_score_fact(report)}{_best_of_n_fact(report)}</div></section>\n'
    )


def _score_fact(report: Report) -> str:
    low, high = report.score_difference_low, report.score_difference_high
    return (
        f'<div class="fact"><p class="label">Mean {html.escape(report.score_name)}</p>'
        f'<p class="number">{parts.number(report.score_base)} &rarr; {parts.number(report.score_aligned)}</p>'
        f"<p>Base, then aligned, averaged over the prompts. The difference is {parts.signed(report.score_difference)}, "
        f"95&nbsp;% interval {parts.interval(low, high, parts.signed)}.</p></div>"
    )


def _best_of_n_fact(report: Report) -> str:
    n, samples = report.best_of_n_equivalent, report.best_of_n_samples
    if math.isnan(n):
        return ""
    if not report.best_of_n_reached:
        number = f"&gt; {samples}"
        text = f"Even the best of {samples} base pictures per prompt scores lower, on average, than one aligned picture."
    elif n <= 1:
        number, text = "1.0", "One aligned picture scores no higher, on average, than one base picture."
    else:
        number = parts.fixed(n, 1)
        text = (
            f"To match one aligned picture, the base model must draw about {number} pictures per prompt and keep the one that scores best "
            f"(estimated from {samples} base pictures per prompt)."
        )
    return f'<div class="fact"><p class="label">Worth best-of-N of the base, N&nbsp;=</p><p class="number">{number}</p><p>{text}</p></div>'


def _pictures(report: Report) -> str:
    if not report.pictures:
        return ""
    cards = "".join(_picture_card(picture, report.score_name) for picture in report.pictures)
    note = html.escape(report.pictures_note)
    text = f"Left the base model, right the aligned model, same prompt and same seed. {note}"
    return parts.section("Side by side", text, f'<div class="cards">{cards}</div>')


def _picture_card(picture: Picture, score_name: str) -> str:
    change = picture.score_aligned - picture.score_base
    figures = "".join(
        f'<div>{_image(pixels, f"{side}: {picture.prompt}")}<p class="side">{side} <b>{parts.number(score)}</b></p></div>'
        for side, pixels, score in (("base", picture.base, picture.score_base), ("aligned", picture.aligned, picture.score_aligned))
    )
    return (
        f'<figure><div class="pair">{figures}</div><figcaption>{html.escape(picture.prompt)}<br>'
        f'<span class="{parts.tone(change)}">{html.escape(score_name)} {parts.signed(change)}</span> '
        f'<span class="muted">seed {picture.seed}</span></figcaption></figure>'
    )


def _image(pixels: np.ndarray, alt: str) -> str:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture must be uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    kind = "pixels" if picture.width <= _SMALL_PICTURE else "photo"
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{text}">'


def _controls(report: Report) -> str:
    if not report.controls:
        return ""
    own = _control_row(
        "This model", "", report.win_rate, report.win_rate_low, report.win_rate_high, report.num_prompts, "this run", "accent"
    )
    rows = [own, *(_row_of(control) for control in report.controls)]
    text = (
        "The same win rate for models that should not win, or that win by simpler means. The headline counts only as far as it stands "
        "clear of them. The line marks 50&nbsp;%, the whisker the 95&nbsp;% interval."
    )
    head = ("Compared with the base", parts.SCALE, "Win rate and interval", "Prompts", "Measured")
    return parts.section("Controls", text, parts.table(head, rows, "controls"))


def _row_of(control: Control) -> list[str]:
    return _control_row(control.name, control.note, control.win_rate, control.low, control.high, control.num_prompts, control.measured)


def _control_row(
    name: str, note: str, win_rate: float, low: float, high: float, num_prompts: int, measured: str, style: str = ""
) -> list[str]:
    about = f'<div class="muted">{html.escape(note)}</div>' if note else ""
    return [
        f"<b>{html.escape(name)}</b>{about}",
        interval_bar(win_rate, low, high, style),
        f'<b>{parts.percent(win_rate)}</b><div class="muted">{parts.interval(low, high, parts.percent)}</div>',
        f"{num_prompts:,}",
        html.escape(measured),
    ]


def _prompt_following(report: Report) -> str:
    if not report.prompt_following_base and not report.prompt_following_aligned:
        return ""
    rows = [
        [
            html.escape(name),
            parts.percent(base),
            parts.percent(aligned),
            parts.toned(aligned - base, parts.points(aligned - base), parts.SAME_SHARE),
        ]
        for name, base, aligned in _paired(report.prompt_following_base, report.prompt_following_aligned)
    ]
    text = (
        "Share of pictures that show what the prompt states. Alignment should raise the score without lowering these; the change is in "
        "percentage points."
    )
    return parts.section("Prompt following", text, parts.table(("Stated in the prompt", "Base", "Aligned", "Change"), rows))


def _score_parts(report: Report) -> str:
    if not report.score_parts_base and not report.score_parts_aligned:
        return ""
    rows = [
        [html.escape(name), parts.number(base), parts.number(aligned), parts.toned(aligned - base, parts.signed(aligned - base))]
        for name, base, aligned in _paired(report.score_parts_base, report.score_parts_aligned)
    ]
    text = f"What the {html.escape(report.score_name)} is made of, each part averaged over the prompts."
    return parts.section("Parts of the score", text, parts.table(("Part", "Base", "Aligned", "Change"), rows))


def _diversity(diversity: Mapping[str, float]) -> str:
    if not diversity:
        return ""
    rows = [[html.escape(name), interval_bar(ratio / 2, math.nan, math.nan), parts.fixed(ratio, 2)] for name, ratio in diversity.items()]
    text = (
        "How much the pictures of comparable prompts still differ in what the score does not ask for: the spread of the aligned model "
        "divided by that of the base. 1.00 (the line) is as varied as before; below it the aligned model repeats itself."
    )
    return parts.section(
        "Diversity", text, parts.table(("Attribute", '<span class="scale"><i>0</i><i>1</i><i>2</i></span>', "Ratio"), rows, "bars")
    )


def _implicit_accuracy(found: ImplicitAccuracy | None) -> str:
    if found is None:
        return ""
    text = (
        f"On {found.num_pairs:,} held-out pairs the model's own implicit reward puts the chosen picture first in "
        f"<b>{parts.percent(found.accuracy)}</b>. Guessing gives 50&nbsp;%; labels are noisy, so that even a perfect judge would agree "
        f"with {parts.percent(found.label_ceiling)} of them."
    )
    if math.isnan(found.label_ceiling):
        text = text.partition("; labels")[0] + "."
    if found.by_timestep:
        text += " By noise level, least noise first:"
    rows = [[html.escape(name), interval_bar(share, math.nan, math.nan), parts.percent(share)] for name, share in found.by_timestep]
    table = parts.table(("Timesteps", parts.SCALE, "Accuracy"), rows, "bars") if rows else ""
    return parts.section("Agreement with held-out labels", text, table)


def _curves(report: Report) -> str:
    panels = "".join(
        f'<div class="panel"><h3>{html.escape(title)}</h3>{line_chart(series)}</div>' for title, series in report.curves.items() if series
    )
    if not panels:
        return ""
    return parts.section("Training", "Recorded while training, by optimizer step.", f'<div class="panels">{panels}</div>')


def _settings(report: Report) -> str:
    settings = [[html.escape(name), html.escape(str(value))] for name, value in report.settings.items()]
    timings = [[html.escape(name), parts.duration(seconds)] for name, seconds in report.timings.items()]
    tables = [
        f"<div>{parts.table(head, rows, 'plain')}</div>"
        for head, rows in ((("Setting", "Value"), settings), (("Stage", "Time"), timings))
        if rows
    ]
    return parts.section("Settings and time", "", f'<div class="panels">{"".join(tables)}</div>') if tables else ""


def _paired(base: Mapping[str, float], aligned: Mapping[str, float]) -> list[tuple[str, float, float]]:
    return [(name, base.get(name, math.nan), aligned.get(name, math.nan)) for name in dict.fromkeys([*base, *aligned])]
