"""How many pairs per second on how many GPUs: seconds of an optimizer step = max(compute, input, messages between processes).

    python benchmarks/cost_model.py --card cpu --network mid --gpus 1 --pairs 1 --tune lora --workers 1
    python benchmarks/cost_model.py --method inpo --card h100 --gpus 64 --tune full
    python benchmarks/cost_model.py --table                     the table of docs/scale.md
    python benchmarks/cost_model.py --measure                   constants of this machine, into benchmarks/results/cost_model.json

FLOPs are counted (2 per multiply-add, matrix products, convolutions and attention). Constants of the input are measured, on the machine
that the result file names. Those of cards and networks come from data sheets, with a share that published trainings reach: the times of
GPUs are predictions until benchmarks/bench_gpu.py has replaced them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "results" / "cost_model.json"


@dataclass(frozen=True)
class Network:
    """A UNet at its resolution; TFLOP per picture."""

    parameters: int
    lora_parameters: int  # rank 16 on the attention layers
    forward: float
    train_full: float  # forward and backward
    train_lora: float
    vae_encode: float
    judge: float  # decoded, and seen by PickScore's image tower (mid: only decoded)
    latent_side: int


NETWORKS = {
    "sdxl": Network(2_567_463_684, 23_224_320, 6.761, 20.231, 14.126, 4.879, 10.805, 128),
    "sd15": Network(859_520_964, 3_188_736, 0.803, 2.407, 1.718, 1.117, 2.850, 64),
    "mid": Network(97_275_140, 1_064_960, 0.006256, 0.018423, 0.011930, 0.004378, 0.013356, 16),
}
"""SDXL at 1024 pixels and SD1.5 at 512, counted on meta tensors of the public configurations; mid of fixture.py at 128."""


@dataclass(frozen=True)
class Work:
    """Evaluations per picture beside its forward and backward pass."""

    reference: float = 1.0  # forward passes of the reference
    inversion: float = 0.0  # of the policy, without gradient: inversion, sampling, or the first of two passes over a trajectory
    trained: float = 1.0  # forward and backward passes
    judged: float = 0.0  # pictures decoded and scored
    is_stored: bool = True  # pictures come from a data set


METHODS = {
    "mapo": Work(reference=0),
    "diffusion_dpo": Work(),
    "diffusion_dpo, stored errors": Work(reference=0),
    "inpo": Work(inversion=6.479),
    "smpo": Work(inversion=2 * 3.989),
    "inversion_dpo": Work(reference=2 * 80, inversion=80, trained=80),
    "spo": Work(reference=1, inversion=130 / 32, trained=1, judged=64 / 32, is_stored=False),
    "spo_sdxl": Work(reference=1.75, inversion=70 / 32, trained=1.75, judged=8 / 32, is_stored=False),
}
"""Means over uniform timesteps on the exact grid; Inversion-DPO with 40 nodes under guidance.

There the reference inverts and is compared, and the policy is asked twice. SPO's sampling is spread over the 16 pairs that a prompt
gives when the scorer tells all candidates apart; everything is guided. DSPO, DMPO, the guards, Diffusion-KTO and lists cost per picture
what Diffusion-DPO does (two pictures are a pair), DRO what MaPO does."""


@dataclass(frozen=True)
class Card:
    """A device and what it reaches others by."""

    tflops: float  # bf16, dense
    link: float  # bytes per second and direction between GPUs of one machine
    network: float  # bytes per second and direction that each GPU has to other machines
    compute_share: float = 0.4
    link_share: float = 0.7


CARDS = {
    "a100": Card(312, 300e9, 25e9),
    "h100": Card(989, 450e9, 50e9),
    "h200": Card(989, 450e9, 50e9),
}
"""From data sheets. Predicted is what share of them a training reaches: 33 to 40 % of the TFLOP/s are published for trainings with

compiled kernels."""
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Setup:
    """A run: pairs per GPU and optimizer step, and where it runs."""

    gpus: int = 1
    pairs: int = 64  # per GPU and optimizer step, over all its micro-batches
    micro_batch: int = 4
    tune: str = "full"
    shard: str = "no"
    cached: bool = True
    workers: int = 8  # processes that read, per GPU


def seconds(method: str, network: str, card: Card, setup: Setup, measured: dict[str, float]) -> dict[str, float]:
    """Seconds of an optimizer step by cause, their maximum, and pairs per second of all GPUs.

    method: of METHODS; network: of NETWORKS; measured: constants of the input. Raises ValueError for unknown names.
    """
    per_pair = tflop_per_pair(method, network, setup.tune)
    work, net = METHODS[method], NETWORKS[network]
    if not setup.cached and work.is_stored:
        per_pair += 2 * net.vae_encode
    compute = setup.pairs * per_pair / (card.tflops * card.compute_share)
    scale = (net.latent_side / 128) ** 2
    reading = (measured["read_cached_pair"] if setup.cached else measured["decode_pair"]) if work.is_stored else 0.0
    readers = setup.workers if work.is_stored and not setup.cached else 1  # a cache is read by the run itself
    input_ = setup.pairs * scale * (reading + measured["draw_noise"]) / readers
    found = {"compute": compute, "input": input_, "messages": messages(net, card, setup, work)}
    longest = max(found.values())
    return found | {"step": longest, "pairs_per_second": setup.gpus * setup.pairs / longest}


def tflop_per_pair(method: str, network: str, tune: str) -> float:
    """Of what a method cannot do without: no recomputed activations, no autoencoder. Raises ValueError for unknown names."""
    for name, known in ((method, METHODS), (network, NETWORKS)):
        if name not in known:
            raise ValueError(f"{name!r} is not known; accepted: {', '.join(known)}")
    work, net = METHODS[method], NETWORKS[network]
    per_picture = work.trained * (net.train_full if tune == "full" else net.train_lora)
    return 2 * (per_picture + (work.reference + work.inversion) * net.forward + work.judged * net.judge)


def messages(net: Network, card: Card, setup: Setup, work: Work) -> float:
    """Seconds on the slowest link for the gradients in float32, and for weights that are split."""
    n = setup.gpus
    if n == 1:
        return 0.0
    speed = card.link_share * (card.network if n > GPUS_PER_MACHINE else card.link)
    once = (n - 1) / n * 4 / speed  # seconds per number that is gathered, or summed and scattered
    trained = net.parameters if setup.tune == "full" else net.lora_parameters
    if setup.shard == "no":
        return 2 * once * trained
    micro_batches = setup.pairs / setup.micro_batch
    gathered = work.trained * (2 if setup.shard == "weights" else 1) + work.reference + work.inversion
    return micro_batches * once * (gathered * net.parameters + trained)


def this_machine(measured: dict[str, float]) -> Card:
    """One core of the machine that the constants were measured on; its processes exchange gradients through gloo."""
    rate = measured["all_reduce_bytes_per_second"]
    return Card(measured["flops_per_second"] / 1e12, rate, rate, compute_share=1, link_share=1)


def table(measured: dict[str, float]) -> str:
    """Markdown: predicted pairs per second of SDXL on 1, 8 and 64 H100, 64 pairs per GPU and step in micro-batches of 4."""
    lines = ["| method | tuning | 1 GPU | 8 GPUs | 64 GPUs | 64 GPUs, split weights |", "|---|---|---|---|---|---|"]
    for method in (name for name in METHODS if name != "spo"):  # which is SD1.5's
        for tune in ("lora", "full"):
            shards = [(1, "no"), (8, "no"), (64, "no"), (64, "weights")]
            found = [seconds(method, "sdxl", CARDS["h100"], Setup(gpus=n, tune=tune, shard=s), measured) for n, s in shards]
            speeds = [f"{x['pairs_per_second']:.3g}" for x in found]
            lines.append(f"| {method} | {tune} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def per_call(work: Callable[[], Any], at_least: float = 0.5) -> float:
    """CPU seconds of one call, after one that is not counted."""
    work()
    start, calls = time.process_time(), 0
    while time.process_time() - start < at_least:
        work()
        calls += 1
    return (time.process_time() - start) / calls


def measure() -> dict[str, Any]:
    """CPU seconds per pair at 1024 pixels: decoded and resized, read from a cache, noise; and what two processes exchange per second."""
    import numpy as np
    from fixture import picture
    from PIL import Image

    from diffpref.core.random import normal
    from diffpref.data import cache

    torch.set_num_threads(1)
    jpeg = picture(np.random.default_rng(0), 1200)

    def decode() -> None:
        for _ in range(2):
            resized = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((1024, 1024), Image.Resampling.LANCZOS)
            torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(127.5).sub_(1)

    with tempfile.TemporaryDirectory() as name:
        folder, pairs = Path(name), 64
        (folder / cache.MANIFEST).write_text(json.dumps({"format": cache.VERSION, "prompt_fields": ["prompt_embeds"]}))
        keys = {cache.picture_key(str(pair), image): cache.key("content", pair, image) for pair in range(pairs) for image in (0, 1)}
        latents = {"moments": torch.randn(2 * pairs, 1, 2, 4, 128, 128), "time_ids": torch.zeros(2 * pairs, 1, 6)}
        cache.write_shard(folder, cache.LATENTS, list(keys.values()), latents)
        cache.write_shard(folder, cache.PROMPTS, [cache.prompt_key("a")], {"prompt_embeds": torch.zeros(1, 77, 2048)})
        cache.write_index(folder, keys)
        store = cache.LatentStore.open(folder)
        places = store.pictures.find(list(keys)).reshape(-1, 2, 2)
        order = iter(np.random.default_rng(0).integers(0, pairs, 10**6))
        reading = per_call(lambda: store.moments(places[next(order)], [0, 0]))
    noise = per_call(lambda: [normal((4, 128, 128), 0, "noise", i) for i in range(3)])  # two posteriors and one shared noise
    found = {"decode_pair": per_call(decode), "read_cached_pair": reading, "draw_noise": noise}
    return found | {"flops_per_second": flops_per_second(), "all_reduce_bytes_per_second": all_reduce()}


def flops_per_second() -> float:
    """Of forward and backward passes of all weights of the mid network, two pictures at once."""
    from bare_step import errors, inputs
    from fixture import new_unet

    unet = new_unet("mid").eval()
    x = inputs(unet, 1, 128, torch.device("cpu"))
    return 2 * NETWORKS["mid"].train_full * 1e12 / per_call(lambda: errors(unet, x).sum().backward(), at_least=3)


def all_reduce() -> float:
    """Bytes per second of the sum over two processes of this machine, through gloo."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--exchange"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(done.stdout.split()[-1])


def exchange() -> None:
    """One of the two processes."""
    dist.init_process_group("gloo")
    x = torch.ones(4_000_000)
    times = []
    for _ in range(8):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(4 * x.numel() / min(times))
    dist.destroy_process_group()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="diffusion_dpo")
    parser.add_argument("--network", choices=NETWORKS, default="sdxl")
    parser.add_argument("--card", choices=(*CARDS, "cpu"), default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=64, help="per GPU and optimizer step")
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--tune", choices=("lora", "full"), default="full")
    parser.add_argument("--shard", choices=("no", "weights", "gradients"), default="no")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--uncached", action="store_true")
    for name in ("table", "measure", "exchange"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS if name == "exchange" else None)
    args = parser.parse_args()
    if args.exchange:
        return exchange()
    if args.measure:
        from bench_cpu import machine

        MEASURED.write_text(json.dumps({"machine": machine(), "seconds": measure()}, indent=1) + "\n")
    measured = json.loads(MEASURED.read_text())["seconds"]
    if args.table:
        return print(table(measured))
    setup = Setup(args.gpus, args.pairs, args.micro_batch, args.tune, args.shard, not args.uncached, args.workers)
    card = this_machine(measured) if args.card == "cpu" else CARDS[args.card]
    for name, value in seconds(args.method, args.network, card, setup, measured).items():
        print(f"{name.replace('_', ' '):18} {value:.4g}")


if __name__ == "__main__":
    main()
