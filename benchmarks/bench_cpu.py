"""Our training step against the bare arithmetic, against the step as it is usually written, and against peers' scripts, on a CPU.

    python benchmarks/bench_cpu.py --folder FOLDER --part lora --diffusers SCRIPT
    python benchmarks/bench_cpu.py --folder FOLDER --part full --salesforce SCRIPT
    python benchmarks/bench_cpu.py --folder FOLDER --part mapo --kohya SCRIPT
    python benchmarks/bench_cpu.py --table

SCRIPT is the peer's training script in a checkout of its repository; it runs unmodified, on the same pipeline of random weights and the
same pairs. Parts are independent and take 2 to 6 minutes each; every result goes into benchmarks/results/cpu.json and, from there, into
the tables of docs/speed.md (--table). The parity gate comes first: on recorded inputs our losses, gradients and weights have to be the
peer's. One thread each; ratios are of CPU seconds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import fixture
from contest import HERE, Contestant, contest, ratios

ROOT = HERE.parent
RESULTS = HERE / "results" / "cpu.json"
STEPS = 100_000  # more than any contest takes; only ends that lie within a contest would matter
TARGETS = {
    "cached / diffusers": 1.4,
    "cached and stored errors / diffusers": 1.75,
    "uncached / diffusers": 1.05,
    "cached, not packed / bare": 1 / 1.03,
    "full, AdamW / salesforce": 2.0,
    "MaPO / kohya": 0.5,
}
"""Least number of times as many pairs per CPU second."""


def ours(folder: Path, name: str, method: str, *flags: str, items: float = 1.0) -> Contestant:
    """A run of this library with the peers' settings; `flags` win."""
    common = {
        "preset": "diffpref",
        "pretrained_model_name_or_path": folder / "model",
        "train_data_dir": folder / "pickapic",
        "cache_dir": folder / "tables",
        "output_dir": folder / "runs" / name.replace(" ", "_"),
        "resolution": 128,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "rank": 4,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
    }
    if "--tune" in flags:
        del common["rank"]
    given = [word for key, value in common.items() for word in (f"--{key}", str(value))]
    if "--method" in flags or method != "diffusion_dpo":
        return Contestant(ROOT / "scripts" / "train.py", ["--method", method, *given, *flags], items)
    return Contestant(ROOT / "scripts" / "train_diffusion_dpo.py", [*given, *flags], items)


def peer_diffusers(folder: Path, script: Path) -> Contestant:
    """diffusers' SDXL LoRA script for Diffusion-DPO."""
    flags = {
        "pretrained_model_name_or_path": folder / "model",
        "dataset_name": folder / "pickapic",
        "dataset_split_name": "train",
        "cache_dir": folder / "hub",
        "output_dir": folder / "runs" / "diffusers",
        "resolution": 128,
        "train_batch_size": 1,
        "rank": 4,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
        "mixed_precision": "no",
        "seed": 0,
    }
    return Contestant(script, [word for key, value in flags.items() for word in (f"--{key}", str(value))], stand_ins=("wandb",))


def peer_salesforce(folder: Path, script: Path) -> Contestant:
    """The original script for Diffusion-DPO: all weights, Adafactor and recomputed activations, as it insists for SDXL."""
    flags = {
        "pretrained_model_name_or_path": folder / "model",
        "dataset_name": folder / "pickapic",
        "split": "train",
        "cache_dir": folder / "hub",
        "output_dir": folder / "runs" / "salesforce",
        "resolution": 128,
        "train_batch_size": 1,
        "learning_rate": 1e-6,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
        "mixed_precision": "no",
        "seed": 0,
    }
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return Contestant(script, ["--sdxl", *given], stand_ins=("wandb", "xformers", "cuda"))


def peer_kohya(folder: Path, script: Path) -> Contestant:
    """kohya's SDXL LoRA training on single pictures, latents and texts kept in memory; two pictures a step, as MaPO has."""
    flags = {
        "pretrained_model_name_or_path": folder / "model",
        "train_data_dir": folder / "kohya",
        "output_dir": folder / "runs" / "kohya",
        "resolution": 128,
        "train_batch_size": 2,
        "network_module": "networks.lora",
        "network_dim": 4,
        "network_alpha": 4,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "max_train_steps": 1000,
        "mixed_precision": "no",
        "optimizer_type": "AdamW",
        "max_data_loader_n_workers": 0,
        "caption_extension": ".txt",
        "seed": 0,
    }
    on = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", "--sdpa")
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    environment = {"DIFFPREF_FIXTURE": str(folder)}
    return Contestant(script, [*on, *given], items=2, stand_ins=("wandb", "kohya"), environment=environment)


def library_command(*words: str | Path) -> None:
    """Run a command of this library to its end."""
    subprocess.run([sys.executable, "-m", "diffpref.cli", *map(str, words)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def build_cache(folder: Path) -> Path:
    """Latents and prompts of the fixture, encoded once."""
    cache = folder / "latents"
    if not cache.exists():
        data = ("--train_data_dir", folder / "pickapic", "--cache_dir", folder / "tables", "--resolution", "128")
        library_command("cache", "--pretrained_model_name_or_path", folder / "model", *data, "--latent_cache", cache)
    return cache


def part_lora(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """LoRA of rank 4: ours with more and more computed beforehand, the floor, the usual step, and diffusers' script.

    Ours keeps its frozen weights packed, but where it is compared with the floor, which computes with plain ones.
    """
    stored = ("--latent_cache", str(build_cache(folder)))
    cached = ("--pack_weights", *stored)
    short = ("--max_train_steps", "130")  # as many visits as errors are stored for
    model = ("--model", str(folder / "model"))
    (pairs_file,) = (folder / "pickapic").glob("*.parquet")
    entrants = {
        "bare": Contestant(HERE / "bare_step.py", [*model, "--rank", "4"]),
        "usual": Contestant(HERE / "conventional_step.py", [*model, "--rank", "4", "--pairs_file", str(pairs_file)]),
        "uncached": ours(folder, "uncached", "diffusion_dpo", "--pack_weights"),
        "cached, not packed": ours(folder, "not_packed", "diffusion_dpo", *stored),
        "cached": ours(folder, "cached", "diffusion_dpo", *cached),
        "cached and stored errors": ours(
            folder, "stored", "diffusion_dpo", *cached, *short, "--reference_errors", str(folder / "errors.safetensors")
        ),
    }
    gate = None
    if args.diffusers:
        entrants["diffusers"] = peer_diffusers(folder, args.diffusers)
        gate = parity_gate(folder, entrants["diffusers"])
    found = contest(entrants, folder / "logs", rounds=args.rounds, steps=args.steps)
    for name in ("uncached", "not_packed", "cached", "stored"):
        reference_gate(folder / "runs" / name)
    pairs = [("cached, not packed", "bare"), ("cached", "cached, not packed"), ("cached", "usual"), ("uncached", "usual")]
    pairs += [(name, "diffusers") for name in ("uncached", "cached, not packed", "cached", "cached and stored errors") if args.diffusers]
    return {"parity": gate, "contestants": found, "ratios": compared(found, pairs)}


def part_full(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All weights: ours with AdamW and with the peer's optimizer, the floor, and the original script."""
    cached = ("--latent_cache", str(build_cache(folder)), "--tune", "full", "--learning_rate", "1e-6")
    entrants = {
        "bare, AdamW": Contestant(HERE / "bare_step.py", ["--model", str(folder / "model"), "--tune", "full"]),
        "full, AdamW": ours(folder, "full_adamw", "diffusion_dpo", *cached),
        "full, Adafactor": ours(folder, "full_adafactor", "diffusion_dpo", *cached, "--optimizer", "adafactor"),
    }
    if args.salesforce:
        entrants["salesforce"] = peer_salesforce(folder, args.salesforce)
    found = contest(entrants, folder / "logs", rounds=args.rounds, steps=args.steps, warm_up=2)
    gate = {name: reference_gate(folder / "runs" / name) for name in ("full_adamw", "full_adafactor")}
    pairs = [("full, AdamW", "bare, AdamW")]
    pairs += [(name, "salesforce") for name in ("full, AdamW", "full, Adafactor") if args.salesforce]
    return {"parity": gate, "contestants": found, "ratios": compared(found, pairs)}


def part_mapo(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """MaPO on pairs against kohya's LoRA training on single pictures, on SDXL's depths and text widths in narrow layers.

    Without a reference there is nothing that the first loss has to be.
    """
    (folder / "kohya" / "50_pictures").mkdir(parents=True, exist_ok=True)  # 50 visits of each; it encodes every text by itself
    for path in sorted((folder / "better").iterdir())[:32]:
        (folder / "kohya" / "50_pictures" / path.name).write_bytes(path.read_bytes())
    layers = "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2"  # what kohya's network adapts
    entrants = {"MaPO": ours(folder, "mapo", "mapo", "--latent_cache", str(build_cache(folder)), "--lora_targets", layers)}
    if args.kohya:
        entrants["kohya"] = peer_kohya(folder, args.kohya)
    found = contest(entrants, folder / "logs", rounds=args.rounds, steps=args.steps)
    return {"contestants": found, "ratios": compared(found, [("MaPO", "kohya")] if args.kohya else [])}


def compared(found: dict[str, Any], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """`a / b` -> how many times as many items per second a does, with the target if there is one."""
    return {f"{a} / {b}": ratios(found, b, a) | {"target": TARGETS.get(f"{a} / {b}")} for a, b in pairs}


def reference_gate(run: Path) -> dict[str, Any]:
    """Raises SystemExit unless the first loss that a run has logged is log 2: the policy started as its reference."""
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    if not losses or abs(losses[0] - math.log(2)) > 1e-7:
        sys.exit(f"the gate failed: the first loss of {run.name} is {losses[0] if losses else 'missing'}, not log 2")
    return {"first_loss": losses[0], "passed": True}


def parity_gate(folder: Path, peer: Contestant) -> dict[str, Any]:
    """Raises SystemExit when our step is not the peer's: no number of speed would then mean anything."""
    from parity import check

    trace = folder / "trace.pt"
    command = peer.command()
    command[2:2] = ["--trace", str(trace), "--limit", "6"]
    with (folder / "trace.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    found = check(trace, folder, rank=4, learning_rate=5e-4)
    if not found["passed"]:
        sys.exit(f"the parity gate failed: {found}")
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu[0] if cpu else platform.processor()}, {len(cpu)} cores, 1 thread per process",
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def table(stored: dict[str, Any]) -> str:
    """Markdown: what was measured, in CPU seconds per item and in ratios, from the result file."""
    lines = ["| who | CPU seconds per pair or picture | seconds to the first step | peak RSS in GB |", "|---|---|---|---|"]
    for part in PARTS:
        for name, x in stored.get(part, {}).get("contestants", {}).items():
            numbers = f"{x['seconds_per_item']:.3f} | {x['seconds_to_first_step']:.1f} | {x['peak_bytes'] / 1e9:.2f}"
            lines.append(f"| {part}: {name} | {numbers} |")
    lines += ["", "| times as many per CPU second | ratio | least and largest of the rounds | target |", "|---|---|---|---|"]
    for part in PARTS:
        for name, x in stored.get(part, {}).get("ratios", {}).items():
            wanted = f"{x['target']:.2f}" if x["target"] else ""
            lines.append(f"| {part}: {name} | {x['ratio']:.2f} | {x['least']:.2f} to {x['largest']:.2f} | {wanted} |")
    return "\n".join(lines)


PARTS = {"lora": (part_lora, "mid"), "full": (part_full, "mid"), "mapo": (part_mapo, "deep")}


def main() -> None:
    """Run one part and store its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for fixtures, caches and runs; made once, used again")
    parser.add_argument("--part", choices=sorted(PARTS))
    parser.add_argument("--table", action="store_true", help="print the table of docs/speed.md from the results that are there")
    for peer in ("diffusers", "salesforce", "kohya"):
        parser.add_argument(
            f"--{peer}", type=Path, metavar="SCRIPT", help="the peer's training script; left out of the contest if not given"
        )
    parser.add_argument("--size", choices=sorted(fixture.SIZES), help="another fixture than the part's own, such as tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="per block; a round has two blocks of everybody")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.table:
        return print(table(json.loads(args.results.read_text())))
    if args.folder is None or args.part is None:
        parser.error("give --folder and --part, or --table")
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    part, size = PARTS[args.part]
    folder = args.folder / (args.size or size)
    facts = fixture.make(folder, args.size or size, pairs=200, side=128)
    for runs in (folder / "runs").glob("*"):
        subprocess.run(["rm", "-rf", str(runs)], check=True)
    result = {"machine": machine(), "fixture": facts} | part(folder, args)
    stored = json.loads(args.results.read_text()) if args.results.exists() else {}
    stored[args.part] = result
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(stored, indent=1) + "\n")
    for name, ratio in result["ratios"].items():
        wanted = f"; target {ratio['target']:.2f}" if ratio["target"] else ""
        print(f"{name:40} {ratio['ratio']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f}){wanted}")


if __name__ == "__main__":
    main()
