"""Pieces of HTML that the report pages share. Cells are HTML already; text is escaped by its author."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

SAME = 5e-4
"""A difference in score that would read 0.000 is not coloured as a gain or a loss."""
SAME_SHARE = 0.01
"""Nor is a change of prompt following below one point: it is within the noise of a few hundred prompts."""

SCALE = '<span class="scale"><i>0&nbsp;%</i><i>50&nbsp;%</i><i>100&nbsp;%</i></span>'


def columns(*sections: str) -> str:
    """Sections side by side where the screen is wide enough; an empty one leaves its room to the other."""
    return f'<div class="columns">{"".join(sections)}</div>' if any(sections) else ""


def section(title: str, text: str, body: str) -> str:
    """A titled section."""
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{body}</section>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def tone(change: float, same: float = SAME) -> str:
    """CSS class of a change: gain, loss or muted."""
    return "gain" if change >= same else "loss" if change <= -same else "muted"


def toned(change: float, text: str, same: float = SAME) -> str:
    """Text in the colour of a change."""
    return f'<span class="{tone(change, same)}">{text}</span>'


def known(value: float, text: str) -> str:
    """The text, or n/a for a number that is not finite."""
    return text.replace("-", "&minus;") if math.isfinite(value) else "n/a"


def fixed(value: float, decimals: int) -> str:
    """With a fixed number of decimals."""
    return known(value, f"{value:.{decimals}f}")


def percent(share: float) -> str:
    """A share as a percentage."""
    return known(share, f"{100 * share:.1f}&nbsp;%")


def points(difference: float) -> str:
    """A difference of shares in points."""
    return known(difference, f"{100 * difference + 0.0:+.1f}")


def number(value: float) -> str:
    """With decimals that suit its size."""
    return known(value, f"{value:.{decimals(value)}f}")


def signed(value: float) -> str:
    """With its sign."""
    return known(value, f"{value:+.{decimals(value)}f}")


def decimals(value: float) -> int:
    """Decimals that suit a size."""
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


def interval(low: float, high: float, form: Callable[[float], str]) -> str:
    """ "low to high"."""
    return f"{form(low)} to {form(high)}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
