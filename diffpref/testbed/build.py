"""`diffpref testbed PART`: every file of the testbed from seeds and step counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers import AutoencoderKL

from diffpref.evaluation.generate import as_rows, contact_sheet
from diffpref.locations import asset
from diffpref.testbed.axes_results import AxesConfig, run_axes
from diffpref.testbed.demo import CompareConfig, compare_models
from diffpref.testbed.leaderboard import LeaderboardConfig, run_leaderboard
from diffpref.testbed.measure import Ruler, fingerprint, measure, seeds_for, shares
from diffpref.testbed.pairs import make_pairs
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.results import ResultsConfig, run_results
from diffpref.testbed.reward import reward
from diffpref.testbed.sampling import GUIDANCE, STEPS, Sampler, sample_parallel
from diffpref.testbed.scorer import ScorerConfig, build_scorer
from diffpref.testbed.spm import SpmConfig, build_spm
from diffpref.testbed.spo import SpoConfig, compare_spo
from diffpref.testbed.train_base import train_base
from diffpref.testbed.train_vae import psnr, refine_decoder, render_set, train_vae
from diffpref.testbed.users_results import UsersConfig, run_users
from diffpref.testbed.world import IMAGE_SIZE, SHAPES, SIZES, render, sample_scenes


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Settings of `diffpref testbed vae`."""

    out: str = "outputs/testbed/vae"
    """Folder of the autoencoder."""
    steps: int = 6000
    """Steps of 16 images in each process."""
    refine_steps: int = 3000
    """Further steps of the decoder alone."""
    images: int = 24_000
    """Rendered training pictures."""
    seed: int = 1
    """Seed of data, weights and batches."""
    processes: int = 2
    """Processes of one thread each; part of the recipe, another number gives another model."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Settings of `diffpref testbed base`."""

    vae: str = "outputs/testbed/vae"
    """Folder of the autoencoder."""
    out: str = "outputs/testbed/pipeline"
    """Folder of the pipeline."""
    steps: int = 5500
    """Steps of 64 latents in each process."""
    images: int = 32_000
    """Rendered training pictures."""
    seed: int = 1
    """Seed of data, weights and batches."""
    processes: int = 2
    """Processes of one thread each; part of the recipe, another number gives another model."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Settings of `diffpref testbed pairs`."""

    regime: Literal["own", "mismatch", "noisy"] = "own"
    """own: samples of the base; mismatch: a worse, restyled generator; noisy: 12 % ties and 60 % agreement."""
    pairs: int = 2400
    """Number of pairs."""
    seed: int = 0
    """Seed of pictures and labels."""
    out: str = "outputs/testbed/pairs"
    """Folder of the parquet file."""
    model: str | None = None
    """Folder of the base pipeline; the shipped one when not given."""
    processes: int = 2
    """Processes of one thread each."""


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """Settings of `diffpref testbed ruler`."""

    out: str = "outputs/testbed/ruler.json"
    """File to write."""
    prompts: int = 500
    """Test prompts."""
    samples: int = 12
    """Base pictures per prompt."""
    model: str | None = None
    """Folder of the base pipeline; the shipped one when not given."""
    processes: int = 2
    """Processes of one thread each."""


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """Settings of `diffpref testbed describe`."""

    out: str = "docs/images"
    """Folder of the pictures."""
    prompts: int = 500
    """Validation prompts."""
    model: str | None = None
    """Folder of the base pipeline; the shipped one when not given."""
    processes: int = 2
    """Processes of one thread each."""


def build_vae(config: VaeConfig) -> None:
    """Train the autoencoder and refine its decoder."""
    train_vae(Path(config.out), config.steps, config.images, config.seed, config.processes)
    refine_decoder(Path(config.out), config.refine_steps, config.images // 2, config.seed, config.processes)


def build_base(config: BaseConfig) -> None:
    """Train text encoders and UNet."""
    train_base(Path(config.vae), Path(config.out), config.steps, config.images, config.seed, config.processes)


def build_pairs(config: PairsConfig) -> None:
    """Sample and label pairs; prints what the set is like."""
    model = config.model or str(asset("testbed", "pipeline"))
    facts = make_pairs(config.regime, model, config.pairs, config.seed, config.processes, Path(config.out))
    print(json.dumps(facts))


def build_ruler(config: RulerConfig) -> None:
    """Score many base pictures per test prompt."""
    model = config.model or str(asset("testbed", "pipeline"))
    texts = draw_prompts("test", config.prompts).texts
    columns = []
    for sample in range(1, config.samples + 1):
        images = sample_parallel(Sampler(model), texts, seeds_for(len(texts), sample), config.processes)
        columns.append(reward(images, texts))
        print(f"ruler {sample}/{config.samples}: mean {columns[-1].mean():.3f}", flush=True)
    Ruler(fingerprint(Path(model)), STEPS, GUIDANCE, np.stack(columns, 1)).save(Path(config.out))


def describe(config: DescribeConfig) -> None:
    """Accuracy of the checker on renders, quality of autoencoder and base model, and their pictures."""
    model = config.model or str(asset("testbed", "pipeline"))
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(np.random.default_rng(99), config.prompts)
    drawn = (render(scenes) * 255).round().astype(np.uint8)
    print("checker on renders", _rounded(shares(measure(drawn, scenes.captions()))))
    contact_sheet(as_rows(drawn[:36], 12), 2).save(folder / "world.png")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").float()
    print(f"autoencoder {psnr(vae, render_set(12345, 500)):.2f} dB on 500 renders")
    texts = draw_prompts("validation", config.prompts).texts
    images = sample_parallel(Sampler(model), texts, seeds_for(len(texts)), config.processes)
    found = measure(images, texts)
    print("base", _rounded(shares(found)), f"reward {found.score.mean():.3f}, sd {found.score.std():.3f}")
    print("parts", _rounded({k: float(v.mean()) for k, v in found.parts.items()}))
    for name, values in (("size", SIZES), ("shape", SHAPES)):
        for value in values:
            rows = np.array([f" {value} " in f" {t.replace(',', ' ')} " for t in texts])
            right = {k: float(v[rows].mean()) for k, v in found.following.items()}
            print(f"{name} {value} (n={rows.sum()})", _rounded(right))
    contact_sheet(as_rows(images[:48], 12), 2).save(folder / "base.png")
    assert images.shape[1] == IMAGE_SIZE


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in values.items()}


PARTS: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
    "vae": (VaeConfig, build_vae),
    "base": (BaseConfig, build_base),
    "pairs": (PairsConfig, build_pairs),
    "ruler": (RulerConfig, build_ruler),
    "scorer": (ScorerConfig, build_scorer),
    "describe": (DescribeConfig, describe),
    "users": (UsersConfig, run_users),
    "axes": (AxesConfig, run_axes),
    "compare": (CompareConfig, compare_models),
    "results": (ResultsConfig, run_results),
    "leaderboard": (LeaderboardConfig, run_leaderboard),
    "spm": (SpmConfig, build_spm),
    "spo": (SpoConfig, compare_spo),
}
