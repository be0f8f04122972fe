"""Our training step against peers' scripts on one GPU: SDXL at 1024 pixels and SD1.5 at 512, random weights, no network.

    python benchmarks/bench_gpu.py --folder FOLDER --all --diffusers SCRIPT --salesforce SCRIPT

Ends after --minutes at the latest, between two measurements; the same command goes on with what is missing, so that it fits into sessions
of ten minutes. Every measurement is kept at once in benchmarks/results/gpu-<card>.json. Contestants run one after the other, twice each
(A B A B): two of them would not fit into the memory together. Targets are those of one H200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fixture
import torch
from bench_cpu import HERE, ROOT, machine
from contest import Contestant, contest
from real_size import write_model

FEW = 400  # optimizer steps that a run is told to take; no contest takes so many


@dataclass(frozen=True)
class Case:
    """Something to be measured, and what it is measured against."""

    family: str  # of the model: sdxl or sd15
    side: int  # pixels
    flags: Mapping[str, Any]  # of our run
    pairs: int  # per step, and for the peer
    peer: str | None = None  # whose script
    peer_flags: Mapping[str, Any] | None = None
    pairs_per_second: float | None = None  # the target on one H200
    ratio: float | None = None  # the target for times as many pairs per second as the peer
    ours: str | None = None  # the case whose own time is compared with this peer, if not this one's


LORA = {"tune": "lora", "rank": 8, "base_dtype": "bf16", "mixed_precision": "bf16", "gradient_checkpointing": False, "compile": True}
FULL = {"tune": "full", "mixed_precision": "bf16", "gradient_checkpointing": True, "compile": True, "learning_rate": 1e-8}
HALF = {"mixed_precision": "bf16", "allow_tf32": True}
CASES = {
    "SDXL 1024, DPO, LoRA": Case("sdxl", 1024, LORA, 4, pairs_per_second=9),
    "SDXL 1024, DPO, LoRA, diffusers at its defaults": Case(
        "sdxl", 1024, LORA, 1, "diffusers", HALF | {"gradient_checkpointing": True, "rank": 8}, None, 2.2, "SDXL 1024, DPO, LoRA"
    ),
    "SDXL 1024, DPO, LoRA, diffusers, large batch": Case(
        "sdxl", 1024, LORA, 8, "diffusers", HALF | {"dataloader_num_workers": 8, "rank": 8}, None, 1.6, "SDXL 1024, DPO, LoRA"
    ),
    "SDXL 1024, DPO, LoRA, stored errors": Case("sdxl", 1024, LORA | {"reference_errors": "errors.safetensors"}, 4),
    "SDXL 1024, DPO, LoRA, eager": Case("sdxl", 1024, LORA | {"compile": False}, 4),
    "SDXL 1024, DPO, all weights": Case("sdxl", 1024, FULL, 4, "salesforce", {"mixed_precision": "bf16"}, 7.5, 6.0),
    "SDXL 1024, MaPO, all weights": Case("sdxl", 1024, FULL | {"method": "mapo"}, 4, pairs_per_second=10),
    "SD1.5 512, DPO, all weights": Case("sd15", 512, FULL | {"gradient_checkpointing": False}, 16, pairs_per_second=60),
    "SDXL 1024, InPO, all weights": Case("sdxl", 1024, FULL | {"method": "inpo", "compile": False}, 4, pairs_per_second=3.2),
}
"""In the order in which they are measured."""


def words(flags: Mapping[str, Any]) -> list[str]:
    """As on a command line; false leaves a flag out."""
    return [
        word for key, value in flags.items() if value is not False for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def fixtures(folder: Path, case: Case, tiny: bool) -> Path:
    """Folder with model and pairs of a case, made once: random weights of the real configuration in bf16."""
    place = folder / (f"tiny-{case.family}" if tiny else f"{case.family}-{case.side}")
    if tiny:
        fixture.make(place, "tiny", pairs=64, side=64)
    elif not (place / "facts.json").exists():
        write_model(place / "model", case.family, torch.bfloat16)
        fixture.write_pairs(place, pairs=64, side=case.side)
        (place / "facts.json").write_text(json.dumps({"family": case.family, "side": case.side, "pairs": 64}))
    return place


def our_run(place: Path, case: Case, name: str, side: int) -> Contestant:
    """Our script with a latent cache, which is made first."""
    data = {"pretrained_model_name_or_path": place / "model", "train_data_dir": place / "pickapic", "cache_dir": place / "tables"}
    data |= {"resolution": side, "latent_cache": place / "latents"}
    if not (place / "latents").exists():
        command = [sys.executable, "-m", "diffpref.cli", "cache", *words(data)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    flags = {"method": "diffusion_dpo", "preset": "diffpref", "train_batch_size": case.pairs, "gradient_accumulation_steps": 1}
    flags |= {"learning_rate": 1e-5, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": FEW, "checkpointing_steps": FEW}
    flags |= {"preflight": "warn", "output_dir": place / "runs" / f"{name.replace(' ', '_')}-{time.time_ns()}", **data, **case.flags}
    if "reference_errors" in case.flags:
        flags |= {"reference_errors": place / case.flags["reference_errors"], "max_train_steps": 100}
    return Contestant(ROOT / "scripts" / "train.py", words(flags), items=case.pairs)


def peer_run(place: Path, case: Case, script: Path, side: int) -> Contestant:
    """The peer's script on the same pipeline and pairs."""
    split = {"split": "train", "sdxl": True} if case.peer == "salesforce" else {"dataset_split_name": "train"}
    flags = {"pretrained_model_name_or_path": place / "model", "dataset_name": place / "pickapic", **split, "cache_dir": place / "hub"}
    flags |= {"output_dir": place / "runs" / f"peer-{time.time_ns()}", "resolution": side, "train_batch_size": case.pairs, "seed": 0}
    flags |= {"learning_rate": 1e-8, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": FEW, "checkpointing_steps": FEW}
    stand_ins = ("wandb",) if case.peer == "diffusers" else ("wandb", "xformers", "cuda")
    return Contestant(script, words(flags | dict(case.peer_flags or {})), case.pairs, stand_ins)


def smaller(case: Case) -> Case:
    """The case on the tiny fixture: SDXL's layout, whatever the family, and one pair."""
    flags = {key: value for key, value in case.flags.items() if key not in ("compile", "base_dtype", "mixed_precision")}
    peer = {key: value for key, value in (case.peer_flags or {}).items() if key not in ("allow_tf32", "mixed_precision")}
    return replace(case, pairs=1, flags=flags, peer_flags=peer)


def measure(name: str, case: Case, folder: Path, scripts: Mapping[str, Path | None], tiny: bool) -> dict[str, Any]:
    """Who -> seconds per pair, rounds and peak memory."""
    case = smaller(case) if tiny else case
    place, side = fixtures(folder, case, tiny), 64 if tiny else case.side
    script = scripts.get(case.peer) if case.peer else None
    if case.ours and script is None:
        return {"skipped": f"no script of {case.peer}"}
    entrants = {} if case.ours else {"ours": our_run(place, case, name, side)}
    if script is not None:
        entrants["peer"] = peer_run(place, case, script, side)
    found: dict[str, Any] = {}
    for _ in range(2):
        for who, contestant in entrants.items():
            steps = {"steps": 2, "warm_up": 1} if tiny else {"steps": 8, "warm_up": 5}
            seen = contest({who: contestant}, place / "logs", rounds=1, unit="wall", **steps)[who]
            before = found.get(who)
            found[who] = seen if before is None else before | {"rounds": before["rounds"] + seen["rounds"]}
            entrants[who] = replace(contestant, flags=fresh(contestant.flags))
    for seen in found.values():
        seen["seconds_per_item"] = min(seen["rounds"])
    return found


def fresh(flags: Any) -> list[str]:
    """The flags with another output folder, because a run does not start in one that is used."""
    changed = list(flags)
    place = changed.index("--output_dir") + 1
    changed[place] = changed[place].rpartition("-")[0] + f"-{time.time_ns()}"
    return changed


def verdicts(stored: Mapping[str, Any]) -> list[str]:
    """One line per case: pairs per second, memory, ratio to the peer, and the targets beside them."""
    lines = []
    for name, case in CASES.items():
        found = stored.get(name)
        if not found or "skipped" in found or "failed" in found:
            lines.append(f"{name:50} {(found or {}).get('failed') or (found or {}).get('skipped') or 'not measured'}")
            continue
        own, peer = found.get("ours") or stored.get(case.ours or "", {}).get("ours"), found.get("peer")
        parts = []
        if "ours" in found:
            wanted = f" (target {case.pairs_per_second:g})" if case.pairs_per_second else ""
            parts.append(f"{1 / own['seconds_per_item']:.2f} pairs/s{wanted}, {own['peak_bytes'] / 1e9:.1f} GB")
        if peer and own:
            times = peer["seconds_per_item"] / own["seconds_per_item"]
            memory = own["peak_bytes"] / peer["peak_bytes"]
            parts.append(f"{times:.2f} times {case.peer} (target {case.ratio:g}), {memory:.2f} of its memory (target 0.8 at equal batch)")
        lines.append(f"{name:50} {'; '.join(parts)}")
    return lines


def results_file(tiny: bool, given: Path | None) -> Path:
    """Where the results of this card are kept."""
    card = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "none"
    return given or HERE / "results" / f"gpu-{'tiny-' if tiny else ''}{card}.json"


def main() -> int:
    """Measure what is missing until the time is over; 0 when everything is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, caches and runs: 30 GB")
    parser.add_argument("--all", action="store_true", help="every case; else those of --case")
    parser.add_argument("--case", action="append", choices=sorted(CASES), default=[])
    parser.add_argument("--minutes", type=float, default=6, help="begin nothing after this long; one measurement takes up to 4 minutes")
    parser.add_argument("--diffusers", type=Path, metavar="SCRIPT")
    parser.add_argument("--salesforce", type=Path, metavar="SCRIPT")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny networks, also on a CPU: a test of this program, not a measurement")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("there is no GPU; --tiny tests this program without one")
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    path, start = results_file(args.tiny, args.results), time.monotonic()
    stored = json.loads(path.read_text()) if path.exists() else {}
    scripts = {"diffusers": args.diffusers, "salesforce": args.salesforce}
    for name in CASES if args.all else args.case:
        if name in stored or time.monotonic() - start > 60 * args.minutes:
            continue
        try:
            stored[name] = measure(name, CASES[name], args.folder, scripts, args.tiny)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            stored[name] = {"failed": str(error)[-1500:]}
        stored["machine"] = machine() | {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(verdicts(stored)))
    return int(any(name not in stored for name in (CASES if args.all else args.case)))


if __name__ == "__main__":
    sys.exit(main())
