"""Our training step against the bare arithmetic, the step as it is usually written, and peers' scripts, on one GPU without a network.

    python benchmarks/bench_gpu.py --folder FOLDER --all --diffusers SCRIPT --salesforce SCRIPT
    python benchmarks/bench_gpu.py --table benchmarks/results/gpu-<card>.json

First comes the gate: on every path that is timed, an untouched policy has to answer as its reference; times on a path that does not
are void. Contestants run one after the other, forwards and then backwards through their case (A B B A), because two of them would not
fit into the memory together. Nothing is begun when --minutes are over; every case is kept at once in
benchmarks/results/gpu-<card>.json and every turn in the folder, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import packages  # noqa: F401

# isort: split
import parts
import torch
from bench_cpu import HERE, ROOT
from contest import contest, ratios
from cost_model import tflop_per_pair
from gpu_cases import (
    CASES,
    NUMERICS,
    PATIENCE,
    PEERS,
    SIDES,
    Case,
    build_cache,
    contestant,
    fixtures,
    our_flags,
    small_case,
    smaller,
    words,
)
from parts import Stored

from diffpref.training.run_folder import write_json

MEMORY = 0.8
"""The target for our peak memory over a peer's with as many pairs per step."""
Scripts = Mapping[str, Path | None]
Parts = dict[str, Callable[[], dict[str, Any]]]


def numerics(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Logits of an untouched policy on one path, pair by pair."""
    place, side = fixtures(folder, "sdxl", tiny), 64 if tiny else SIDES["sdxl"]
    flags = our_flags(place, side, (smaller(NUMERICS[name]) if tiny else NUMERICS[name]) | {"preflight": "warn"})
    build_cache(flags)
    try:
        said = parts.run_program([sys.executable, str(HERE / "untouched.py"), "--batches", "3", *words(flags)], PATIENCE)
    finally:
        parts.clear(place / "runs")
    return json.loads(said.splitlines()[-1])


def timing(name: str, folder: Path, scripts: Scripts, tiny: bool) -> dict[str, Any]:
    """Seconds per pair, rounds and peak memory of every contestant of a case, and how it compares with ours.

    Turns are kept in the folder as they are taken, so that a case that was cut off goes on with the next one.
    """
    case = small_case(CASES[name]) if tiny else CASES[name]
    place = fixtures(folder, case.family, tiny)
    able = [who for who, entry in case.entries.items() if entry.who not in PEERS or scripts.get(entry.who)]
    order, file = [*able, *reversed(able)], place / "turns" / f"{name.replace(' ', '_')}.json"
    kept = parts.read(file)
    turns = kept["turns"] if kept.get("order") == order else []
    file.parent.mkdir(exist_ok=True)
    try:
        for who in order[len(turns) :]:
            earlier = next((turn for other, turn in zip(order, turns, strict=False) if other == who), {})
            turns.append(earlier if "failed" in earlier else taken(who, place, case, scripts, tiny))
            write_json(file, {"order": order, "turns": turns})
            parts.clear(place / "runs")
    finally:
        parts.clear(place / "runs")
    there = dict(zip(able, turns, strict=False))
    back = dict(zip(reversed(able), turns[len(able) :], strict=False))
    found = {who: joined(there[who], back[who]) for who in able}
    sound = {who: seen for who, seen in found.items() if "failed" not in seen}
    first = able[0]
    compared = {who: ratios(sound, slower=who, faster=first) for who in sound if who != first and first in sound}
    file.unlink()
    without = sorted({entry.who for entry in case.entries.values()} & set(PEERS) - {who for who in PEERS if scripts.get(who)})
    return {"entrants": found, "ratios": compared, "without": without}


def taken(who: str, place: Path, case: Case, scripts: Scripts, tiny: bool) -> dict[str, Any]:
    """One process's rounds, or its error: a peer that has no room must not cost the others' numbers."""
    steps = {"rounds": 1, "steps": 2, "warm_up": 1} if tiny else {"rounds": 2, "steps": 5, "warm_up": 5}
    try:
        entrant = contestant(place, case, case.entries[who], scripts)
        return contest({who: entrant}, place / "logs", unit="wall", patience=PATIENCE, **steps)[who]
    except (RuntimeError, OSError) as error:
        return {"failed": str(error)[-parts.LAST_WORDS :]}


def joined(there: dict[str, Any], back: dict[str, Any]) -> dict[str, Any]:
    """Both turns of a contestant; an error of either is the result. The longer start compiled, the shorter one may have found the code."""
    for turn in (there, back):
        if "failed" in turn:
            return turn
    rounds = there["rounds"] + back["rounds"]
    most = {key: max(there[key], back[key]) for key in ("seconds_to_first_step", "peak_bytes")}
    return back | {"rounds": rounds, "seconds_per_item": statistics.median(rounds)} | most


def calibration(side: int = 8192) -> dict[str, Any]:
    """TFLOP/s of a product of matrices in bf16, the yardstick of this card."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        float((a @ b)[0, 0])  # waits for the device
        seconds.append((time.perf_counter() - start) / 11)
    return {"bf16_product_tflops": 2 * side**3 / statistics.median(seconds[1:]) / 1e12}


def profile(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """The kernels that take longest in three steps of ours."""
    case = small_case(CASES[name]) if tiny else CASES[name]
    place = fixtures(folder, case.family, tiny)
    command = contestant(place, case, case.entries["ours"], {}).command()
    table = place / "kernels.txt"
    command[2:2] = ["--profile", str(table), "--limit", "7"]
    try:
        parts.run_program(command, PATIENCE)
    finally:
        parts.clear(place / "runs")
    return {"kernels": table.read_text().splitlines()}


def wanted_parts(folder: Path, scripts: Scripts, tiny: bool) -> Parts:
    """Name -> what measures it, in this order."""
    found: Parts = {f"numerics: {name}": functools.partial(numerics, name, folder, tiny) for name in NUMERICS}
    found["calibration"] = functools.partial(calibration, 256 if tiny else 8192)
    found |= {f"timing: {name}": functools.partial(timing, name, folder, scripts, tiny) for name in CASES}
    return found | {f"profile: {name}": functools.partial(profile, name, folder, tiny) for name in list(CASES)[:1]}


def judge(stored: Stored) -> None:
    """Mark the times whose path has not passed its numerics."""
    for name, case in CASES.items():
        found, gate = stored.get(f"timing: {name}"), stored.get(f"numerics: {case.path}", {})
        if found is None:
            continue
        found.pop("void", None)
        if not gate.get("passed"):
            why = "have not been measured" if not gate else "failed" if "failed" in gate else f"gave a logit of {gate['largest_logit']:.2g}"
            found["void"] = f"the numerics of {case.path!r} {why}"


def table(stored: Stored) -> str:
    """Markdown: the numbers of every contestant, then the ratios to ours with their targets."""
    product = stored.get("calibration", {}).get("bf16_product_tflops")
    columns = ["case", "who", "pairs/s", "peak GB", "start, s", "hours for 100,000 pairs", "useful TFLOP/s", "of the card's product"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, case in CASES.items():
        found = stored.get(f"timing: {name}", {})
        lines += [f"| {name} | failed: {last_line(error)} | | | | | | |" for error in parts.failures(found)]
        entrants = {who: seen for who, seen in found.get("entrants", {}).items() if "failed" not in seen}
        lines += [f"| {title(name, found)} | {who} | {numbers(case, who, seen, product)} |" for who, seen in entrants.items()]
    columns = ["ours, as many times as", "ratio", "least and largest", "target", f"peak memory at equal pairs, target {MEMORY}"]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, case in CASES.items():
        found = stored.get(f"timing: {name}", {})
        for who, ratio in found.get("ratios", {}).items():
            goal = f"{case.ratio:g}" if case.ratio and case.entries[who].who in PEERS else ""
            spread = f"{ratio['least']:.2f} to {ratio['largest']:.2f}"
            room = memory(case, found["entrants"], who)
            lines.append(f"| {title(name, found)}: {who} | {ratio['ratio']:.2f} | {spread} | {goal} | {room} |")
    return "\n".join(lines)


def last_line(text: str) -> str:
    """Of an error, what says most; without the bars of a table."""
    return text.strip().rpartition("\n")[2].replace("|", "/")


def title(name: str, found: Mapping[str, Any]) -> str:
    """A case, and why its numbers do not count if they do not."""
    return f"{name} (void: {found['void']})" if "void" in found else name


def numbers(case: Case, who: str, seen: Mapping[str, Any], product: float | None) -> str:
    """The cells of a contestant. Hours include its start with compiling, not the building of a cache."""
    each, start = seen["seconds_per_item"], seen["seconds_to_first_step"]
    goal = f", target {case.pairs_per_second:g}" if who == "ours" and case.pairs_per_second else ""
    useful = tflop_per_pair(case.work, case.family, "lora" if "LoRA" in case.path else "full") / each if case.work else None
    share = f"{100 * useful / product:.0f} %" if useful and product else ""
    cells = [f"{1 / each:.2f}{goal}", f"{seen['peak_bytes'] / 1e9:.1f}", f"{start:.0f}", f"{(start + 1e5 * each) / 3600:.1f}"]
    return " | ".join([*cells, f"{useful:.0f}" if useful else "", share])


def memory(case: Case, found: Mapping[str, Any], peer: str) -> str:
    """Our peak over a peer's with as many pairs, the least of our entries; empty where there is none."""
    pairs = case.entries[peer].pairs
    same = [who for who, entry in case.entries.items() if entry.who == "ours" and entry.pairs == pairs]
    peaks = [found[who]["peak_bytes"] for who in same if "peak_bytes" in found.get(who, {})]
    return f"{min(peaks) / found[peer]['peak_bytes']:.2f}" if peaks and case.entries[peer].who in PEERS else ""


def add_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    """Flags of this program and of the pack."""
    parser.add_argument("--folder", type=Path, help="for models, caches and runs: 20 GB")
    parser.add_argument("--minutes", type=float, default=minutes, help="begin nothing after this long")
    parser.add_argument("--again", action="store_true", help="repeat parts that have failed")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, metavar="SCRIPT", help="the peer's training script; left out if not given")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny networks, also on a CPU: a test of this program, not a measurement")


def go(args: argparse.Namespace, start: str, wanted: Parts, scripts: Scripts) -> int:
    """Do what is missing, print the table and the last line; the exit code."""
    if args.folder is None:
        sys.exit("give --folder")
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("there is no GPU; --tiny tests this program without one")
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    given = {peer for peer, script in scripts.items() if script}
    path = parts.results_file(start, args.tiny, args.results)
    stored = parts.carry_out(path, wanted, minutes=args.minutes, given=given, again=args.again, judged=judge)
    print(table(stored))
    text, code = parts.summary(stored, wanted, given)
    print(text)
    return code


def main() -> int:
    """Measure what is missing until the time is over; 0 when everything is there and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, minutes=4)
    parser.add_argument("--all", action="store_true", help="every case; else those of --case")
    parser.add_argument("--case", action="append", choices=sorted(CASES), default=[])
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of results that are there, and nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(parts.read(args.table)))
        return 0
    scripts = {peer: getattr(args, peer) for peer in PEERS}
    every = wanted_parts(args.folder, scripts, args.tiny)
    of_cases = {f"{kind}: {name}" for name in args.case for kind in ("timing", "profile")}
    of_cases |= {f"numerics: {CASES[name].path}" for name in args.case} | {"calibration"}
    return go(args, "gpu", {name: work for name, work in every.items() if args.all or name in of_cases}, scripts)


if __name__ == "__main__":
    sys.exit(main())
