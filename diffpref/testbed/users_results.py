"""`diffpref testbed users`: PPD on simulated users against one model for all of them, a model for each, and itself with users exchanged.

Rewards are the users' own. Every picture of a comparison has the same prompt, seed and starting noise. Parts that are finished in `out`
are not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpref.core.random import permutation
from diffpref.data.pairs import load_pairs
from diffpref.evaluation.generate import Images, contact_sheet, generate
from diffpref.evaluation.stats import count_wins, paired_bootstrap, wilson_interval
from diffpref.inference.user_pipelines import as_user_pipeline
from diffpref.inference.users import as_example
from diffpref.locations import asset
from diffpref.models.backbone import load_pipeline
from diffpref.models.lora import LORA_FILE
from diffpref.testbed.checker import read
from diffpref.testbed.measure import fingerprint, seeds_for
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.recipe import read_recipe
from diffpref.testbed.reward import qualities
from diffpref.testbed.sampling import BATCH, GUIDANCE, STEPS, Sampler
from diffpref.testbed.users import Candidates, all_users, score_of, seen_users, write_user_pairs
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective, objective_names
from diffpref.training.settings import Settings, build, names_of
from diffpref.users.projectors import ExampleEncoder

CONTEXTS = 8
"""Contexts of four examples that a measured user is drawn with, in turn over the prompts."""
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the second user along the interpolation."""


@dataclass(frozen=True, kw_only=True)
class UsersConfig:
    """Settings of `diffpref testbed users`."""

    out: str = "outputs/testbed/users"
    """Folder of pairs, runs, pictures and users.json."""
    seen: tuple[str, ...] = ("left+high", "alone+muted")
    """Measured users of the training."""
    unseen: tuple[str, ...] = ("left+vivid", "low+accompanied")
    """Measured users that training knows nothing of."""
    pair_prompts: int = 600
    """Prompts of the pairs."""
    candidates: int = 8
    """Base samples per prompt, of which each user's best and worst make the pair."""
    ppd_steps: int | None = None
    """Steps of PPD; the recipe's when not given."""
    separate_steps: int = 120
    """Steps of each model of one user, at the rate of the testbed's Diffusion-DPO recipe."""
    all_steps: int = 300
    """Steps of the one model for all users."""
    all_learning_rate: float = 3e-4
    """Its rate. Labels that contradict each other leave noise: at the rate of the separate models its loss rises at once."""
    num_prompts: int = 250
    """Prompts of the measurement."""
    purpose: str = "test"
    """test for reported numbers, validation for choosing settings."""
    seed: int = 0
    """Training seed."""
    processes: int = 2
    """Trainings at a time, one thread each."""

    def __post_init__(self) -> None:
        known, trained = set(all_users()), set(seen_users())
        wrong = [u for u in (*self.seen, *self.unseen) if u not in known] + [u for u in self.unseen if u in trained]
        wrong += [u for u in self.seen if u not in trained]
        if wrong:
            raise ValueError(f"seen or unseen has {wrong[0]!r}; seen users: {', '.join(seen_users())}, all: {', '.join(all_users())}")

    @property
    def users(self) -> tuple[str, ...]:
        """All measured users."""
        return (*self.seen, *self.unseen)


def run_users(config: UsersConfig) -> None:
    """Pairs, trainings, pictures, numbers; then users.json and the pictures of the interpolation."""
    out = Path(config.out)
    candidates = out / "candidates.npz"
    if not (out / "pairs" / "seen").exists():
        model = str(asset("testbed", "pipeline"))
        made = Candidates.sample(model, config.pair_prompts, config.candidates, config.processes, candidates)
        write_user_pairs(made, out / "pairs")
    names = ["ppd", "all", *(f"separate-{user}" for user in config.users)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in pool.map(train_one, [config] * len(names), names):
            print(f"{name}: trained", flush=True)
        jobs = ["base", *names[1:], *(f"ppd-{user}" for user in config.users)]
        for name in pool.map(draw_one, [config] * len(jobs), jobs):
            print(f"{name}: drawn", flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "model": fingerprint(asset("testbed", "pipeline")),
        "purpose": config.purpose,
        "num_prompts": config.num_prompts,
        "settings": {name: settings_of(config, name) for name in ("ppd", "all", f"separate-{config.users[0]}")},
        "seen": measure_group(config, config.seen),
        "unseen": measure_group(config, config.unseen),
        "identification": identification(config),
        "interpolation": interpolation(config),
    }
    (out / "users.json").write_text(json.dumps(result, indent=1))
    print(table(result))


def settings_of(config: UsersConfig, name: str) -> Settings:
    """The recipe of a training with what this command changes; without places on this machine."""
    recipe = read_recipe("ppd" if name == "ppd" else "diffusion_dpo")
    ours = read_recipe("ppd")
    steps = {"ppd": config.ppd_steps or ours["max_train_steps"], "all": config.all_steps}.get(name, config.separate_steps)
    same = ("train_batch_size", "beta", "lr_scheduler", "lr_warmup_steps")
    recipe |= {key: ours[key] for key in same} | {"max_train_steps": steps, "seed": config.seed, "held_out_pairs": 0}
    recipe |= {"learning_rate": config.all_learning_rate} if name == "all" else {}
    recipe |= {"check_images": False, "validation_steps": None, "merge_lora": False, "split": "train", "checkpointing_steps": 10_000}
    for place in ("pretrained_model_name_or_path", "train_data_dir"):
        recipe.pop(place)
    return recipe


def train_one(config: UsersConfig, name: str) -> str:
    """Train a model unless an earlier call did with the same settings."""
    out, settings = Path(config.out), settings_of(config, name)
    data = name.removeprefix("separate-") if name.startswith("separate") else "seen"
    train_once(settings, out / "pairs" / data, out / name)
    return name


def train_once(settings: Settings, data: Path, folder: Path) -> None:
    """Train the testbed's model on the pairs in `data` unless <folder>.json says that an earlier call did with the same settings."""
    note = folder.with_name(f"{folder.name}.json")
    if note.exists() and json.loads(note.read_text())["settings"] == json.loads(json.dumps(settings)):
        return
    shutil.rmtree(folder, ignore_errors=True)
    places = {"pretrained_model_name_or_path": str(asset("testbed", "pipeline")), "train_data_dir": str(data), "output_dir": str(folder)}
    own = objective_names(settings["method"])
    objective = build_objective(settings["method"], {k: v for k, v in settings.items() if k in own})
    start = time.process_time()
    align(build(TrainConfig, {k: v for k, v in (settings | places).items() if k in names_of(TrainConfig)}), objective)
    note.write_text(json.dumps({"settings": settings, "cpu_seconds": time.process_time() - start}))


def draw_one(config: UsersConfig, name: str) -> str:
    """Pictures of the measured prompts by a model, or by PPD for a user, unless they are there."""
    out = Path(config.out)
    path = out / "pictures" / f"{name}-{config.purpose}-{config.num_prompts}.npz"
    trained = out / ("ppd.json" if name.startswith("ppd-") else f"{name}.json")
    if path.exists() and not (trained.exists() and trained.stat().st_mtime > path.stat().st_mtime):
        return name
    texts, seeds = prompts_of(config), seeds_for(config.num_prompts)
    if name.startswith("ppd-"):
        images = Personal(config).draw(name.removeprefix("ppd-"), texts, seeds)
    else:
        lora = None if name == "base" else str(out / name)
        images = Sampler(str(asset("testbed", "pipeline")), lora)(texts, seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images)
    return name


def prompts_of(config: UsersConfig) -> list[str]:
    """The prompts of the measurement."""
    return draw_prompts(config.purpose, config.num_prompts).texts  # type: ignore[arg-type]


class Personal:
    """The trained PPD model and the examples of any user."""

    def __init__(self, config: UsersConfig) -> None:
        self.config, folder = config, Path(config.out) / "ppd"
        base = load_pipeline(str(asset("testbed", "pipeline")))
        self.pipeline = as_user_pipeline(base, folder)
        if (folder / LORA_FILE).exists():
            self.pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, use_safetensors=True)
        self.pipeline.set_progress_bar_config(disable=True)

    @cached_property
    def projector(self) -> ExampleEncoder:
        """The light encoder."""
        projector = self.pipeline._user_projector
        assert isinstance(projector, ExampleEncoder), "the measured encoder is the light one"
        return projector

    def contexts(self, user: str, number: int) -> Tensor:
        """Embeddings (number, N, F) of `number` draws of N of the user's pairs."""
        pairs = load_pairs(str(Path(self.config.out) / "pairs" / user), check_images=False)
        size = self.pipeline._user_config["encoder"]["num_examples"]
        drawn = [permutation(len(pairs), self.config.seed, "measured_context", user, m)[:size].tolist() for m in range(number)]
        return torch.stack([self.pipeline.encode_user([as_example(pairs.row(i)) for i in rows]) for rows in drawn])

    def draw(self, user: str, texts: Sequence[str], seeds: Sequence[int]) -> Images:
        """uint8 (P, 64, 64, 3), the user's contexts in turn over the prompts."""
        images: Images = np.zeros((len(texts), 64, 64, 3), np.uint8)
        for m, embeds in enumerate(self.contexts(user, CONTEXTS)):
            self.pipeline.set_user(user_embeds=embeds)
            rows = range(m, len(texts), CONTEXTS)
            images[list(rows)] = self.sample([texts[i] for i in rows], [seeds[i] for i in rows])
        return images

    def sample(self, texts: Sequence[str], seeds: Sequence[int]) -> Images:
        """Pictures for the user that is set."""
        return generate(self.pipeline, texts, seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE, batch_size=BATCH)


def measure_group(config: UsersConfig, users: Sequence[str]) -> dict[str, Any]:
    """Rewards of the users of one group under every model, paired by prompt and averaged over users."""
    texts, folder = prompts_of(config), Path(config.out) / "pictures"

    def found(name: str) -> dict[str, np.ndarray]:
        images = np.load(folder / f"{name}-{config.purpose}-{config.num_prompts}.npz")["images"]
        return qualities(read(images), texts)

    base, everyone = found("base"), found("all")
    own, alone = {user: found(f"ppd-{user}") for user in users}, {user: found(f"separate-{user}") for user in users}
    other = dict(zip(users, [*users[1:], users[0]], strict=True))
    rewards = {  # (users, prompts)
        "base": np.stack([score_of(user, base) for user in users]),
        "all": np.stack([score_of(user, everyone) for user in users]),
        "separate": np.stack([score_of(user, alone[user]) for user in users]),
        "ppd": np.stack([score_of(user, own[user]) for user in users]),
        "swapped": np.stack([score_of(user, own[other[user]]) for user in users]),
    }
    return {
        "users": {user: {name: float(x[i].mean()) for name, x in rewards.items()} for i, user in enumerate(users)},
        "reward": {name: float(x.mean()) for name, x in rewards.items()},
        "gap_closed": gap_closed(rewards),
        "differences": {f"ppd - {name}": interval(rewards["ppd"] - rewards[name]) for name in ("base", "all", "swapped")}
        | {f"{name} - base": interval(rewards[name] - rewards["base"]) for name in ("all", "separate")},
        "win_rates": {f"ppd against {name}": win_rate(rewards[name], rewards["ppd"]) for name in ("base", "all", "swapped")}
        | {"all against base": win_rate(rewards["base"], rewards["all"])},
    }


def interval(differences: np.ndarray) -> dict[str, float]:
    """Mean over users and prompts (U, P), and its 95 % interval under resampling of prompts."""
    mean, low, high = paired_bootstrap(differences.mean(0))
    return {"mean": mean, "low": low, "high": high}


def win_rate(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Share of (user, prompt) on which `after` is better, with Wilson's interval."""
    wins, number = count_wins(before.ravel(), after.ravel())
    low, high = wilson_interval(wins, number)
    return {"rate": wins / number, "low": low, "high": high, "number": number}


def gap_closed(rewards: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of the way from the model for all users to a model for each, with its interval under resampling of prompts."""
    gained, possible = ((rewards[name] - rewards["all"]).mean(0) for name in ("ppd", "separate"))
    picks = np.random.default_rng(0).integers(0, len(gained), (4000, len(gained)))
    low, high = np.quantile(gained[picks].mean(1) / possible[picks].mean(1), [0.025, 0.975])
    return {"share": float(gained.mean() / possible.mean()), "low": float(low), "high": float(high)}


def identification(config: UsersConfig, contexts: int = 8) -> dict[str, Any]:
    """Whose context is it? Nearest mean of the other half of a user's contexts, by cosine; all 24 users, and the unseen alone."""
    personal, users = Personal(config), all_users()
    with torch.no_grad():
        vectors = torch.stack([personal.projector.vector(personal.contexts(user, contexts)) for user in users])
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    centres = torch.nn.functional.normalize(vectors[:, ::2].mean(1), dim=-1)
    ranks = (vectors[:, 1::2] @ centres.T).argsort(-1, descending=True).argsort(-1)  # (U, M, U), 0 for the nearest
    own = torch.stack([ranks[i, :, i] for i in range(len(users))]).float()
    unseen = torch.tensor([user not in seen_users() for user in users])
    shares = {f"top_{k}": float((own < k).float().mean()) for k in (1, 3, 8)}
    return shares | {
        "top_3_unseen": float((own[unseen] < 3).float().mean()),
        "chance": {f"top_{k}": k / len(users) for k in (1, 3, 8)},
        "contexts": int(own.numel()),
    }


def interpolation(config: UsersConfig, first: str = "left+high", second: str = "right+accompanied", prompts: int = 32) -> dict[str, Any]:
    """Rewards of two users along the way from one to the other, for both ways of mixing; writes interpolation.png."""
    personal, texts, seeds = Personal(config), prompts_of(config)[:prompts], seeds_for(config.num_prompts)[:prompts]
    ends = torch.stack([personal.contexts(user, 1)[0] for user in (first, second)])
    names = dict(zip((first, second), ends, strict=True))
    personal.pipeline._user_embeds = personal.pipeline._user_embeds | names
    curves: dict[str, Any] = {"users": [first, second], "weights": list(WEIGHTS), "prompts": len(texts)}
    for mixing in ("embeddings", "branches"):
        rows = []
        for weight in WEIGHTS:
            personal.pipeline.set_user({first: 1 - weight, second: weight}, user_mixing=mixing)  # type: ignore[arg-type]
            rows.append(personal.sample(texts, seeds))
        found = [qualities(read(images), list(texts)) for images in rows]
        curves[mixing] = {user: [float(score_of(user, x).mean()) for x in found] for user in (first, second)}
        if mixing == "embeddings":
            grid = np.stack(rows)[:, :10]  # (W, P, ...)
            contact_sheet(list(grid), 2).save(Path(config.out) / "interpolation.png")
    return curves


def table(result: dict[str, Any]) -> str:
    """The numbers for people."""
    lines = [
        "| users | base | one model for all | PPD | PPD, users exchanged | a model each | gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in ("seen", "unseen"):
        r, gap = result[group]["reward"], result[group]["gap_closed"]
        means = " | ".join(f"{r[name]:.2f}" for name in ("base", "all", "ppd", "swapped", "separate"))
        lines.append(f"| {group} | {means} | {100 * gap['share']:.0f} % ({100 * gap['low']:.0f} to {100 * gap['high']:.0f}) |")
    return "\n".join([*lines, json.dumps(result["identification"]), json.dumps(result["interpolation"])])
