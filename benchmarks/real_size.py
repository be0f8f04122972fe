"""Training, saving and reloading at the real size of SD1.5 and SDXL, with random weights: needs no download and no GPU.

    python benchmarks/real_size.py --family sdxl --resolution 256
    python benchmarks/real_size.py --family sd15 --tune full --optimizer adafactor --resolution 128

A pipeline of the public configuration is written once in the released layout and loaded like any other. The run is the library's own:
preflight, loop, checkpoint, export. Checked afterwards: the untouched policy equals its reference (margin 0, for Diffusion-DPO a loss
of ln 2), every trained tensor moved, the exported file has exactly the tensors that the public configuration implies, and a plain
diffusers pipeline that loads it answers as the trained one. Prints a table and, as the last line, the same as JSON; exits with 1 if a
check fails.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffpref.methods import METHODS
from diffpref.methods.recipes import RECIPES
from diffpref.models.configs import FAMILIES, new_part, new_pipeline, shapes
from diffpref.models.lora import ATTENTION, LORA_FILE
from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.training.config import TrainConfig
from diffpref.training.export import export
from diffpref.training.loop import train
from diffpref.training.objective import Objective, build_objective, objective_names
from diffpref.training.run import Run, prepare_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMED = ("family", "method", "tune", "optimizer", "dtype", "resolution", "pairs", "rank", "gradient_checkpointing")
Shapes = dict[str, tuple[int, ...]]


def write_model(folder: Path, family: str, dtype: torch.dtype) -> None:
    """A pipeline of random weights."""
    tokenizers = {}
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, pad)
        tokenizers[name] = CLIPTokenizer.from_pretrained(folder / name, model_max_length=77, pad_token=pad)
    if family == "sd15":
        del tokenizers["tokenizer_2"]
    new_pipeline(family, tokenizers, dtype).save_pretrained(folder)


def new_objective(name: str) -> Objective:
    """A recipe; paths of many steps take two."""
    short = {"num_steps": 2} if "num_steps" in objective_names(name) else {}
    return build_objective(name, short)


def write_pairs(folder: Path, side: int, score: str | None, number: int = 4) -> None:
    """Pairs of colour gradients in the Pick-a-Pic schema, with the score that the method asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {
        "caption": [f"a red circle, number {i}" for i in range(number)],
        "jpg_0": [picture(2 * i, side) for i in range(number)],
        "jpg_1": [picture(2 * i + 1, side) for i in range(number)],
        "label_0": [float(i % 2) for i in range(number)],
        "label_1": [1.0 - i % 2 for i in range(number)],
    }
    if score is not None:
        columns |= {f"{score}_0": [0.1 * i for i in range(number)], f"{score}_1": [0.5 - 0.1 * i for i in range(number)]}
    pq.write_table(pa.table(columns), folder / "train-0.parquet")


def picture(seed: int, side: int) -> bytes:
    """A PNG."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


def implied_lora(family: str, rank: int) -> Shapes:
    """Name -> shape of the exported adapter, from the public configuration alone."""
    found: Shapes = {}
    for name, layer in new_part(family, "unet", device="meta").named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(ATTENTION):
            found[f"unet.{name}.lora_A.weight"] = (rank, layer.in_features)
            found[f"unet.{name}.lora_B.weight"] = (layer.out_features, rank)
    return found


def stored(folder: Path) -> Shapes:
    """Name -> shape of all tensors in the safetensors files of a folder."""
    found: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in keys(file)}
    return found


def keys(file: Any) -> list[str]:
    """Names of the tensors of an open safetensors file."""
    return list(file.keys())


def unmoved(model: Path, run: Path, tune: str) -> list[str]:
    """Names of trained tensors that training left as they were: B matrices of zero, or weights equal to the base's."""
    if tune == "lora":
        with safe_open(run / LORA_FILE, "pt") as file:
            return [name for name in keys(file) if "lora_B" in name and not file.get_tensor(name).any()]
    same = []
    for path in sorted((run / "unet").glob("*.safetensors")):
        with safe_open(path, "pt") as after, safe_open(model / "unet" / path.name, "pt") as before:
            same += [name for name in keys(after) if torch.equal(after.get_tensor(name), before.get_tensor(name).float())]
    return same


@torch.no_grad()
def answer(unet: UNet2DConditionModel, dtype: torch.dtype) -> Tensor:
    """The prediction for fixed inputs of 16 x 16 latents, computed as in training."""
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw)
    x_t = torch.randn(1, 4, 16, 16, generator=draw)
    added = {"text_embeds": torch.randn(1, 1280, generator=draw), "time_ids": torch.full((1, 6), 128.0)}
    device = unet.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        out = unet(
            x_t.to(device),
            torch.tensor([500], device=device),
            embeds.to(device),
            added_cond_kwargs={name: x.to(device) for name, x in added.items()},
        ).sample
    return out.float().cpu()


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def settings(args: argparse.Namespace, model: Path, pairs: Path, folder: Path) -> TrainConfig:
    """The run's settings; frozen weights and forward passes have the dtype of the model."""
    half = args.dtype != "fp32"
    return TrainConfig(
        method=args.method,
        tune=args.tune,
        pretrained_model_name_or_path=str(model),
        train_data_dir=str(pairs),
        cache_dir=str(folder / "tables"),
        output_dir=str(folder / "run"),
        resolution=args.resolution,
        rank=args.rank,
        max_train_steps=args.steps,
        train_batch_size=max(args.pairs, getattr(METHODS[RECIPES[args.method].method], "least_images", 1)),
        caption_edits=("red green",) if RECIPES[args.method].groups in ("captioned", "captions") else (),
        gradient_accumulation_steps=1,
        optimizer=args.optimizer,
        learning_rate=1e-4,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision=args.dtype if half else "no",
        base_dtype=args.dtype if half and args.tune == "lora" else "fp32",
        checkpoints_total_limit=1,
    )


def measure(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    """Train, save, reload, and compare."""
    watch = Stopwatch()
    if not (model / "model_index.json").exists():
        with watch("writing the model"):  # in a process of its own, so that its memory does not count
            writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(model, args.family, DTYPES[args.dtype]))
            writer.start()
            writer.join()
    objective = new_objective(args.method)
    write_pairs(folder / "pairs", args.resolution, getattr(objective.method, "score", None))
    config = settings(args, model, folder / "pairs", folder)
    with watch("loading"):
        run = prepare_run(config, objective)
    with watch("training"):
        try:
            train(run)
        finally:
            run.log.close()
    with watch("exporting"), run.exported():
        export(run.backbone.pipeline, run.folder, config.tune, merge_lora=False)
    trained = answer(run.backbone.denoiser, DTYPES[args.dtype])
    found = facts(args, run) | {"seconds": watch.seconds}
    del run
    gc.collect()
    with watch("reloading"):
        reloaded = answer(plain_unet(args, model, folder / "run"), DTYPES[args.dtype])
    found["difference_after_reloading"] = float((reloaded - trained).abs().max())
    found["largest_answer"] = float(trained.abs().max())
    found["unmoved_tensors"] = len(unmoved(model, folder / "run", args.tune))
    found["files"] = compare_files(args, folder / "run")
    return found


def plain_unet(args: argparse.Namespace, model: Path, run: Path) -> UNet2DConditionModel:
    """The UNet of a diffusers pipeline that has never met this library, with the run's result."""
    options = {"torch_dtype": DTYPES[args.dtype], "safety_checker": None} if args.family == "sd15" else {"torch_dtype": DTYPES[args.dtype]}
    if args.tune == "full":
        return DiffusionPipeline.from_pretrained(run, **options).unet
    pipeline = DiffusionPipeline.from_pretrained(model, **options)
    pipeline.load_lora_weights(run)
    return pipeline.unet


def facts(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What the run has recorded of itself."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((run.folder / "run_manifest.json").read_text())
    first = lines[0]
    on_gpu = torch.cuda.is_available()
    return {
        **{name: getattr(args, name) for name in NAMED},
        "trained_parameters": sum(p.numel() for p in run.trainable.values()),
        "loss": first["loss"],
        "margin": first.get("rewards/margins"),
        "errors": {  # of policy and reference before the first update, by picture
            name.removeprefix("error/reference").strip("_") or "all": (first[name.replace("reference", "policy")], value)
            for name, value in first.items()
            if name.startswith("error/reference")
        },
        "seconds_per_step": [round(args.pairs / line["time/pairs_per_second"], 1) for line in lines],
        "peak_gb": (torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9,
        "estimated_gb": manifest["preflight"]["memory"]["bytes"] / 1e9,
        "tflop_per_pair_and_step": manifest["preflight"].get("tflop_per_pair_and_step"),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
    }


def compare_files(args: argparse.Namespace, run: Path) -> dict[str, Any]:
    """Tensors of the export against those that the public configuration implies."""
    if args.tune == "lora":
        found, expected = stored(run), implied_lora(args.family, args.rank)
    else:
        found, expected = stored(run / "unet"), {name: tuple(x) for name, x in shapes(args.family, "unet").items()}
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return {"tensors": len(found), "expected": len(expected), "wrong": wrong[:5]}


def checks(found: dict[str, Any]) -> dict[str, bool]:
    """Check -> whether it holds."""
    held = {
        "files have the public tensors": not found["files"]["wrong"] and found["files"]["tensors"] > 0,
        "a plain pipeline answers as the trained one": found["difference_after_reloading"] == 0 and found["largest_answer"] > 0,
        "every trained tensor moved": found["unmoved_tensors"] == 0,
    }
    if new_objective(found["method"]).needs_reference:
        errors = found["errors"].values()
        held["the policy starts as its reference"] = bool(errors) and all(a == b > 0 for a, b in errors) and not found["margin"]
    if found["method"] == "diffusion_dpo":
        held["the first loss is ln 2"] = abs(found["loss"] - math.log(2)) < 1e-6
    return held


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--method", choices=sorted(RECIPES), default="diffusion_dpo")
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the model and of forward passes; bf16 for LoRA, fp32 for full")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=1, help="per step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--gradient_checkpointing", choices=("off", "selective", "full"), default="full")
    parser.add_argument("--model", type=Path, help="folder of the random model, made if it is not there; deleted afterwards if not given")
    parser.add_argument("--folder", type=Path, default=Path("outputs/real_size"), help="for the run; deleted before and afterwards")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bf16" if args.tune == "lora" else "fp32")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    args = arguments(argv)
    shutil.rmtree(args.folder, ignore_errors=True)
    try:
        found = measure(args, args.folder, args.model or args.folder / "model")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    found["checks"] = checks(found)
    for name, value in found.items():
        print(f"{name.replace('_', ' '):28} {value}")
    print(json.dumps(found))
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
