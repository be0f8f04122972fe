"""The tables, the findings and the picture of the leaderboard, made from the files of its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.evaluation.stats import best_of_n_equivalent, paired_bootstrap, wilson_interval
from diffpref.locations import asset
from diffpref.testbed.measure import shipped_ruler
from diffpref.testbed.protocol import REGIMES, Entry, Protocol
from diffpref.testbed.sampling import GUIDANCE, STEPS
from diffpref.testbed.standings_picture import draw_standings
from diffpref.testbed.stored_runs import Interval, Results, Rows


def write_standings(folder: Path, protocol: Protocol) -> None:
    """Write standings.md and standings.png from the runs in a folder, and print the tables."""
    results = Results(folder, protocol)
    ranked = order(results)
    parts = [table(results, ranked), controls_table(results, ranked), cost_table(results, ranked), correlations(results, ranked)]
    parts += [findings_table(results), choices_table(results)]
    text = "\n\n".join(parts) + "\n"
    (folder / "standings.md").write_text(text)
    draw_standings(results, ranked, folder / "standings.png")
    print(text)


def order(results: Results) -> list[str]:
    """Methods with a reported run, by their gain in the regime own."""
    gains = {method: rows.gain()[0] for method in results.protocol.entries if (rows := results.rows(method))}
    return sorted(gains, key=lambda method: -gains[method])


def table(results: Results, ranked: Sequence[str]) -> str:
    """The main table: win rates in the three regimes and at equal time, and what else became of the pictures."""
    ruler = shipped_ruler(str(asset("testbed", "pipeline")), STEPS, GUIDANCE, len(results.base_scores))
    head = (
        "| method | own: win rate | reward | best-of-N | mismatch | noisy | own, equal time "
        "| colour / background / shape / size | diversity | change |"
    )
    lines = [head, "|" + "---|" * 10]
    for method in ranked:
        own = results.rows(method)
        assert own is not None
        best = best_of_n_equivalent(ruler, float(own.scores.mean())) if ruler is not None else None
        following = " / ".join(f"{own.following(name):.3f}" for name in ("colour", "background", "shape", "size"))
        cells = [
            f"`{method}`",
            percent(own),
            signed(own.gain()),
            "-" if best is None else f"{'' if best.reached else '> '}{best.n:.1f}",
            *(percent(results.rows(method, regime)) for regime in REGIMES[1:]),
            percent(results.rows(method, budget="time")),
            following,
            f"{own.mean('diversity'):.2f}",
            f"{own.mean('picture_change'):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + untrained_lines(results))


def untrained_lines(results: Results) -> list[str]:
    """The best pixel filter and the best sampling setting, chosen on the validation prompts."""
    path = results.folder / "untrained.json"
    if not path.exists():
        return []
    found, lines = json.loads(path.read_text()), []
    for name, key in ((f"no training: {found['filter']}", "filter_result"), (f"no training: {found['setting']}", "setting_result")):
        row = found[key]
        following = " / ".join(f"{row['prompt_following_aligned'][k]:.3f}" for k in ("colour", "background", "shape", "size"))
        rate = f"{100 * row['win_rate']:.1f} % ({100 * row['win_rate_low']:.1f} to {100 * row['win_rate_high']:.1f})"
        best = f"{row['best_of_n_equivalent']:.1f}" if "best_of_n_equivalent" in row else "-"
        lines.append(
            f"| {name} | {rate} | {row['score_difference']:+.2f} | {best} | - | - | - | {following} | {row['diversity']['mean']:.2f} | - |"
        )
    return lines


def percent(rows: Rows | None) -> str:
    """Win rate over the base with its interval, and the seeds' range."""
    if rows is None:
        return "-"
    low, high = wilson_interval(rows.win_rate * len(rows.base), len(rows.base))
    each = [100 * run["win_rate"] for run in rows.runs]
    seeds = f"; {min(each):.0f}-{max(each):.0f}" if len(each) > 1 else ""
    return f"{100 * rows.win_rate:.1f} % ({100 * low:.0f} to {100 * high:.0f}{seeds})"


def signed(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval[0]:+.2f} ({interval[1]:+.2f} to {interval[2]:+.2f})"


def controls_table(results: Results, ranked: Sequence[str]) -> str:
    """What the labels did: against shuffled and inverted labels, per method, and in the noisy regime."""
    head = "| method | shuffled labels: win rate | inverted labels: win rate | reward, given above shuffled | noisy: given above shuffled |"
    lines = [head, "|---|---|---|---|---|"]
    for method in ranked:
        cells = [f"`{method}`", percent(results.rows(method, labels="shuffled")), percent(results.rows(method, labels="inverted"))]
        cells += [_above_shuffled(results, method, "own"), _above_shuffled(results, method, "noisy")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _above_shuffled(results: Results, method: str, regime: str) -> str:
    given, shuffled = results.rows(method, regime), results.rows(method, regime, "shuffled")
    return signed(given.gain(shuffled)) if given and shuffled else "-"


def cost_table(results: Results, ranked: Sequence[str]) -> str:
    """Cost per pair, and errors on held-out pairs."""
    head = (
        "| method | UNet evaluations per pair: with gradient + without | CPU seconds per pair | peak memory | updates at equal time "
        "| held-out: accuracy | chosen error | rejected error |"
    )
    lines = [head, "|" + "---|" * 8]
    reference = results.cost("diffusion_dpo")
    for method in ranked:
        own, cost = results.rows(method), results.cost(method)
        if cost is None or reference is None or own is None:
            continue
        updates = results.protocol.updates * reference["cpu_seconds_per_update"] / cost["cpu_seconds_per_update"]
        cells = [
            f"`{method}`",
            f"{2 * cost['evaluations_with_gradient']:.1f} + {2 * cost['evaluations_without_gradient']:.1f}",
            f"{cost['cpu_seconds_per_update'] / results.protocol.pairs_per_update:.4f}",
            f"{cost['peak_memory_mb']:.0f} MB",
            f"{updates:.0f}",
            f"{100 * own.held_out('implicit_accuracy'):.0f} %",
            f"{-own.held_out('gain_chosen'):+.4f}",
            f"{-own.held_out('gain_rejected'):+.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correlations(results: Results, ranked: Sequence[str]) -> str:
    """Spearman's correlation of the methods' order between regimes."""
    gains = {regime: {m: rows.gain()[0] for m in ranked if (rows := results.rows(m, regime))} for regime in REGIMES}
    found = []
    for i, a in enumerate(REGIMES):
        for b in REGIMES[i + 1 :]:
            common = [m for m in gains[a] if m in gains[b]]
            if len(common) > 2:
                found.append(f"{a} and {b} {spearman([gains[a][m] for m in common], [gains[b][m] for m in common]):+.2f} ({len(common)})")
    return "Rank correlation of the order between regimes (number of methods): " + ("; ".join(found) or "not measured yet") + "."


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences without ties."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def choices_table(results: Results) -> str:
    """Every setting that was tried, on the validation prompts."""
    lines = ["| method | settings tried: reward on the validation prompts |", "|---|---|"]
    for method, entry in results.protocol.entries.items():
        paths = [results.folder / f"{run.name}.json" for run in results.protocol.choices(method)]
        if all(path.exists() for path in paths):
            rows = [json.loads(path.read_text()) for path in paths]
            lines.append(f"| `{method}` | " + "; ".join(_tried(entry, i, row) for i, row in enumerate(rows)) + " |")
    return "\n".join(lines)


def _tried(entry: Entry, i: int, row: dict[str, Any]) -> str:
    settings = ", ".join(f"{name} {value:g}" for name, value in entry.grid[i].items())
    return f"{settings}: {row['score_difference']:+.2f}"


@dataclass(frozen=True)
class Finding:
    """One published claim as a test of the testbed, written down before the first run."""

    claim: str
    shown_if: str
    measure: Callable[[Results], Interval | None]
    """A number with its interval that is above 0 where the claim holds; none when runs are missing."""
    also: Callable[[Results], bool] = lambda _: True
    """What has to hold beside it."""


def _difference(a: Rows | None, b: Rows | None) -> Interval | None:
    return a.gain(b) if a and b else None


def _sft_hurts(results: Results) -> Interval | None:
    rows = results.rows("sft", "mismatch")
    return paired_bootstrap(rows.base - rows.scores) if rows else None


def _mapo_under_mismatch(results: Results) -> Interval | None:
    rows = [results.rows(method, regime) for regime in ("mismatch", "own") for method in ("mapo", "diffusion_dpo")]
    if not all(rows):
        return None
    mapo_far, dpo_far, mapo_near, dpo_near = (row.scores for row in rows if row)
    return paired_bootstrap((mapo_far - dpo_far) - (mapo_near - dpo_near))


def _winner_error(results: Results) -> Interval | None:
    guarded, plain = results.rows("diffusion_sdpo"), results.rows("diffusion_dpo")
    if not (guarded and plain):
        return None
    gaps = [a["held_out"]["gain_chosen"] - b["held_out"]["gain_chosen"] for a, b in zip(guarded.runs, plain.runs, strict=False)]
    return float(np.mean(gaps)), float(min(gaps)), float(max(gaps))


def _random_labels(results: Results) -> Interval | None:
    given, shuffled = results.rows("diffusion_dpo"), results.rows("diffusion_dpo", labels="shuffled")
    return paired_bootstrap(0.2 * (given.scores - given.base) - (shuffled.scores - shuffled.base)) if given and shuffled else None


def _lengths(results: Results) -> list[Rows] | None:
    """Trainings on the scorer's labels, from the shortest to the longest."""
    rows = [results.rows("diffusion_dpo", labels="scorer", budget=budget) for budget in ("pairs", "times4", "times12")]
    return [row for row in rows if row] if all(rows) else None


def _over_optimised(results: Results) -> Interval | None:
    """The true reward lost from the better of the shorter trainings to the longest."""
    rows = _lengths(results)
    return max(rows[:-1], key=lambda row: row.scores.mean()).gain(rows[-1]) if rows else None


def _proxy_rose(results: Results) -> bool:
    proxies = [float(np.mean([run["proxy"]["aligned"] for run in row.runs])) for row in _lengths(results) or ()]
    return len(proxies) == 3 and proxies[-1] > max(proxies[:-1])


FINDINGS = (
    Finding("SFT hurts when the base is better than the data", "regime mismatch: the base's reward above SFT's", _sft_hurts),
    Finding(
        "MaPO gains under reference mismatch",
        "MaPO above Diffusion-DPO by more in mismatch than in own",
        _mapo_under_mismatch,
    ),
    Finding(
        "InPO needs fewer pairs than Diffusion-DPO",
        "InPO with half of the pairs above Diffusion-DPO with all of them",
        lambda r: _difference(r.rows("inpo", budget="half"), r.rows("diffusion_dpo")),
    ),
    Finding(
        "SmPO helps with noisy labels",
        "regime noisy: SmPO above Diffusion-DPO on the same scorer's labels",
        lambda r: _difference(r.rows("smpo", "noisy"), r.rows("diffusion_dpo", "noisy", "scorer")),
    ),
    Finding(
        "SDPO lowers the winner's error",
        "held-out error of chosen pictures below Diffusion-DPO's (mean and range over seeds)",
        _winner_error,
    ),
    Finding("random labels gain little", "shuffled labels gain less than a fifth of what given labels gain", _random_labels),
    Finding(
        "training long against a proxy over-optimises",
        "the scorer's labels, 12 times as long: the scorer still rises and the true reward is below a shorter training's",
        _over_optimised,
        _proxy_rose,
    ),
    Finding(
        "KTO works from unpaired labels",
        "Diffusion-KTO above its shuffled labels",
        lambda r: _difference(r.rows("diffusion_kto"), r.rows("diffusion_kto", labels="shuffled")),
    ),
)


def findings_table(results: Results) -> str:
    """Each claim: shown, when the whole interval is above 0; not shown otherwise."""
    lines = ["| published finding | counts as shown if | measured (95 %) | here |", "|---|---|---|---|"]
    for finding in FINDINGS:
        found = finding.measure(results)
        here = "not measured yet" if found is None else "shown" if found[1] > 0 and finding.also(results) else "not shown"
        number = "-" if found is None else f"{found[0]:+.4f} ({found[1]:+.4f} to {found[2]:+.4f})"
        lines.append(f"| {finding.claim} | {finding.shown_if} | {number} | {here} |")
    return "\n".join(lines)
