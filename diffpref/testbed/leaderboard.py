"""`diffpref testbed leaderboard`: every method under one protocol (configs/testbed/leaderboard.yaml, docs/leaderboard.md).

Every run leaves one small file with the scores of its pictures; a run whose file is there is not repeated, so that the command
can be stopped and continued at any time, also on another machine. Tables are made from the files alone (standings.py).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from diffpref.data.cache import INDEX
from diffpref.evaluation.stats import count_wins
from diffpref.locations import asset
from diffpref.testbed.cost import update_cost
from diffpref.testbed.labellings import labelled_data
from diffpref.testbed.measure import Measured, diversity, fingerprint, measure, seeds_for, shares, shipped_ruler
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.protocol import Protocol, Run, load_protocol
from diffpref.testbed.results import run_untrained
from diffpref.testbed.sampling import GUIDANCE, STEPS, Sampler
from diffpref.testbed.scorer import shipped_scorer
from diffpref.testbed.standings import write_standings
from diffpref.training.align import align
from diffpref.training.cache_command import build_cache
from diffpref.training.cache_config import CacheConfig
from diffpref.training.config import TrainConfig
from diffpref.training.objective import Objective, build_objective
from diffpref.training.run_folder import write_json
from diffpref.training.settings import Settings, build, names_of

CHOICE_SAMPLE = 50
"""Which seeds the pictures of validation prompts have (measure.seeds_for); those of test prompts are sample 0."""


@dataclass(frozen=True, kw_only=True)
class LeaderboardConfig:
    """Settings of `diffpref testbed leaderboard`."""

    out: str = "outputs/testbed/leaderboard"
    """Folder of the data and of runs at work."""
    results: str = "outputs/testbed/leaderboard/results"
    """Folder of one small file per run, and of the tables; runs whose file is there are not repeated."""
    methods: tuple[str, ...] = ()
    """Only these methods of the protocol; all of them when not given."""
    processes: int = 2
    """Runs at a time, one thread each."""
    only_tables: bool = False
    """Train nothing: make the tables of the runs that are there."""


@dataclass(frozen=True)
class Work:
    """What a process needs to do a run."""

    run: Run
    settings: dict[str, Any]  # of the training, method and path
    updates: int
    data: str
    out: str
    results: str
    choice_prompts: int
    test_prompts: int
    pairs: int
    pictures_per_update: int
    version: int


def run_leaderboard(config: LeaderboardConfig, protocol: Protocol | None = None) -> None:
    """Do every run of the protocol (the shipped one) that has no result yet, then write the tables."""
    protocol = protocol or load_protocol()
    for name in config.methods:
        if name not in protocol.entries:
            raise ValueError(f"methods has {name!r}; accepted: {', '.join(protocol.entries)}")
    results = Path(config.results)
    results.mkdir(parents=True, exist_ok=True)
    if not config.only_tables:
        _prepare(config, protocol)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for method in config.methods or protocol.entries:
                _run_method(method, config, protocol, pool)
    write_standings(results, protocol)


def _prepare(config: LeaderboardConfig, protocol: Protocol) -> None:
    """What all runs share: the base model's pictures, and the tricks that need no training."""
    results = Path(config.results)
    path = results / "base.json"
    model = fingerprint(asset("testbed", "pipeline"))
    if not path.exists():
        found: dict[str, Any] = {"model": model}
        for purpose in ("validation", "test"):
            found[purpose] = summary(base_pictures(config.out, purpose, _count(protocol, purpose)))
        write_json(path, found)
    elif (stored := json.loads(path.read_text())["model"]) != model:
        raise ValueError(f"results {config.results!r} belong to base model {stored}, this one is {model}; use another folder")
    if not (results / "untrained.json").exists():
        base = base_pictures(config.out, "test", protocol.test_prompts)
        ruler = shipped_ruler(str(asset("testbed", "pipeline")), STEPS, GUIDANCE, protocol.test_prompts)
        write_json(results / "untrained.json", run_untrained(base, config.processes, ruler, protocol.choice_prompts))


def _count(protocol: Protocol, purpose: str) -> int:
    return protocol.test_prompts if purpose == "test" else protocol.choice_prompts


def _run_method(method: str, config: LeaderboardConfig, protocol: Protocol, pool: ProcessPoolExecutor) -> None:
    """Cost, choice of a setting, and the reported runs of one method."""
    results = Path(config.results)
    for name in dict.fromkeys(("diffusion_dpo", method)):
        path = results / f"{name}-cost.json"
        if not path.exists():
            _data_of(config, protocol, name, "own", "given")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # whose peak of memory is its own
                work = _work(protocol.choices(name)[0], config, protocol, {}, None)
                write_json(path, fresh.submit(cost_of, work).result())
    ratio = time_ratio(results, method)
    has_time_budget = not protocol.entries[method].is_variant and abs(ratio - 1) >= protocol.smallest_time_difference
    _do([_work(run, config, protocol, protocol.entries[method].grid[run.setting or 0], None) for run in protocol.choices(method)], pool)
    chosen = protocol.entries[method].grid[choose(results, method, protocol)]
    _do([_work(run, config, protocol, chosen, ratio) for run in protocol.runs(method, has_time_budget)], pool)


def _do(works: Iterable[Work], pool: ProcessPoolExecutor) -> None:
    waiting = [work for work in works if not is_done(work)]
    for name in pool.map(do_run, waiting):
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)


def _data_of(config: LeaderboardConfig, protocol: Protocol, method: str, regime: str, labels: str) -> Path:
    model = str(asset("testbed", "pipeline"))
    kind = protocol.entries[method].data
    return labelled_data(Path(config.out) / "data", regime, labels, kind, model, protocol.pairs, config.processes)


def _work(run: Run, config: LeaderboardConfig, protocol: Protocol, chosen: Settings, ratio: float | None) -> Work:
    entry = protocol.entries[run.method]
    groups = 2 * protocol.pairs_per_update // entry.pictures_per_group
    return Work(
        run,
        {**protocol.common, "train_batch_size": groups, **entry.settings, **chosen},
        protocol.updates_of(run, ratio),
        str(_data_of(config, protocol, run.method, run.regime, run.labels)),
        config.out,
        config.results,
        protocol.choice_prompts,
        protocol.test_prompts,
        protocol.pairs,
        2 * protocol.pairs_per_update,
        protocol.version,
    )


def key_of(work: Work) -> Settings:
    """What a stored result must agree with to stand for this run."""
    return {"version": work.version, "pairs": work.pairs, "settings": work.settings, "updates": work.updates}


def is_done(work: Work) -> bool:
    """Whether the result is there. Raises ValueError when it is there under another key: a protocol does not change."""
    path = Path(work.results) / f"{work.run.name}.json"
    if not path.exists():
        return False
    stored = json.loads(path.read_text())["key"]
    if work.run.budget == "time":  # the cost of an update is measured once, and may be measured again elsewhere
        return True
    if stored != json.loads(json.dumps(key_of(work))):
        raise ValueError(f"{path} was measured with {stored}, the protocol now says {key_of(work)}; use another folder for results")
    return True


def prepared(work: Work, folder: Path, updates: int) -> tuple[TrainConfig, Objective]:
    """Settings and objective of a run."""
    settings = work.settings | {
        "pretrained_model_name_or_path": str(asset("testbed", "pipeline")),
        "train_data_dir": work.data,
        "output_dir": str(folder),
        "max_train_steps": updates,
        "seed": work.run.seed,
        "cache_latents": True,
        "check_images": False,
        "checkpointing_steps": updates,
        "checkpoints_total_limit": 1,
        "validation_steps": updates,
        "num_validation_images": 1,
        "merge_lora": True,
    }
    config = build(TrainConfig, {name: value for name, value in settings.items() if name in names_of(TrainConfig)})
    return config, build_objective(work.run.method, settings)


def do_run(work: Work) -> str:
    """Train, draw, measure, and store what the tables need."""
    folder = Path(work.out) / "runs" / work.run.name
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    config, objective = prepared(work, folder, work.updates)
    align(with_latents(config, objective, work), objective)
    seconds = time.process_time() - start
    purpose, count = ("validation", work.choice_prompts) if work.run.is_choice else ("test", work.test_prompts)
    base = base_pictures(work.out, purpose, count)
    after = measure(Sampler(str(folder))(base.prompts, _seeds(purpose, count)), base.prompts)
    wins, _ = count_wins(base.score, after.score)
    found = {
        "key": key_of(work),
        "run": {**vars(work.run)},
        "win_rate": wins / count,
        "score_difference": float((after.score - base.score).mean()),
        **summary(after),
        "diversity": diversity(base, after)["mean"],
        "picture_change": float(np.sqrt(np.mean((after.images.astype(float) - base.images) ** 2))),
        "held_out": _held_out(folder),
        "cpu_seconds": seconds,
    }
    if "scorer" in work.run.labels:
        found["proxy"] = _proxy(base, after)
    write_json(Path(work.results) / f"{work.run.name}.json", found)
    shutil.rmtree(folder)
    return f"{work.run.name}: win rate {wins / count:.3f}, reward {found['score_difference']:+.3f}"


def with_latents(config: TrainConfig, objective: Objective, work: Work) -> TrainConfig:
    """The same run with its pictures encoded once for all runs on these rows; it learns the same, bit for bit."""
    # drawn by seed: held-out pairs, which are no rows of the lists; edits of captions
    seed = f"-{config.seed}" if objective.groups in ("lists", "captions", "captioned") else ""
    folder = Path(work.out) / "latents" / f"{Path(work.data).name}-{objective.groups}-{config.train_batch_size}{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    stored = dataclasses.replace(config, cache_latents=False, latent_cache=str(folder))
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / INDEX).exists():
            build_cache(stored, CacheConfig(), objective.groups)
    return stored


def _seeds(purpose: str, count: int) -> list[int]:
    return seeds_for(count, 0 if purpose == "test" else CHOICE_SAMPLE)


@lru_cache(maxsize=2)
def base_pictures(out: str, purpose: str, count: int) -> Measured:
    """The base model on the first `count` prompts of a purpose; the pictures are kept in `out`."""
    path = Path(out) / f"base-{purpose}-{count}.npz"
    prompts = draw_prompts(purpose, count).texts  # type: ignore[arg-type]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images = Sampler(str(asset("testbed", "pipeline")))(prompts, _seeds(purpose, count))
        hidden = path.with_suffix(".part.npz")
        np.savez_compressed(hidden, images=images)
        hidden.replace(path)
    return measure(np.load(path)["images"], prompts)


def summary(measured: Measured) -> dict[str, Any]:
    """Scores per prompt, their parts, and how the prompts are followed."""
    return {
        "scores": [round(float(x), 4) for x in measured.score],
        "parts": {name: float(x.mean()) for name, x in measured.parts.items()},
        "following": shares(measured),
    }


def _held_out(folder: Path) -> dict[str, float]:
    """Accuracy on held-out pairs, and how much better than the reference their pictures are denoised, at the end of the run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/implicit_accuracy" in row]
    names = ("implicit_accuracy", "gain_chosen", "gain_rejected")
    return {name: last[-1][f"eval/{name}"] for name in names} if last else {}


def _proxy(base: Measured, after: Measured) -> dict[str, float]:
    """Mean score of the testbed's reward model, before and after."""
    scorer = shipped_scorer()
    return {
        name: float(np.mean(np.asarray(scorer([Image.fromarray(x) for x in seen.images], seen.prompts))))
        for name, seen in (("base", base), ("aligned", after))
    }


def cost_of(work: Work) -> Settings:
    """CPU seconds, network evaluations and memory of an update; for a process of its own."""
    torch.set_num_threads(1)
    folder = Path(work.out) / "runs" / f"{work.run.method}-cost"

    def train(updates: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        config, objective = prepared(work, folder, updates)
        align(_without_validation(with_latents(config, objective, work)), objective)

    found = update_cost(train, work.pictures_per_update)
    shutil.rmtree(folder)
    return found


def _without_validation(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, validation_steps=None, held_out_pairs=0, merge_lora=False)


def time_ratio(results: Path, method: str) -> float:
    """CPU seconds of an update of a method in those of Diffusion-DPO."""
    seconds = [json.loads((results / f"{name}-cost.json").read_text())["cpu_seconds_per_update"] for name in (method, "diffusion_dpo")]
    return float(seconds[0] / seconds[1])


def choose(results: Path, method: str, protocol: Protocol) -> int:
    """The setting with the highest mean reward on the validation prompts, of those that keep colours and backgrounds.

    When none keeps them, the one that loses least.
    """
    base = json.loads((results / "base.json").read_text())["validation"]["following"]
    rows = [json.loads((results / f"{run.name}.json").read_text()) for run in protocol.choices(method)]
    losses = [max(base[name] - row["following"][name] for name in ("colour", "background")) for row in rows]
    kept = [i for i, loss in enumerate(losses) if loss <= protocol.largest_loss_of_following]
    return max(kept, key=lambda i: rows[i]["score_difference"]) if kept else int(np.argmin(losses))
