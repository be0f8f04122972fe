"""The page of a report: one self-contained HTML file, no script, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffpref.evaluation.chart import interval_bar, line_chart
from diffpref.evaluation.style import STYLE_SHEET

if TYPE_CHECKING:  # report.py imports this module; only the annotations need it back
    from diffpref.evaluation.report import Control, ImplicitAccuracy, Picture, Report

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LARGEST_PICTURE = 256
"""Longer side of an embedded picture in pixels: dozens of full-size ones would make the page unwieldy."""
_SMALL_PICTURE = 128
"""Pictures up to this width are enlarged to it, pixel by pixel."""
_SAME = 5e-4
"""A difference in score that would read 0.000 is not coloured as a gain or a loss."""
_SAME_SHARE = 0.01
"""Nor is a change of prompt following below one point: it is within the noise of a few hundred prompts."""


def render_page(report: Report) -> str:
    """The whole page as text. All text of the report is escaped; a number that is not finite reads n/a.

    Raises:
        ValueError: a picture is not uint8 (H, W, 3).
    """
    sections = [
        _headline(report),
        _pictures(report),
        _controls(report),
        _columns(_prompt_following(report), _score_parts(report)),
        _columns(_diversity(report.diversity), _implicit_accuracy(report.implicit_accuracy)),
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
        f'<p class="label">Win rate against the base model</p><p class="big">{_percent(report.win_rate)}</p></div>'
        f'<div class="hero-side">{interval_bar(report.win_rate, low, high, "accent")}{_SCALE}'
        f'<p class="interval">95&nbsp;% interval {_range(low, high, _percent)}, {report.num_prompts:,} prompts</p></div></div>'
        f"<p>Both models draw every prompt from the same seed. A <b>win</b> is a prompt on which the aligned picture has the higher "
        f"{html.escape(report.score_name)}; a tie counts one half. Two equal models would stand at 50&nbsp;%. {verdict}</p>"
        f'<div class="facts">{_score_fact(report)}{_best_of_n_fact(report)}</div></section>\n'
    )


def _score_fact(report: Report) -> str:
    low, high = report.score_difference_low, report.score_difference_high
    return (
        f'<div class="fact"><p class="label">Mean {html.escape(report.score_name)}</p>'
        f'<p class="number">{_number(report.score_base)} &rarr; {_number(report.score_aligned)}</p>'
        f"<p>Base, then aligned, averaged over the prompts. The difference is {_signed(report.score_difference)}, "
        f"95&nbsp;% interval {_range(low, high, _signed)}.</p></div>"
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
        number = _fixed(n, 1)
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
    return _section("Side by side", text, f'<div class="cards">{cards}</div>')


def _picture_card(picture: Picture, score_name: str) -> str:
    change = picture.score_aligned - picture.score_base
    figures = "".join(
        f'<div>{_image(pixels, f"{side}: {picture.prompt}")}<p class="side">{side} <b>{_number(score)}</b></p></div>'
        for side, pixels, score in (("base", picture.base, picture.score_base), ("aligned", picture.aligned, picture.score_aligned))
    )
    return (
        f'<figure><div class="pair">{figures}</div><figcaption>{html.escape(picture.prompt)}<br>'
        f'<span class="{_tone(change)}">{html.escape(score_name)} {_signed(change)}</span> '
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
    head = ("Compared with the base", _SCALE, "Win rate and interval", "Prompts", "Measured")
    return _section("Controls", text, _table(head, rows, "controls"))


def _row_of(control: Control) -> list[str]:
    return _control_row(control.name, control.note, control.win_rate, control.low, control.high, control.num_prompts, control.measured)


def _control_row(
    name: str, note: str, win_rate: float, low: float, high: float, num_prompts: int, measured: str, style: str = ""
) -> list[str]:
    about = f'<div class="muted">{html.escape(note)}</div>' if note else ""
    return [
        f"<b>{html.escape(name)}</b>{about}",
        interval_bar(win_rate, low, high, style),
        f'<b>{_percent(win_rate)}</b><div class="muted">{_range(low, high, _percent)}</div>',
        f"{num_prompts:,}",
        html.escape(measured),
    ]


def _prompt_following(report: Report) -> str:
    if not report.prompt_following_base and not report.prompt_following_aligned:
        return ""
    rows = [
        [html.escape(name), _percent(base), _percent(aligned), _toned(aligned - base, _points(aligned - base), _SAME_SHARE)]
        for name, base, aligned in _paired(report.prompt_following_base, report.prompt_following_aligned)
    ]
    text = (
        "Share of pictures that show what the prompt states. Alignment should raise the score without lowering these; the change is in "
        "percentage points."
    )
    return _section("Prompt following", text, _table(("Stated in the prompt", "Base", "Aligned", "Change"), rows))


def _score_parts(report: Report) -> str:
    if not report.score_parts_base and not report.score_parts_aligned:
        return ""
    rows = [
        [html.escape(name), _number(base), _number(aligned), _toned(aligned - base, _signed(aligned - base))]
        for name, base, aligned in _paired(report.score_parts_base, report.score_parts_aligned)
    ]
    text = f"What the {html.escape(report.score_name)} is made of, each part averaged over the prompts."
    return _section("Parts of the score", text, _table(("Part", "Base", "Aligned", "Change"), rows))


def _diversity(diversity: Mapping[str, float]) -> str:
    if not diversity:
        return ""
    rows = [[html.escape(name), interval_bar(ratio / 2, math.nan, math.nan), _fixed(ratio, 2)] for name, ratio in diversity.items()]
    text = (
        "How much the pictures of comparable prompts still differ in what the score does not ask for: the spread of the aligned model "
        "divided by that of the base. 1.00 (the line) is as varied as before; below it the aligned model repeats itself."
    )
    return _section("Diversity", text, _table(("Attribute", '<span class="scale"><i>0</i><i>1</i><i>2</i></span>', "Ratio"), rows, "bars"))


def _implicit_accuracy(found: ImplicitAccuracy | None) -> str:
    if found is None:
        return ""
    text = (
        f"On {found.num_pairs:,} held-out pairs the model's own implicit reward puts the chosen picture first in "
        f"<b>{_percent(found.accuracy)}</b>. Guessing gives 50&nbsp;%; labels are noisy, so that even a perfect judge would agree with "
        f"{_percent(found.label_ceiling)} of them."
    )
    if math.isnan(found.label_ceiling):
        text = text.partition("; labels")[0] + "."
    if found.by_timestep:
        text += " By noise level, least noise first:"
    rows = [[html.escape(name), interval_bar(share, math.nan, math.nan), _percent(share)] for name, share in found.by_timestep]
    table = _table(("Timesteps", _SCALE, "Accuracy"), rows, "bars") if rows else ""
    return _section("Agreement with held-out labels", text, table)


def _curves(report: Report) -> str:
    panels = "".join(
        f'<div class="panel"><h3>{html.escape(title)}</h3>{line_chart(series)}</div>' for title, series in report.curves.items() if series
    )
    if not panels:
        return ""
    return _section("Training", "Recorded while training, by optimizer step.", f'<div class="panels">{panels}</div>')


def _settings(report: Report) -> str:
    settings = [[html.escape(name), html.escape(str(value))] for name, value in report.settings.items()]
    timings = [[html.escape(name), _duration(seconds)] for name, seconds in report.timings.items()]
    tables = [
        f"<div>{_table(head, rows, 'plain')}</div>"
        for head, rows in ((("Setting", "Value"), settings), (("Stage", "Time"), timings))
        if rows
    ]
    return _section("Settings and time", "", f'<div class="panels">{"".join(tables)}</div>') if tables else ""


_SCALE = '<span class="scale"><i>0&nbsp;%</i><i>50&nbsp;%</i><i>100&nbsp;%</i></span>'


def _columns(*sections: str) -> str:
    """Sections side by side where the screen is wide enough; an empty one leaves its room to the other."""
    return f'<div class="columns">{"".join(sections)}</div>' if any(sections) else ""


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{body}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _paired(base: Mapping[str, float], aligned: Mapping[str, float]) -> list[tuple[str, float, float]]:
    return [(name, base.get(name, math.nan), aligned.get(name, math.nan)) for name in dict.fromkeys([*base, *aligned])]


def _tone(change: float, same: float = _SAME) -> str:
    return "gain" if change >= same else "loss" if change <= -same else "muted"


def _toned(change: float, text: str, same: float = _SAME) -> str:
    return f'<span class="{_tone(change, same)}">{text}</span>'


def _known(value: float, text: str) -> str:
    return text.replace("-", "&minus;") if math.isfinite(value) else "n/a"


def _fixed(value: float, decimals: int) -> str:
    return _known(value, f"{value:.{decimals}f}")


def _percent(share: float) -> str:
    return _known(share, f"{100 * share:.1f}&nbsp;%")


def _points(difference: float) -> str:
    return _known(difference, f"{100 * difference + 0.0:+.1f}")


def _number(value: float) -> str:
    return _known(value, f"{value:.{_decimals(value)}f}")


def _signed(value: float) -> str:
    return _known(value, f"{value:+.{_decimals(value)}f}")


def _decimals(value: float) -> int:
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


def _range(low: float, high: float, form: Callable[[float], str]) -> str:
    return f"{form(low)} to {form(high)}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
