"""`diffpref testbed results`: methods, seeds and controls trained alike and measured on the test prompts.

Every run takes the settings of configs/testbed/<method>[_full].yaml and changes only seed and labels. Settings and untrained
baselines were chosen on the validation prompts.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpref.evaluation.stats import count_wins, wilson_interval
from diffpref.locations import asset
from diffpref.testbed.measure import FILTERS, Measured, apply_filter, comparison, fingerprint, measure, seeds_for, shipped_ruler
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.recipe import read_recipe
from diffpref.testbed.sampling import GUIDANCE, STEPS, Sampler, sample_parallel
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective
from diffpref.training.settings import build, names_of

LABELS = {"true": 0.0, "shuffled": 0.5, "inverted": 1.0}
"""label_noise_prob of the three labellings."""
GUIDANCE_GRID = (2.0, 3.0, 4.5, 6.0, 8.0)
STEPS_GRID = (16, 32)


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Settings of `diffpref testbed results`."""

    out: str = "outputs/testbed/results"
    """Folder of the runs and of results.json."""
    recipes: tuple[str, ...] = ("diffusion_dpo", "diffusion_dpo_full", "sft", "sft_full")
    """Files of configs/testbed to run, without .yaml."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds with true labels."""
    control_seeds: tuple[int, ...] = (0,)
    """Training seeds of the controls: shuffled and inverted labels, and SFT."""
    max_train_steps: int | None = None
    """Another number of steps than the recipe's, for a trial."""
    num_prompts: int = 500
    """Prompts of the measurement."""
    purpose: str = "test"
    """test for reported numbers, validation for choosing settings."""
    processes: int = 2
    """Runs at a time, one thread each."""


@dataclass(frozen=True)
class Job:
    """One training run and its measurement."""

    recipe: str
    labels: str
    seed: int
    config: ResultsConfig

    @property
    def name(self) -> str:
        """Folder and table name."""
        return f"{self.recipe}-{self.labels}-{self.seed}"


def run_results(config: ResultsConfig) -> None:
    """Run every job that has no result yet, then write results.json and print the table."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [Job(r, "true", s, config) for r in config.recipes for s in (config.seeds if not r.startswith("sft") else config.control_seeds)]
    for labels in ("inverted", "shuffled"):
        jobs += [Job(r, labels, s, config) for r in config.recipes if not r.startswith("sft") for s in config.control_seeds]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in pool.map(run_job, [job for job in jobs if not is_done(job)]):
            print(f"{name}: done", flush=True)
    base = measure_base(config)
    rows = [row_of(job, base) for job in jobs]
    untrained = run_untrained(base, config.processes, ruler(config))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "model": fingerprint(asset("testbed", "pipeline")),
        "num_prompts": config.num_prompts,
        "untrained": untrained,
        "runs": rows,
        "clean_effects": clean_effects(rows),
        "controls": controls(rows, untrained),
    }
    (out / "results.json").write_text(json.dumps(result, indent=1))
    print(markdown(rows, untrained))
    print(json.dumps(result["clean_effects"], indent=1))


def measure_base(config: ResultsConfig) -> Measured:
    """The base model on the prompts of the measurement."""
    texts = draw_prompts(config.purpose, config.num_prompts).texts  # type: ignore[arg-type]
    sampler = Sampler(str(asset("testbed", "pipeline")))
    return measure(sample_parallel(sampler, texts, seeds_for(len(texts)), config.processes), texts)


def recipe_of(job: Job) -> dict[str, Any]:
    """The settings of a job."""
    config = job.config
    recipe = read_recipe(job.recipe)
    recipe |= {
        "output_dir": str(Path(config.out) / job.name),
        "seed": job.seed,
        "label_noise_prob": LABELS[job.labels],
        "resume_from_checkpoint": "latest",
        "validation_steps": None,
        "merge_lora": recipe["tune"] == "lora",
    }
    return recipe | ({"max_train_steps": config.max_train_steps} if config.max_train_steps else {})


def key_of(job: Job) -> dict[str, Any]:
    """What a stored row must agree with to be used again: settings, base model, prompts."""
    hidden = ("pretrained_model_name_or_path", "train_data_dir", "output_dir")
    settings = {name: value for name, value in recipe_of(job).items() if name not in hidden}
    model = fingerprint(asset("testbed", "pipeline"))
    return {"settings": settings, "model": model, "purpose": job.config.purpose, "num_prompts": job.config.num_prompts}


def is_done(job: Job) -> bool:
    """Whether an earlier call trained this job and drew its pictures under the same key."""
    path = Path(job.config.out) / f"{job.name}.json"
    return path.exists() and json.loads(path.read_text())["key"] == json.loads(json.dumps(key_of(job)))


def run_job(job: Job) -> str:
    """Train, export and draw the test prompts; pictures go to <name>.npz, what was done to <name>.json."""
    config, recipe, out = job.config, recipe_of(job), Path(job.config.out)
    objective = build_objective(recipe["method"], recipe)
    settings = build(TrainConfig, {k: v for k, v in recipe.items() if k in names_of(TrainConfig)})
    shutil.rmtree(out / job.name, ignore_errors=True)
    cpu = time.process_time()
    run = align(settings, objective)
    done = {"seconds_training": run.timings["training"], "cpu_seconds": time.process_time() - cpu, "key": key_of(job)}
    texts = draw_prompts(config.purpose, config.num_prompts).texts  # type: ignore[arg-type]
    np.savez_compressed(out / f"{job.name}.npz", images=Sampler(str(run.folder))(texts, seeds_for(len(texts))))
    (out / f"{job.name}.json").write_text(json.dumps(done, indent=1))
    return job.name


def row_of(job: Job, base: Measured) -> dict[str, Any]:
    """Measure the pictures of a finished job against the base's."""
    config, out = job.config, Path(job.config.out)
    after = measure(np.load(out / f"{job.name}.npz")["images"], base.prompts)
    row: dict[str, Any] = {"name": job.name, "recipe": job.recipe, "labels": job.labels, "seed": job.seed}
    row |= json.loads((out / f"{job.name}.json").read_text()) | comparison(base, after, ruler(config))
    unseen = draw_prompts(config.purpose, config.num_prompts).unseen  # type: ignore[arg-type]
    wins, num_unseen = count_wins(base.score[unseen], after.score[unseen])
    return row | {"win_rate_unseen": wins / num_unseen, "num_unseen": num_unseen}


def ruler(config: ResultsConfig) -> np.ndarray | None:
    """The shipped ruler, which is of the test prompts."""
    return shipped_ruler(str(asset("testbed", "pipeline")), STEPS, GUIDANCE, config.num_prompts) if config.purpose == "test" else None


def run_untrained(base: Measured, num_processes: int, ruler: np.ndarray | None, num_validation: int = 200) -> dict[str, Any]:
    """Best pixel filter and best guidance x steps on the validation prompts, then measured on these."""
    model = str(asset("testbed", "pipeline"))
    texts = draw_prompts("validation", num_validation).texts
    seeds = seeds_for(len(texts), 50)
    start = measure(sample_parallel(Sampler(model), texts, seeds, num_processes), texts)
    filters = {name: _win_rate(start, measure(apply_filter(name, start.images), texts)) for name in FILTERS}
    best_filter = max(filters, key=filters.__getitem__)
    settings = {}
    for steps in STEPS_GRID:
        for guidance in GUIDANCE_GRID:
            if (steps, guidance) != (STEPS, GUIDANCE):
                images = sample_parallel(Sampler(model, None, steps, guidance), texts, seeds, num_processes)
                settings[f"{steps} steps, guidance {guidance:g}"] = _win_rate(start, measure(images, texts))
    best_setting = max(settings, key=settings.__getitem__)
    steps, guidance = int(best_setting.split()[0]), float(best_setting.split()[-1])
    again = sample_parallel(Sampler(model, None, steps, guidance), base.prompts, seeds_for(len(base.prompts)), num_processes)
    return {
        "filter": best_filter,
        "setting": best_setting,
        "validation": filters | settings,
        "filter_result": comparison(base, measure(apply_filter(best_filter, base.images), base.prompts), ruler),
        "setting_result": comparison(base, measure(again, base.prompts), ruler),
    }


def _win_rate(base: Measured, other: Measured) -> float:
    wins, n = count_wins(base.score, other.score)
    return wins / n


def clean_effects(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Half the difference between true and inverted labels, per recipe: what the labels did, without what training alone does."""
    found = {}
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        means = {}
        for labels in ("true", "inverted"):
            same = [row for row in rows if (row["recipe"], row["labels"]) == (recipe, labels)]
            if same:
                means[labels] = {k: float(np.mean([row[k] for row in same])) for k in ("win_rate", "score_difference")}
        if len(means) == 2:
            found[recipe] = {k: (means["true"][k] - means["inverted"][k]) / 2 for k in means["true"]}
    return found


def controls(rows: Sequence[dict[str, Any]], untrained: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for the report's table of controls, runs of one kind pooled."""
    found = [
        _control(
            f"sampling: {untrained['setting']}",
            [untrained["setting_result"]],
            "best sampling setting of the validation prompts, no training",
        )
    ]
    notes = {
        "shuffled": "the same training on random labels: what training does without preferences",
        "inverted": "the same training on inverted labels: should lose as clearly as the true labels win",
        "true": "supervised training on the chosen pictures only",
    }
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for labels in ("shuffled", "inverted") if not recipe.startswith("sft") else ("true",):
            same = [row for row in rows if row["recipe"] == recipe and row["labels"] == labels]
            if same:
                name = RECIPE_NAMES.get(recipe, recipe) + ("" if recipe.startswith("sft") else f", {labels} labels")
                found.append(_control(name, same, notes[labels]))
    return found


RECIPE_NAMES = {
    "diffusion_dpo": "Diffusion-DPO LoRA",
    "diffusion_dpo_full": "Diffusion-DPO full",
    "sft": "SFT LoRA",
    "sft_full": "SFT full",
}


def _control(name: str, rows: Sequence[dict[str, Any]], note: str) -> dict[str, Any]:
    prompts = int(rows[0]["num_prompts"])
    rate = float(np.mean([row["win_rate"] for row in rows]))
    low, high = wilson_interval(rate * prompts, prompts)
    return {"name": name, "win_rate": rate, "low": low, "high": high, "num_prompts": prompts, "note": note, "runs": len(rows)}


def markdown(rows: Sequence[dict[str, Any]], untrained: dict[str, Any]) -> str:
    """The results table, a line per run."""
    head = "| run | labels | seed | win rate (95 %) | unseen scenes | reward | best-of-N | colour / background / shape / size | diversity |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(_line(RECIPE_NAMES.get(row["recipe"], row["recipe"]), row["labels"], str(row["seed"]), row))
    lines.append(_line(f"filter: {untrained['filter']}", "-", "-", untrained["filter_result"]))
    lines.append(_line(f"sampling: {untrained['setting']}", "-", "-", untrained["setting_result"]))
    return "\n".join(lines)


def _line(name: str, labels: str, seed: str, row: dict[str, Any]) -> str:
    following = " / ".join(f"{row['prompt_following_aligned'][k]:.3f}" for k in ("colour", "background", "shape", "size"))
    best = "-" if "best_of_n_equivalent" not in row else f"{'' if row['best_of_n_reached'] else '> '}{row['best_of_n_equivalent']:.1f}"
    unseen = f"{100 * row['win_rate_unseen']:.1f} %" if "win_rate_unseen" in row else "-"
    rate = f"{100 * row['win_rate']:.1f} % ({100 * row['win_rate_low']:.1f} to {100 * row['win_rate_high']:.1f})"
    reward = f"{row['score_base']:.2f} -> {row['score_aligned']:.2f}"
    return f"| {name} | {labels} | {seed} | {rate} | {unseen} | {reward} | {best} | {following} | {row['diversity']['mean']:.2f} |"
