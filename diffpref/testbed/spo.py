"""`diffpref testbed spo`: SPO, its control, its upper bound and its ablations, trained alike and measured on the same prompts.

Every run takes configs/testbed/spo.yaml and changes what its name says. Settings were chosen on the validation prompts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.evaluation.generate import Images, contact_sheet
from diffpref.evaluation.stats import paired_bootstrap
from diffpref.locations import asset
from diffpref.testbed.measure import Measured, comparison, fingerprint, measure, seeds_for, shipped_ruler
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.recipe import read_recipe
from diffpref.testbed.sampling import GUIDANCE, STEPS, Sampler
from diffpref.testbed.step_scorers import testbed_step_scorer
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective
from diffpref.training.run_folder import write_json
from diffpref.training.settings import Settings, build, names_of

RUNS: Mapping[str, tuple[str, Settings]] = {
    "spo": ("spo", {}),
    "shuffled scores": ("spo", {"shuffle_scores": True}),
    "true reward": ("spo", {"step_scorer": "testbed"}),
    "reward model without timestep": ("spo", {"step_scorer": "testbed_pickscore"}),
    "winner continuation": ("spo", {"continuation": "winner"}),
    "all steps": ("spo", {"first_branch": 0}),
    "tailor_po": ("tailor_po", {}),
    "dense_reward": ("dense_reward", {}),
}
"""Name of a run -> the file of configs/testbed and what differs from it."""


@dataclass(frozen=True, kw_only=True)
class SpoConfig:
    """Settings of `diffpref testbed spo`."""

    out: str = "outputs/testbed/spo"
    """Folder of the runs and of results.json; runs that are there with the same settings are not trained again."""
    runs: tuple[str, ...] = tuple(RUNS)
    """Runs to train and compare."""
    seed: int = 0
    """Training seed."""
    max_train_steps: int | None = None
    """Another number of updates than the recipe's, for a trial."""
    learning_rate: float | None = None
    """Another rate than the recipe's, for a trial."""
    num_prompts: int = 500
    """Prompts of the measurement."""
    purpose: str = "test"
    """test for reported numbers, validation for choosing settings."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.runs if name not in RUNS]
        if unknown or not self.runs:
            raise ValueError(f"runs is {list(self.runs)}; accepted: {', '.join(RUNS)}")


def compare_spo(config: SpoConfig) -> None:
    """Train and measure every run, write results.json and a sheet of pictures, print the table."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = draw_prompts(config.purpose, config.num_prompts).texts  # type: ignore[arg-type]
    base = measure(_pictures(_base(), out / f"base-{config.purpose}-{len(texts)}.npz", texts), texts)
    rows, found = {}, {}
    for name in config.runs:
        done = trained(config, name)
        folder = out / name.replace(" ", "_")
        found[name] = measure(_pictures(str(folder), folder / f"{config.purpose}-{len(texts)}.npz", texts), texts)
        rows[name] = done | comparison(base, found[name], _ruler(config))
    for name, row in rows.items():
        row["against"] = {other: _difference(found[name], found[other]) for other in found if other != name}
    result = {"date": time.strftime("%Y-%m-%d"), "model": fingerprint(Path(_base())), "purpose": config.purpose, "runs": rows}
    write_json(out / "results.json", result)
    sheet = [measured.images[:16] for measured in (base, *found.values())]
    contact_sheet(sheet, 2).save(out / "pictures.png")
    print(markdown(rows))


def _pictures(model: str, kept: Path, texts: list[str]) -> Images:
    """Of all prompts; drawn once and kept."""
    if not kept.exists():
        np.savez_compressed(kept, images=Sampler(model)(texts, seeds_for(len(texts))))
    images: Images = np.load(kept)["images"]
    return images


def _base() -> str:
    return str(asset("testbed", "pipeline"))


def _ruler(config: SpoConfig) -> np.ndarray | None:
    return shipped_ruler(_base(), STEPS, GUIDANCE, config.num_prompts) if config.purpose == "test" else None


def _difference(one: Measured, other: Measured) -> dict[str, float]:
    """Mean difference of the true reward over the same prompts and seeds, with its 95 % interval."""
    mean, low, high = paired_bootstrap(one.score - other.score)
    return {"difference": mean, "low": low, "high": high}


def settings_of(config: SpoConfig, name: str) -> Settings:
    """The settings of a run but for its folder."""
    recipe, changes = RUNS[name]
    trial = {key: value for key in ("max_train_steps", "learning_rate") if (value := getattr(config, key)) is not None}
    return read_recipe(recipe) | changes | trial | {"seed": config.seed}


def trained(config: SpoConfig, name: str) -> dict[str, Any]:
    """Train a run unless it was trained with these settings; what its training took, and its rollouts."""
    folder = Path(config.out) / name.replace(" ", "_")
    settings = settings_of(config, name)
    hidden = ("pretrained_model_name_or_path", "prompt_set")
    key = {name: value for name, value in settings.items() if name not in hidden}
    record = folder.with_suffix(".json")
    if record.exists() and (stored := json.loads(record.read_text()))["settings"] == json.loads(json.dumps(key)):
        return stored
    shutil.rmtree(folder, ignore_errors=True)
    objective = build_objective(settings["method"], settings)
    plain = {name: value for name, value in settings.items() if name in names_of(TrainConfig)}
    scorer = testbed_step_scorer(objective)
    cpu = time.process_time()
    run = align(build(TrainConfig, plain | {"output_dir": str(folder)}), objective, (), scorer)
    done = {"settings": key, "seconds_training": run.timings["training"], "cpu_seconds": time.process_time() - cpu}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done["rollouts"] = [line for line in lines if "rollout/number" in line]
    done["compute_seconds"] = sum(line.get("time/compute", 0.0) for line in lines)
    write_json(record, done)
    return done


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The results table, a line per run."""
    lines = [
        "| run | win rate against the base (95 %) | reward | above shuffled scores (95 %) | best-of-N | "
        "colour / background / shape / size | diversity | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        following = " / ".join(f"{row['prompt_following_aligned'][k]:.3f}" for k in ("colour", "background", "shape", "size"))
        control = row["against"].get("shuffled scores")
        above = f"{control['difference']:+.2f} ({control['low']:+.2f} to {control['high']:+.2f})" if control else "-"
        rate = f"{100 * row['win_rate']:.1f} % ({100 * row['win_rate_low']:.1f} to {100 * row['win_rate_high']:.1f})"
        best = f"{row['best_of_n_equivalent']:.1f}" if "best_of_n_equivalent" in row else "-"
        reward = f"{row['score_base']:.2f} -> {row['score_aligned']:.2f}"
        diversity = f"{row['diversity']['mean']:.2f}"
        lines.append(f"| {name} | {rate} | {reward} | {above} | {best} | {following} | {diversity} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)
