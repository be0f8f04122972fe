"""The page of an evaluation: one file that opens from disk, with a gallery to filter, sort and slide; nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffpref.evaluation import parts
from diffpref.evaluation.chart import interval_bar, line_chart, picture_file
from diffpref.evaluation.model_report import BASE, ModelReport, strength_curves
from diffpref.evaluation.score_table import Comparison
from diffpref.evaluation.style import STYLE_SHEET
from diffpref.evaluation.work import write_text

LARGEST_PICTURE = 320
"""Longer side of an embedded picture in pixels."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_GALLERY_STYLE = """
.controls-row { display: flex; flex-wrap: wrap; gap: 10px 20px; margin: 16px 0; font-size: 14px; color: var(--soft); }
.controls-row select, .controls-row input { font: inherit; color: var(--ink); background: var(--bg); border: 1px solid var(--line);
  border-radius: 4px; padding: 4px 8px; margin-left: 6px; }
.stage { position: relative; line-height: 0; }
.stage img { width: 100%; }
.stage img[src^="data:image/png"] { image-rendering: pixelated; }
.stage .over { position: absolute; inset: 0; }
.stage::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--line, 50%); width: 1px; background: #fff;
  mix-blend-mode: difference; }
figure input[type=range] { width: 100%; margin: 6px 0 0; accent-color: var(--accent); }
button { font: inherit; color: var(--ink); background: var(--track); border: 1px solid var(--line); border-radius: 4px; padding: 8px 18px;
  margin-top: 28px; cursor: pointer; }
"""
_STATISTICS = {
    "saturation": "mean saturation",
    "contrast": "spread of brightness",
    "sharpness": "spread of the Laplacian",
    "jpeg_size": "JPEG bytes per pixel",
    "diversity": "distance between the pictures of a prompt",
    "drift": "distance from the base's picture of the same seed",
}

Pictures = Callable[[str, int], np.ndarray]
"""(model, prompt index) -> uint8 (H, W, 3), its first picture."""


def write_page(report: ModelReport, folder: Path, pictures: Pictures, max_pictures: int) -> None:
    """Write report.html into `folder`, and strength-<LoRA>-<scorer>.svg where there are several strengths.

    At most max_pictures prompts are shown with their pictures.
    """
    write_text(folder / "report.html", render(report, pictures, max_pictures))
    for label, lines in strength_curves(report).items():
        for scorer, points in lines.items():
            title = f"{label}: difference of {scorer} to the base"
            write_text(folder / f"strength-{label}-{scorer}.svg", picture_file({scorer: points}, "LoRA strength", title))


def render(report: ModelReport, pictures: Pictures, max_pictures: int) -> str:
    """The whole page as text."""
    models = [name for name in report.measured if name != BASE]
    title = html.escape(f"{', '.join(models)} against {report.models[BASE].get('source', 'the base')}")
    body = "".join(
        [
            _scores(report),
            _together(report),
            _strength(report),
            _statistics(report),
            _gallery(report, pictures, max_pictures),
            _training(report),
            _facts(report),
        ]
    )
    script = Path(__file__).with_name("gallery.js").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE_SHEET}{_GALLERY_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{title}</h1><p class="lead">{html.escape(report.summary())}</p></header>\n{body}'
        f'<footer class="muted">report.json holds the same numbers, scores.parquet every score.</footer>\n</main>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _scores(report: ModelReport) -> str:
    rows = [_score_row(c, report.trained_on) for c in report.comparisons]
    head = ("Model", "Scorer", "Base", "Model mean", "Difference (95&nbsp;%)", parts.SCALE, "Win rate (95&nbsp;%)", "p")
    text = (
        "A win is a picture that scores higher than the base's of the same prompt and seed; a tie counts one half. Intervals hold over "
        "prompts; p is an exact sign test, corrected for the number of scorers."
    )
    if report.trained_on:
        text += f" {html.escape(report.trained_on)} is the score that was trained on: believe the others."
    return parts.section("Scores", text, parts.table(head, rows, "bars"))


def _score_row(c: Comparison, trained_on: str | None) -> list[str]:
    clear = c.win_rate_low > 0.5 or c.win_rate_high < 0.5
    rate = f"{parts.percent(c.win_rate)} ({100 * c.win_rate_low:.1f} to {100 * c.win_rate_high:.1f})"
    known = c.difference_low > 0 or c.difference_high < 0
    difference = parts.toned(c.difference, parts.signed(c.difference)) if known else parts.signed(c.difference)
    return [
        html.escape(c.model),
        html.escape(c.scorer) + (" <span class='muted'>(trained on)</span>" if c.scorer == trained_on else ""),
        parts.number(c.mean_base),
        parts.number(c.mean),
        f"{difference} ({parts.signed(c.difference_low)} to {parts.signed(c.difference_high)})",
        interval_bar(c.win_rate, c.win_rate_low, c.win_rate_high, "accent" if clear and c.win_rate > 0.5 else ""),
        rate,
        f"{c.p_value_holm:.2g}",
    ]


def _together(report: ModelReport) -> str:
    rows = [
        [
            html.escape(c.model),
            c.rule.replace("_", " "),
            interval_bar(c.win_rate, c.win_rate_low, c.win_rate_high, "accent" if c.win_rate_low > 0.5 else ""),
            f"{parts.percent(c.win_rate)} ({100 * c.win_rate_low:.1f} to {100 * c.win_rate_high:.1f})",
            parts.percent(c.undecided),
        ]
        for c in report.combined
    ]
    text = (
        "One verdict per picture from all scores: the mean of z-scores, the mean of log sigmoid(z), the majority, and Pareto, which "
        "decides only where no score would turn it round. Undecided counts one half."
    )
    head = ("Model", "Rule", parts.SCALE, "Win rate (95&nbsp;%)", "Undecided")
    return parts.section("All scorers together", text, parts.table(head, rows, "bars")) if rows else ""


def _strength(report: ModelReport) -> str:
    panels = [
        f'<div class="panel"><h3>{html.escape(label)}: {html.escape(name)}</h3>{line_chart({name: points}, "LoRA strength")}</div>'
        for label, lines in strength_curves(report).items()
        for name, points in lines.items()
    ]
    text = "Mean difference to the base over the strength of the adapter; beyond 1 it is extrapolated."
    return parts.section("Score against LoRA strength", text, f'<div class="panels">{"".join(panels)}</div>') if panels else ""


def _statistics(report: ModelReport) -> str:
    statistics = report.statistics()
    names = [name for name in statistics[BASE] if not all(math.isnan(values[name]) for values in statistics.values())]
    others = trained_on_and_others(report)
    rows = []
    for model, values in statistics.items():
        cells = [parts.number(values[name]) + _change(values[name], statistics[BASE][name], name, model) for name in names]
        rates = [parts.percent(rate) for rate in others.get(model, (math.nan, math.nan))] if others else []
        rows.append([html.escape(model), *rates, *cells])
    meaning = "; ".join(f"{name.replace('_', ' ')}: {_STATISTICS[name]}" for name in names)
    text = (
        "What else changed. A model that has learned to please one scorer often shows it here: more saturation, sharper noise, one "
        f"composition for all seeds. In brackets the change against the base. {html.escape(meaning)}."
    )
    if others:
        text += " A win rate that grows on the trained score alone, while the others stand still or fall, is hacking."
    head = ("Model", *(("wins, trained on", "wins, other scorers") if others else ()), *[n.replace("_", " ") for n in names])
    return parts.section("Reward hacking", text, parts.table(head, rows))


def trained_on_and_others(report: ModelReport) -> dict[str, tuple[float, float]]:
    """Model -> its win rate by the score that was trained on, and the mean of its win rates by the others; empty without both."""
    found: dict[str, tuple[float, float]] = {}
    for model in report.measured:
        own = [c.win_rate for c in report.comparisons if c.model == model and c.scorer == report.trained_on]
        rest = [c.win_rate for c in report.comparisons if c.model == model and c.scorer != report.trained_on]
        if own and rest:
            found[model] = (own[0], float(np.mean(rest)))
    return found


def _change(value: float, base: float, name: str, model: str) -> str:
    if model == BASE or name == "drift" or not (math.isfinite(value) and base):
        return ""
    return f" <span class='muted'>({100 * (value / base - 1):+.0f}&nbsp;%)</span>"


def _gallery(report: ModelReport, pictures: Pictures, max_pictures: int) -> str:
    shown = pick_prompts(report, max_pictures)
    models = list(report.measured)
    rows = [
        {
            "index": i,
            "prompt": report.prompts.texts[i],
            "group": report.prompts.groups[i],
            "pictures": {name: data_uri(pictures(name, i)) for name in models},
            "scores": {name: {s: _score(x[i, 0]) for s, x in m.scores.items()} for name, m in report.measured.items()},
        }
        for i in shown
    ]
    data = {"base": BASE, "models": [m for m in models if m != BASE], "scorers": list(report.measured[BASE].scores), "rows": rows}
    note = "" if len(shown) == len(report.prompts.texts) else _selection_note(len(shown), len(report.prompts.texts))
    controls = (
        '<div class="controls-row"><label>Model<select id="model"></select></label><label>Scorer<select id="scorer"></select></label>'
        '<label>Order<select id="sort"><option value="best">largest gain first</option><option value="worst">largest loss first</option>'
        '<option value="order">as in the set</option></select></label><label>Group<select id="group"></select></label>'
        '<label>Prompt contains<input id="text" type="search"></label><span id="count"></span></div>'
    )
    text = f"Move the line: the model's picture left of it, the base's right of it, same prompt and seed.{note}"
    # "<" would end the script element or open a comment; as an escape it reads the same in JSON.
    payload = json.dumps(data).replace("<", "\\u003c")
    cards = '<div class="cards" id="cards"></div><button id="more" hidden>Show more</button>'
    return parts.section("Pictures", text, f'{controls}{cards}<script type="application/json" id="gallery-data">{payload}</script>')


def _score(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _selection_note(shown: int, total: int) -> str:
    return f" {shown} of {total} prompts are shown: those with the largest gains and losses, and others evenly between."


def pick_prompts(report: ModelReport, count: int) -> list[int]:
    """Which prompts the page shows, ascending: all, or the largest gains and losses of the first comparison and others evenly."""
    total = len(report.prompts.texts)
    if total <= count:
        return list(range(total))
    first = report.comparisons[0]
    change = report.measured[first.model].scores[first.scorer][:, 0] - report.measured[BASE].scores[first.scorer][:, 0]
    order = np.argsort(np.nan_to_num(change), kind="stable")
    quarter = count // 4
    chosen = set(order[:quarter].tolist()) | set(order[total - quarter :].tolist())
    rest = [i for i in range(total) if i not in chosen]
    steps = np.linspace(0, len(rest) - 1, count - len(chosen)).round().astype(int)
    return sorted(chosen | {rest[k] for k in steps})


def data_uri(image: np.ndarray) -> str:
    """A picture uint8 (H, W, 3) for embedding: small ones as PNG, larger ones scaled down as JPEG."""
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if max(picture.size) <= 128:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


_CURVES: tuple[tuple[str, Sequence[str]], ...] = (
    ("Loss", ("loss",)),
    ("Implicit accuracy", ("rewards/accuracies", "eval/implicit_accuracy")),
    ("Errors of the policy", ("error/policy_chosen", "error/policy_rejected")),
)


def _training(report: ModelReport) -> str:
    panels = []
    for model, rows in report.run_metrics.items():
        for title, keys in _CURVES:
            series = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys}
            series = {key: points for key, points in series.items() if points}
            if series:
                panels.append(f'<div class="panel"><h3>{html.escape(model)}: {title}</h3>{line_chart(series)}</div>')
    text = "Recorded while training, by optimizer step."
    return parts.section("Training", text, f'<div class="panels">{"".join(panels)}</div>') if panels else ""


def _facts(report: ModelReport) -> str:
    models = [[html.escape(name), html.escape(json.dumps(origin))] for name, origin in report.models.items()]
    scorers = [[html.escape(name), html.escape(json.dumps(facts))] for name, facts in report.scorers.items()]
    settings = [[html.escape(name), html.escape(str(value))] for name, value in report.settings.items()]
    tables = [
        f"<div>{parts.table(head, rows, 'plain')}</div>"
        for head, rows in ((("Model", "From"), models), (("Scorer", "What it is"), scorers), (("Setting", "Value"), settings))
        if rows
    ]
    return parts.section("Where the numbers come from", "", f'<div class="panels">{"".join(tables)}</div>')
