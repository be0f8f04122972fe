"""Everything that a GPU is wanted for, in the order of its worth: for whoever has a card for half an hour.

    python benchmarks/gpu_pack.py --folder FOLDER --minutes 9 [--diffusers SCRIPT] [--salesforce SCRIPT]

1. Numerics: on every path that can be switched on, an untouched policy answers as its reference.
2. Every method on 64 pairs with the real SDXL configuration at 1024 pixels, a few steps: losses and implicit accuracy.
3. The testbed with 100 M parameters at 128 pixels, and the core rows of its leaderboard with their controls (large_testbed.py).
4. Timings beside peers (bench_gpu.py).

Weights are random and made here; no network is needed. Every finished part is kept at once in benchmarks/results/gpu-pack-<card>.json
with date, card and versions; nothing is begun after --minutes, and the same command goes on with what is missing. A part that fails is
noted with its error and not repeated, unless --again. It needs 40 GB of disk and a card of 80 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_gpu
import torch
from bench_cpu import HERE, ROOT, machine
from large_testbed import NAMES

from diffpref.methods.recipes import RECIPES

LIMIT = 0.01
"""Largest logit of an untouched policy; on a GPU kernels may differ with the shape of a batch."""
STEPS, PAIRS = 8, 64
SDXL = bench_gpu.CASES["SDXL 1024, DPO, LoRA"]
LORA = {key: value for key, value in bench_gpu.LORA.items() if key != "compile"}
NUMERICS: dict[str, dict[str, Any]] = {
    "LoRA, bf16": {},
    "LoRA, one pair": {"train_batch_size": 1},
    "LoRA, channels last": {"channels_last": True},
    "LoRA, compiled": {"compile": True},
    "LoRA, recomputed activations": {"gradient_checkpointing": True},
    "LoRA, TF32, weights in float32": {"base_dtype": "fp32", "mixed_precision": "no", "allow_tf32": True, "train_batch_size": 1},
    "all weights, bf16": {"tune": "full", "base_dtype": "fp32", "gradient_checkpointing": True, "train_batch_size": 1},
}
FIRST = ("diffusion_dpo", "mapo", "inpo", "smpo", "diffusion_kto", "dspo")
NOT_ON_PAIRS = {
    **dict.fromkeys(("lipo", "list_mle", "rank_dpo"), "needs ranked lists"),
    **dict.fromkeys(("dense_reward", "spo", "spo_sdxl", "tailor_po"), "samples its own pairs and needs a step-aware scorer"),
    **dict.fromkeys(("ppd", "mcdpo"), "needs embeddings of users or axes"),
    "smpo_pickscore": "is smpo with another range of scores",
}
EDITS = {"caption_edits": "red green blue"}
EXTRA: dict[str, dict[str, Any]] = {
    "dro": {"train_batch_size": 4},
    "inversion_dpo": {"num_steps": 4, "train_batch_size": 1},
    "odpo": {"score": "quality"},
    "smpo": {"score": "quality"},
    **dict.fromkeys(("dcpo", "tdpo", "tkto"), EDITS),
}
"""What a recipe needs beside the common settings."""


def parts() -> dict[str, list[str]]:
    """Name -> arguments of this program that do it, in the order of the pack."""
    methods = [*FIRST, *(name for name in RECIPES if name not in FIRST)]
    found = {f"numerics: {name}": ["numerics", name] for name in NUMERICS}
    found |= {f"overfit: {name}": ["overfit", name] for name in methods if name not in NOT_ON_PAIRS}
    found |= {f"testbed: {name}": ["testbed", name] for name in NAMES}
    return found | {f"timing: {name}": ["timing", name] for name in bench_gpu.CASES}


def train(place: Path, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The logged values of a run. Raises RuntimeError with the end of what it said."""
    folder = place / "runs" / f"pack-{time.time_ns()}"
    words = bench_gpu.words({**flags, "output_dir": folder})
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "train.py"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def common(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Folder of the model, and the settings of all runs on it."""
    place, side = bench_gpu.fixtures(args.folder, SDXL, args.tiny), 64 if args.tiny else SDXL.side
    case = bench_gpu.smaller(SDXL) if args.tiny else SDXL
    bench_gpu.our_run(place, case, "pack", side)  # makes the latent cache
    flags = {} if args.tiny else LORA
    flags |= {"pretrained_model_name_or_path": place / "model", "train_data_dir": place / "pickapic", "cache_dir": place / "tables"}
    flags |= {"resolution": side, "latent_cache": place / "latents", "preset": "diffpref", "train_batch_size": 4}
    flags |= {"gradient_accumulation_steps": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0, "learning_rate": 1e-4}
    return place, flags | {"preflight": "warn", "checkpointing_steps": 10**6}


def numerics(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The first margin and loss of Diffusion-DPO on one path."""
    place, flags = common(args)
    changed = dict(NUMERICS[name])
    if args.tiny:  # a CPU has neither, and compiling takes minutes
        changed = {key: value for key, value in changed.items() if key not in ("compile", "allow_tf32", "base_dtype", "mixed_precision")}
    (first,) = train(place, flags | {"method": "diffusion_dpo", "max_train_steps": 1} | changed)
    logit = max(abs(first[key]) for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"))
    return {"loss": first["loss"], "largest_logit": logit, "passed": logit < LIMIT}


def overfit(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses and implicit accuracy of a method over a few steps on the same pairs."""
    place, flags = common(args)
    extra = dict(EXTRA.get(name, {}))
    if RECIPES[name].groups != "pairs" or "score" in extra:  # other groups than those of the cache
        flags = {key: value for key, value in flags.items() if key != "latent_cache"}
    if "score" in extra:
        flags["train_data_dir"] = with_scores(place)
    steps = 2 if args.tiny else STEPS
    rows = train(place, flags | {"method": name, "max_train_steps": steps, "max_train_samples": 8 if args.tiny else PAIRS} | extra)
    accuracy = [row["rewards/accuracies"] for row in rows if "rewards/accuracies" in row]
    speed = [row["time/pairs_per_second"] for row in rows[1:] if "time/pairs_per_second" in row]
    return {"losses": [row["loss"] for row in rows], "accuracies": accuracy, "pairs_per_second": max(speed, default=None)}


def with_scores(place: Path) -> Path:
    """The pairs with a score that agrees with their labels, for methods that ask for one."""
    import numpy as np
    import pyarrow.parquet as pq

    folder = place / "scored"
    if not folder.exists():
        table = pq.read_table(next((place / "pickapic").glob("*.parquet")))
        better = np.asarray(table["label_0"])
        noise = np.random.default_rng(0).random(len(better)) / 2
        folder.mkdir()
        for i, score in enumerate((better + noise, 1 - better + noise)):
            table = table.append_column(f"quality_{i}", [score])
        pq.write_table(table, folder / "train.parquet")
    return folder


def other_program(script: str, words: list[str]) -> dict[str, Any]:
    """The JSON that a program prints last. Raises RuntimeError with the end of what it said."""
    done = subprocess.run([sys.executable, str(HERE / script), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return json.loads(done.stdout.splitlines()[-1])


def do(kind: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part's result."""
    if kind == "testbed":
        words = ["--folder", str(args.folder / "testbed"), "--part", name, *(["--tiny"] if args.tiny else [])]
        return other_program("large_testbed.py", words)
    if kind == "timing":
        scripts = {"diffusers": args.diffusers, "salesforce": args.salesforce}
        return bench_gpu.measure(name, bench_gpu.CASES[name], args.folder, scripts, args.tiny)
    return {"numerics": numerics, "overfit": overfit}[kind](name, args)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, caches and runs")
    parser.add_argument("--minutes", type=float, default=6, help="begin nothing after this long; a part takes up to 6 minutes")
    parser.add_argument("--only", action="append", default=[], help="parts whose name begins so, such as numerics; all if not given")
    parser.add_argument("--again", action="store_true", help="repeat parts that have failed")
    parser.add_argument("--diffusers", type=Path, metavar="SCRIPT")
    parser.add_argument("--salesforce", type=Path, metavar="SCRIPT")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny networks, also on a CPU: a test of this program")
    return parser.parse_args()


def main() -> int:
    """Do what is missing until the time is over; 0 when everything is there."""
    args = arguments()
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("there is no GPU; --tiny tests this program without one")
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    path, start = bench_gpu.results_file(args.tiny, args.results), time.monotonic()
    path = args.results or path.with_name(path.name.replace("gpu-", "gpu-pack-", 1))
    stored = json.loads(path.read_text()) if path.exists() else {}
    wanted = {name: part for name, part in parts().items() if not args.only or name.startswith(tuple(args.only))}
    for name, (kind, what) in wanted.items():
        done = name in stored and not (args.again and "failed" in stored[name])
        if done or time.monotonic() - start > 60 * args.minutes:
            continue
        begun = time.monotonic()
        try:
            stored[name] = do(kind, what, args)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            stored[name] = {"failed": str(error)[-1500:]}
        stored[name]["took"] = time.monotonic() - begun
        stored["machine"] = machine() | {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
        path.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{name}: {json.dumps(stored[name])[:300]}", flush=True)
    print("\n".join(bench_gpu.verdicts({name.removeprefix("timing: "): x for name, x in stored.items()})))
    missing = [name for name in wanted if name not in stored]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} parts are there" + (f"; next: {missing[0]}" if missing else ""))
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
