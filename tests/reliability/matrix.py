"""The fault matrix: its cases in words, and the table of docs/reliability.md, made from measured runs:

    pytest -m "reliability or reliability_full" --fault-results=full.json
    python tests/reliability/any_script.py ... --json theirs.json -- train.py ...
    python tests/reliability/matrix.py --ours full.json --theirs theirs.json

keep what was measured in benchmarks/results/reliability.json and write the table into the page; without arguments only the latter.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "reliability.md", ROOT / "benchmarks" / "results" / "reliability.json"
BEGIN, END = "<!-- fault matrix: written by tests/reliability/matrix.py -->", "<!-- end of the fault matrix -->"

CASES = {  # case -> (what happens, what the test demands)
    "R1": ("nothing, twice", "two runs are equal; and the same cases find a careless script out"),
    "R2": ("stop in every part of an epoch, and after a step of every recipe, LoRA and all weights, one and two processes", "exact"),
    "R3": ("SIGKILL in five phases of a save", "exact; lost at most an interval, nothing after the rename"),
    "R4": ("SIGKILL at random moments, half of them in saves", "exact whenever a run ends in between; never unreadable"),
    "R5": ("disk full from the start, in one fsync, at the manifest", "bytes named, older checkpoints kept, no leftovers, exact"),
    "R6": (
        "SIGTERM, SIGINT, SIGUSR1 in a step, in a save, while loading; a second one in a step and in a save",
        "saved, exit 143 or 130, exact; the second ends at once and harms nothing",
    ),
    "R7": (
        "newest checkpoint cut, one bit flipped, files or manifest gone or broken, empty, wrong step in its name",
        "the one before, and a warning; exact",
    ),
    "R8": ("all checkpoints damaged", "exit 2, nothing starts over; begins again with --restart"),
    "R9": ("one checkpoint kept, SIGKILL in the next save", "the one before is there; exact"),
    "R10": ("one process, then two, then one with joined parts and a worker", "the same steps: equal, 1e-5 for a joined part"),
    "R11": (
        "resume with another rate, method, beta, data or model",
        "exit 2, names the setting, changes nothing; goes on with --allow_change",
    ),
    "R12": ("resume identity", "into the same parameters, all tensors used"),
    "R13": ("checkpoint of another format, a stored one of this format", "refused by number; read as it was"),
    "R14": ("a second run in the folder", "exit 5 at once, the first is exact"),
    "R15": ("read-only folder; folder that vanishes", "exit 2; exit 4 after three tries"),
    "D1": ("truncated pictures", "the row is set aside; the run ends as without it"),
    "D2": ("bytes that are no picture, none, of a wrong type", "the same"),
    "D3": ("decompression bombs", "the same, by the header; memory stays"),
    "D4": ("CMYK, palette, 16 bit, 1 bit, EXIF, grey", "defined pixels: the same in another form train the same"),
    "D5": ("other sizes in a pair", "defined rule"),
    "D6": ("columns missing or renamed", "refused with the nearest names"),
    "D7": ("labels that are none", "as D1; ties counted"),
    "D8": ("captions that are none, odd ones", "as D1; odd ones are captions"),
    "D9": ("no rows, fewer than a batch", "refused, or a defined last batch"),
    "D10": ("data truncated or changed", "file named; resume refused"),
    "D11": ("worker killed, worker that fails or hangs", "replaced once at the same place, exact; time limit"),
    "D12": (
        "latent cache damaged, foreign, interrupted",
        "noticed, a flipped bit when its row is read; mended by the command named, exact",
    ),
    "D13": ("too many bad rows", "exit 2 with the reasons"),
    "N1": ("gradient that is not finite, on one of two processes", "skipped on both, pairs named"),
    "N2": ("three in a row; learning rate 1e12", "exit 3, checkpoints finite"),
    "N3": ("base weights or latents that are not finite", "refused before they are used or kept"),
    "N4": ("a save of what is not finite", "not written"),
    "N5": ("policy that is not its reference at the start", "refused"),
    "O1": ("out of memory in the first and in the eighth step", "exit 6, counted state and what fits; exact after it"),
    "O2": ("a picture too large for a worker's memory", "exit 6, names the workers; goes on after it"),
    "M1": ("SIGKILL of one of two processes in a step, in a save, while loading", "both end; exact"),
    "M2": ("one of two leaves, fails, hangs", "the other ends"),
    "M3": ("SIGTERM to one of two, to torchrun", "both save the same step; exact"),
    "M4": ("two processes with other settings or data", "exit 2, nothing written"),
    "M5": ("weights that differ between processes", "found at a save"),
    "H1": ("hub busy, silent, breaking off, unknown", "tried again; else exit 2 and the way without it; half files never used"),
    "H2": ("upload fails, tracker fails", "exit 0, an event, the model is there"),
    "H3": ("everything local", "no connection, no name asked for"),
    "S1": ("pickles in six clothes, checkpoints of other programs", "refused, never run"),
    "S2": ("hostile safetensors", "one line within a second, memory stays"),
    "S3": ("code beside a model", "never run"),
    "S4": ("archives with paths, links, bombs", "nothing outside is read or written"),
    "S5": ("other image formats", "as D1"),
    "S6": ("hostile YAML", "refused"),
    "S7": ("words for a shell", "only words"),
    "S8": ("links, .. and other people's files in the way", "refused; private until complete"),
    "S9": ("tokens", "nowhere in what is written"),
    "S10": ("a server for everybody", "none in the code; a run listens nowhere"),
    "S13": ("hostile prompts on pages", "shown as text"),
}


def number(case: str) -> tuple[str, int]:
    """To sort by."""
    return case[0], int(case[1:])


def as_table(found: dict[str, Any]) -> str:
    """The block of the page between its marks."""
    ours, theirs = found["ours"], found["theirs"]
    other = {row["case"]: row for row in theirs["rows"]}
    lines = [
        BEGIN,
        f"Measured in one run on {ours['date']}, {ours['machine']}, in {ours['seconds'] / 60:.0f} minutes. The last column: "
        f"{theirs['script']}. {ours.get('note', '')}".rstrip(),
        "",
        "| case | what happens | demanded | tries | steps lost, at most | passed | the other script |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(ours["rows"], key=lambda row: "RDNOMHS".index(row["case"][0]) * 100 + number(row["case"])[1]):
        what, demanded = CASES[row["case"]]
        seen = other.get(row["case"])
        told = "" if seen is None else "yes" if seen["passed"] else f"**no**: {seen['note']}"
        told = re.sub(r"/\S+/", "", told).replace("|", "/")
        verdict = "yes" if row["passed"] else "**no**"
        lines.append(f"| {row['case']} | {what} | {demanded} | {row['tried']} | {row['lost']} | {verdict} | {told} |")
    return "\n".join([*lines, END])


def main() -> None:
    """Store new results if given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, help="what --fault-results wrote")
    parser.add_argument("--theirs", type=Path, help="what any_script.py wrote for another script")
    parser.add_argument("--script", help="what to call that script")
    given = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.ours:
        found["ours"] = json.loads(given.ours.read_text())
    if given.theirs:
        found["theirs"] = {"script": given.script, "rows": json.loads(given.theirs.read_text())}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + as_table(found) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
