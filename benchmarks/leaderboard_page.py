"""Write what the leaderboard has measured into the pages: tables into docs/leaderboard.md, a line into each method's page and the README.

    python scripts/testbed_leaderboard.py --only_tables
    python benchmarks/leaderboard_page.py

reads the stored runs and the tables beside them, and changes nothing outside of the marks on the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from diffpref.testbed.protocol import Protocol, load_protocol
from diffpref.testbed.stored_runs import Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, README = ROOT / "benchmarks/results/leaderboard", ROOT / "docs/leaderboard.md", ROOT / "README.md"
END = "<!-- end of leaderboard -->"


def in_words(results: Results, method: str) -> str:
    """A method's result in one sentence."""
    rows = results.rows(method)
    if rows is None:
        return f"`{method}`: not measured yet."
    gain, low, high = rows.gain()
    wins = [100 * run["win_rate"] for run in rows.runs]
    text = (
        f"`{method}` wins {100 * rows.win_rate:.1f} % of the prompts against the base ({min(wins):.0f} to {max(wins):.0f} over the seeds)"
    )
    text += f", reward {gain:+.2f} ({low:+.2f} to {high:+.2f})"
    for labels in ("shuffled", "inverted"):
        if control := results.rows(method, labels=labels):
            text += f"; {100 * control.win_rate:.1f} % with {labels} labels"
    further = {
        "on pictures of another generator": results.rows(method, "mismatch"),
        "with noisy labels": results.rows(method, "noisy"),
        "with Diffusion-DPO's CPU time": results.rows(method, budget="time"),
    }
    for words, other in further.items():
        text += f"; {100 * other.win_rate:.1f} % {words}" if other else ""
    return text + "."


def method_page(text: str, results: Results) -> str:
    """A page whose blocks `<!-- leaderboard: method ... -->` say what was measured."""

    def block(match: re.Match[str]) -> str:
        said = "\n".join(in_words(results, method) for method in match[1].split())
        return f"<!-- leaderboard: {match[1]} -->\nMeasured on the [leaderboard](../leaderboard.md): {said}\n{END}"

    return re.sub(rf"<!-- leaderboard: ([\w ]+) -->.*?{END}", block, text, flags=re.DOTALL)


def leaderboard_page(text: str, results: Results, protocol: Protocol) -> str:
    """The page with its tables."""
    done = sum(1 for path in results.folder.glob("*-[0-9]*.json"))
    tables = (results.folder / "standings.md").read_text().strip()
    missing = [method for method in protocol.entries if results.rows(method) is None]
    note = f"{done} training runs. " + (f"Not measured yet: {', '.join(f'`{m}`' for m in missing)}." if missing else "")
    return re.sub(
        rf"<!-- leaderboard -->.*?{END}", lambda _: f"<!-- leaderboard -->\n{note.strip()}\n\n{tables}\n{END}", text, flags=re.DOTALL
    )


def readme(text: str, results: Results, protocol: Protocol) -> str:
    """The README with the last column of its table of methods; rows of methods outside of the protocol stay."""

    def cell(match: re.Match[str]) -> str:
        names = match[2].split(", ")
        if not set(names) <= protocol.entries.keys():
            return match[0]
        found = [results.rows(name) for name in names]
        said = "; ".join("not yet" if rows is None else f"{100 * rows.win_rate:.0f} %, {rows.gain()[0]:+.2f}" for rows in found)
        return f"{match[1]}{'not yet' if set(said.split('; ')) == {'not yet'} else said} |"

    return re.sub(r"^(\| [^|\n]+ \| `([\w, ]+)` \| [^|\n]+ \| \[page\]\([^|\n]+\) \| )[^|\n]+ \|$", cell, text, flags=re.MULTILINE)


def pages() -> dict[Path, str]:
    """Every page as it should read."""
    protocol = load_protocol()
    results = Results(RESULTS, protocol)
    found = {path: method_page(path.read_text(), results) for path in sorted((ROOT / "docs/methods").glob("*.md"))}
    return found | {
        PAGE: leaderboard_page(PAGE.read_text(), results, protocol),
        README: readme(README.read_text(), results, protocol),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
