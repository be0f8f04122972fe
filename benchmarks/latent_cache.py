"""Does reading from a latent cache stay as fast, and its memory as small, when the cache grows? Synthetic shards, no model.

    python benchmarks/latent_cache.py --folder FOLDER --pairs 1000 10000 100000 1000000

For every number of pairs: seconds to write the index and to open the folder, to find all pictures of a run, pairs per CPU second when
they are read in random order (the best of three passes), and the process's own memory (pages of files, which the system drops when it
needs them, apart). Written to benchmarks/results/latent_cache.json.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from bench_cpu import machine

from diffpref.data import cache

ROWS = 100_000
READS = 20_000
LATENT = (4, 8, 8)


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, and of mapped files."""
    status = Path("/proc/self/status").read_text()
    return {name: int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1e3 for name in ("RssAnon", "RssFile")}


def build(folder: Path, pairs: int) -> float:
    """Synthetic shards of all pictures of `pairs` pairs and one prompt each; seconds for the index."""
    folder.mkdir(parents=True)
    (folder / cache.MANIFEST).write_text(json.dumps({"format": cache.VERSION, "prompt_fields": ["prompt_embeds"]}))
    moments = torch.randn(ROWS, 1, 2, *LATENT)
    pictures = {cache.picture_key(str(pair), image): cache.key("content", pair, image) for pair in range(pairs) for image in (0, 1)}
    contents = list(pictures.values())
    for start in range(0, len(contents), ROWS):
        keys = contents[start : start + ROWS]
        cache.write_shard(folder, cache.LATENTS, keys, {"moments": moments[: len(keys)], "time_ids": torch.zeros(len(keys), 1, 6)})
    cache.write_shard(folder, cache.PROMPTS, [cache.prompt_key("a")], {"prompt_embeds": torch.zeros(1, 8, 8)})
    start_time = time.process_time()
    cache.write_index(folder, pictures)
    return time.process_time() - start_time


def measure(folder: Path, pairs: int) -> dict[str, float]:
    """Open, find and read."""
    first, times = memory(), [time.process_time()]
    store = cache.LatentStore.open(folder)
    times.append(time.process_time())
    places = store.pictures.find([cache.picture_key(str(pair), image) for pair in range(pairs) for image in (0, 1)]).reshape(-1, 2, 2)
    times.append(time.process_time())
    before = memory()
    order = np.random.default_rng(0).integers(0, pairs, READS)
    passes = []
    for _ in range(3):
        start = time.process_time()
        for i in range(0, READS, 8):
            store.moments(places[order[i : i + 8]].reshape(-1, 2), [0] * 16)
        passes.append(time.process_time() - start)
    seconds, after = min(passes), memory()
    return {
        "pairs": pairs,
        "open_cpu_s": times[1] - times[0],
        "find_cpu_s": times[2] - times[1],
        "read_pairs_per_cpu_s": READS / seconds,
        "own_memory_growth_mb": after["RssAnon"] - before["RssAnon"],
        "own_memory_of_open_and_find_mb": before["RssAnon"] - first["RssAnon"],
        "mapped_growth_mb": after["RssFile"] - first["RssFile"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an empty place for the synthetic caches: 5 GB for a million pairs")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results") / "latent_cache.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for number in given.pairs:
        at = given.folder / str(number)
        index = build(at, number) if not at.exists() else None
        rows.append({"index_cpu_s": index, **measure(at, number)})
        print(json.dumps(rows[-1]), flush=True)
    given.results.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
