"""What `diffpref inspect` found, as text and as a page: one self-contained file, no script, all text of the data escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from diffpref.data.inspection import PairFacts
from diffpref.evaluation import parts
from diffpref.evaluation.chart import interval_bar
from diffpref.evaluation.stats import wilson_interval
from diffpref.evaluation.style import STYLE_SHEET

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Line = tuple[str, str]


def counts(facts: PairFacts) -> list[Line]:
    """What there is."""
    users = facts.users
    spread = f"{users['fewest']:.0f} to {users['most']:.0f} pairs, median {users['median']:g}" if users else ""
    return [
        ("pairs", f"{facts.num_pairs:,}"),
        ("ties", f"{facts.num_ties:,}"),
        ("rows set aside", f"{sum(facts.rejected.values()):,}"),
        ("left out by dreamlike_pairs_only", f"{facts.num_left_out:,}"),
        ("prompts", f"{facts.num_prompts:,}; {facts.pairs_per_prompt:.1f} pairs each"),
        ("different pictures", f"{facts.num_pictures:,}; the most used one is in {facts.most_used:,} pairs"),
        ("repeated pairs", f"{facts.num_repeated:,}, {facts.num_contradictions:,} of them with the opposite label"),
        ("annotators", f"{users['number']:.0f}; {spread}" if users else "unknown"),
        ("longest caption", f"{facts.longest_caption:,} characters; {facts.num_cut_captions:,} captions are cut by the text encoder"),
    ]


def labels(facts: PairFacts) -> list[Line]:
    """Which way they point."""
    return [
        ("first picture preferred", f"{100 * facts.share_first:.1f} % of the decided pairs"),
        ("labels between 0 and 1", f"{facts.num_soft:,}"),
        *((f"agreement with {name}", _agreement(facts, name)) for name in facts.agreement),
    ]


def _agreement(facts: PairFacts, name: str) -> str:
    seen = facts.agreement[name]
    if not seen.compared:
        return f"no pair has both scores ({seen.missing:,} missing)"
    low, high = wilson_interval(seen.agreeing, seen.compared)
    missing = f", {seen.missing:,} without scores" if seen.missing else ""
    return f"{seen.agreeing / seen.compared:.1%} of {seen.compared:,} pairs, 95 % interval {low:.1%} to {high:.1%}{missing}"


def pictures(facts: PairFacts) -> list[Line]:
    """How large they are."""
    enlarged = ", ".join(f"{share:.1%} more than {factor} times" for factor, share in facts.enlarged.items())
    return [
        *((f"shorter side {name} pixels", f"{number:,}") for name, number in facts.sizes.items() if number),
        (f"enlarged at resolution {facts.resolution}", enlarged),
        ("pairs of unequal sizes", f"{facts.num_unequal:,}"),
        ("longest side to shortest", f"{facts.widest_ratio:.2f}"),
    ]


def as_text(facts: PairFacts) -> str:
    """For a terminal. Control characters of the data are shown as escapes."""
    blocks = [("Pairs", counts(facts)), ("Labels", labels(facts)), ("Pictures", pictures(facts))]
    text = [f"{facts.source!r}"]
    for title, lines in blocks:
        text += ["", title, *(f"  {name:<34}{value}" for name, value in lines)]
    if facts.rejected:
        text += ["", "Set aside", *(f"  {number:>8,}  {_plain(facts.examples[kind])}" for kind, number in facts.rejected.items())]
    found = facts.warnings()
    text += ["", *(f"look: {_plain(line)}" for line in found)] if found else ["", "nothing stands out"]
    return "\n".join(text)


def _plain(text: str) -> str:
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def as_page(facts: PairFacts) -> str:
    """The whole page as text."""
    title = html.escape(f"Preference pairs: {facts.source}")
    found = facts.warnings()
    points = "".join(f"<li>{html.escape(line)}</li>" for line in found)
    verdict = f"<p>Worth a look before training:</p><ul>{points}</ul>" if found else "<p>Nothing stands out.</p>"
    rejected = [[f"{number:,}", html.escape(kind), html.escape(facts.examples[kind])] for kind, number in facts.rejected.items()]
    total = max(1, facts.num_pictures)
    sizes = [
        [html.escape(name), interval_bar(number / total, math.nan, math.nan, reference=0.0), f"{number:,}"]
        for name, number in facts.sizes.items()
    ]
    sections = [
        f'<section class="headline">{verdict}</section>',
        parts.columns(parts.section("Pairs", "", _table(counts(facts))), parts.section("Labels", "", _table(labels(facts)))),
        parts.section(
            "Pictures",
            f"By the shorter side, in pixels; at resolution {facts.resolution} smaller pictures are enlarged.",
            parts.table(["shorter side", "share", "pictures"], sizes, "bars") + _table(pictures(facts)[-3:]),
        ),
        parts.section("Set aside", "", parts.table(["rows", "what", "the first of them"], rejected)) if rejected else "",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{title}</h1></header>\n{''.join(sections)}"
        f'<footer class="muted">The file pairs.json beside this page holds the same numbers.</footer>\n</main>\n</body>\n</html>\n'
    )


def _table(lines: Sequence[Line]) -> str:
    return parts.table(["", ""], [[html.escape(name), html.escape(value)] for name, value in lines])
