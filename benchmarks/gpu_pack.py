"""Everything that a GPU is wanted for, in the order of its worth: for whoever has a card.

    python benchmarks/gpu_pack.py --folder FOLDER --minutes 4 [--only numerics] [--diffusers SCRIPT] [--salesforce SCRIPT]

1. Numerics: on every path that can be switched on, an untouched policy answers as its reference.
2. Every method on 64 pairs with the real SDXL configuration at 1024 pixels, twice through them: losses and implicit accuracy.
3. The testbed with 100 M parameters at 128 pixels, and the core rows of its leaderboard with their controls (large_testbed.py).
4. A calibration of the card, timings beside peers, and the kernels that take longest (bench_gpu.py).

Weights are random and made here; no network is needed. Every finished part is kept at once in benchmarks/results/gpu-pack-<card>.json
with date, card and versions; nothing is begun after --minutes, a part takes up to 6 more, and the same command goes on with what is
missing. A part that fails is noted with its error and not repeated, unless --again; it and times whose numerics have not passed make the
exit code 1. In half an hour come the numerics and a part of the rest: --only timing, after them, brings the times forward. It needs
20 GB of disk and a card of 80 GB.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import packages  # noqa: F401

# isort: split
import bench_gpu
import numpy as np
import parts
import pyarrow as pa
import pyarrow.parquet as pq
from bench_cpu import HERE, ROOT
from gpu_cases import LORA, PAIRS, PATIENCE, PEERS, SIDES, build_cache, fixtures, our_flags, smaller, words
from large_testbed import NAMES

from diffpref.methods.recipes import RECIPES

PASSES = 2  # through the pairs
FIRST = ("diffusion_dpo", "mapo", "inpo", "smpo", "diffusion_kto", "dspo")
NOT_TRIED = {
    **dict.fromkeys(("dense_reward", "spo", "spo_sdxl", "tailor_po"), "samples its own pairs and needs a step-aware scorer"),
    **dict.fromkeys(("ppd", "mcdpo"), "needs embeddings of users or axes"),
    "smpo_pickscore": "is smpo with another range of scores",
}
EDITS = {"caption_edits": "red green blue"}
LISTS = {"train_batch_size": 2}  # of four pictures each
EXTRA: dict[str, dict[str, Any]] = {
    "inversion_dpo": {"num_steps": 2, "train_batch_size": 1},
    "odpo": {"score": "quality"},
    "smpo": {"score": "quality"},
    **dict.fromkeys(("dcpo", "tdpo", "tkto"), EDITS),
    **dict.fromkeys(("lipo", "list_mle", "rank_dpo"), LISTS),
}
"""What a recipe needs beside the common settings."""


def methods() -> list[str]:
    """Recipes that are tried on the pairs, the best known first."""
    return [name for name in [*FIRST, *(name for name in RECIPES if name not in FIRST)] if name not in NOT_TRIED]


def overfit_flags(name: str, place: Path, side: int, tiny: bool) -> dict[str, Any]:
    """Settings of a method's run. Where it compares other groups than the cache holds, it encodes by itself."""
    common = (smaller(LORA) if tiny else LORA) | {"compile": False, "gradient_checkpointing": True, "learning_rate": 1e-4}
    extra = dict(EXTRA.get(name, {}))
    if RECIPES[name].groups != "pairs" or "score" in extra:
        common |= {"latent_cache": False}
    if "score" in extra:
        common |= {"train_data_dir": place / "scored"}
    if RECIPES[name].groups == "lists":
        common |= {"train_data_dir": place / "lists"}
    flags = our_flags(place, side, common | {"method": name} | extra)
    groups = 8 if tiny else PAIRS
    samples = 3 * groups if RECIPES[name].groups == "lists" else groups  # a list of four counts as the three pairs of its neighbours
    return flags | {"max_train_samples": samples, "max_train_steps": PASSES * groups // flags["train_batch_size"]}


def overfit(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Losses and implicit accuracy of a method in the first and in the last pass through the same pairs.

    It passes when every loss is finite and the last pass's mean is below the first one's; tiny networks need only be finite.
    """
    place = fixtures(folder, "sdxl", tiny)
    flags = overfit_flags(name, place, 64 if tiny else SIDES["sdxl"], tiny)
    write_variants(place)
    build_cache(flags)
    try:
        parts.run_program([sys.executable, str(ROOT / "scripts" / "train.py"), *words(flags)], PATIENCE)
        rows = [json.loads(line) for line in (flags["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    finally:
        parts.clear(place / "runs")
    found = learned(rows)
    return found | {"passed": found["finite"] if tiny else found["finite"] and found["last_pass"]["loss"] < found["first_pass"]["loss"]}


def learned(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and implicit accuracy of the first and of the last pass, as means, from the lines of a run; null where a loss is not finite."""
    each, losses = len(rows) // PASSES, [row["loss"] for row in rows]
    finite = None not in losses  # as the log writes what is not
    found: dict[str, Any] = {"finite": finite, "losses": losses}
    for name, lines in (("first_pass", rows[:each]), ("last_pass", rows[-each:])):
        accuracy = [row["rewards/accuracies"] for row in lines if row.get("rewards/accuracies") is not None]
        loss = sum(row["loss"] for row in lines) / each if finite else None
        found[name] = {"loss": loss, "accuracy": sum(accuracy) / len(accuracy) if accuracy else None}
    return found | {"pairs_per_second": max((row["time/pairs_per_second"] for row in rows[1:]), default=None)}


def write_variants(place: Path) -> None:
    """The pairs with a score that agrees with their labels, and as ranked lists of four, for methods that ask for them."""
    rows = pq.read_table(next((place / "pickapic").glob("*.parquet")))
    noise = np.random.default_rng(0).random(len(rows)) / 2
    better = np.asarray(rows["label_0"])
    scored = rows.append_column("quality_0", [better + noise]).append_column("quality_1", [1 - better + noise])
    pairs = [(r["jpg_0"], r["jpg_1"]) if r["label_0"] == 1 else (r["jpg_1"], r["jpg_0"]) for r in rows.to_pylist()]
    images = [[*pair, *pairs[i - 1]] for i, pair in enumerate(pairs)]
    lists = pa.table({"caption": rows["caption"], "images": images, "ranks": [[1, 2, 3, 4]] * len(images)})
    for name, table in (("scored", scored), ("lists", lists)):
        (place / name).mkdir(exist_ok=True)
        if not (place / name / "train.parquet").exists():
            pq.write_table(table, place / name / "half")
            (place / name / "half").replace(place / name / "train.parquet")


def testbed(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """One part of the large testbed."""
    given = ["--folder", str(folder / "testbed"), "--part", name, "--seconds", "240", *(["--tiny"] if tiny else [])]
    said = parts.run_program([sys.executable, str(HERE / "large_testbed.py"), *given], PATIENCE)
    return json.loads(said.splitlines()[-1])


def wanted_parts(folder: Path, scripts: bench_gpu.Scripts, tiny: bool) -> bench_gpu.Parts:
    """Name -> what does it, in the order of the pack."""
    timed = bench_gpu.wanted_parts(folder, scripts, tiny)
    found = {name: work for name, work in timed.items() if name.startswith("numerics")}
    found |= {f"overfit: {name}": functools.partial(overfit, name, folder, tiny) for name in methods()}
    found |= {f"testbed: {name}": functools.partial(testbed, name, folder, tiny) for name in NAMES}
    return found | timed


def main() -> int:
    """Do what is missing until the time is over; 0 when everything is there and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_gpu.add_arguments(parser, minutes=4)
    parser.add_argument("--only", action="append", default=[], help="parts whose name begins so, such as numerics; all if not given")
    args = parser.parse_args()
    scripts = {peer: getattr(args, peer) for peer in PEERS}
    every = wanted_parts(args.folder, scripts, args.tiny)
    wanted = {name: work for name, work in every.items() if not args.only or name.startswith(tuple(args.only))}
    if not wanted:
        sys.exit(f"--only {' '.join(args.only)} names no part; there are {', '.join(every)}")
    return bench_gpu.go(args, "gpu-pack", wanted, scripts)


if __name__ == "__main__":
    sys.exit(main())
