"""The testbed's own reward model in PickScore's layout: its pairs, its training, and what it can do.

Its pairs are drawn for prompts of the purpose "pairs" only. Samples of the base model are what it will have to score; rendered
scenes, passed through the model's autoencoder so that they look like samples, are cheaper and show more placements. Both are
labelled by the same noisy judge as the shipped pairs, with 90 % agreement, and never with the true reward itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffpref.data.images import decode_image
from diffpref.data.pairs import load_pairs
from diffpref.evaluation.generate import Images
from diffpref.evaluation.stats import wilson_interval
from diffpref.locations import asset, config_file
from diffpref.scorers.pickscore import load_pickscore
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import sha256
from diffpref.testbed.checker import Reading, read
from diffpref.testbed.measure import seeds_for
from diffpref.testbed.pairs import AGREEMENT, judge, pick_a_pic_table, sample_regime, through_jpeg
from diffpref.testbed.prompts import draw_prompts, is_unseen
from diffpref.testbed.reward import WEIGHTS, qualities, reward, total
from diffpref.testbed.sampling import Sampler, sample_parallel
from diffpref.testbed.train_vae import to_signal
from diffpref.testbed.world import render, sample_scenes
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_loop import RESULT_FILE, fit
from diffpref.training.run_folder import CONFIG_FILE, MANIFEST_FILE, versions, write_json
from diffpref.training.settings import Settings, build, names_of, read_yaml

FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
"""What makes up a scorer."""


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Settings of `diffpref testbed scorer`."""

    out: str = "outputs/testbed/scorer"
    """Folder of the pairs, the run and the finished scorer; pairs and checkpoints that are there already are used."""
    prompts: int = 2400
    """Prompts with four samples of the base model each; every two of them make a pair."""
    scenes: int = 24_000
    """Rendered scenes."""
    steps: int = 1600
    """Optimizer steps of 64 pairs."""
    held_out_pairs: int = 1000
    """Pairs on which the best step is chosen."""
    seed: int = 1
    """Seed of pictures, labels, weights and order; 0 is that of the shipped pairs, on which the scorer is measured."""
    validation_prompts: int = 500
    """Prompts whose base samples the scorer is compared with the true reward on."""
    model: str | None = None
    """Folder of the base pipeline; the shipped one when not given."""
    processes: int = 2
    """Processes of one thread each, for sampling."""

    def __post_init__(self) -> None:
        if not 1 <= self.seed <= 4:
            raise ValueError(
                f"seed is {self.seed}; accepted: 1 to 4, whose pictures are neither the shipped pairs nor those of evaluations"
            )


@dataclass(frozen=True)
class PairedPictures:
    """M pictures and the N pairs that are made of them."""

    images: Images  # uint8 (M, 64, 64, 3)
    first: np.ndarray  # (N,) index of image 0
    second: np.ndarray  # (N,) index of image 1
    prompts: list[str]  # (N,)


def shipped_scorer() -> Scorer:
    """The reward model that comes with the testbed, under the name `testbed_pickscore`."""
    return dataclasses.replace(load_pickscore(str(asset("testbed", "scorer"))), name="testbed_pickscore")


def sampled(model: str, num_prompts: int, seed: int, num_processes: int) -> PairedPictures:
    """Every two of four samples of the base model for each prompt."""
    prompts = draw_prompts("pairs", num_prompts).texts
    images = np.concatenate(sample_regime("own", model, prompts, seed, num_processes))
    rows, combinations = np.arange(num_prompts), list(itertools.combinations(range(len(images) // num_prompts), 2))
    first, second = (np.concatenate([c[k] * num_prompts + rows for c in combinations]) for k in (0, 1))
    return PairedPictures(images, first, second, prompts * len(combinations))


@torch.no_grad()
def rendered(model: str, num_scenes: int, seed: int) -> PairedPictures:
    """Rendered scenes through the autoencoder, in two kinds of pairs: of equal captions, and of equal colours only.

    Pairs of the second kind have the caption of one of their pictures, so that they show what following the prompt means.
    """
    rng = np.random.default_rng([seed, 44])
    scenes = sample_scenes(rng, num_scenes)
    scenes = scenes[np.array([not is_unseen(int(scene)) for scene in scenes.scene_ids()])]
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").float()
    images = []
    for start in range(0, len(scenes), 100):
        drawn = torch.from_numpy(render(scenes[start : start + 100])).permute(0, 3, 1, 2)
        seen = vae.decode(vae.encode(to_signal(drawn * 255)).latent_dist.mode()).sample.clamp(-1, 1)
        images.append(((seen + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    pairs = np.concatenate([_neighbours(key, rng) for key in (scenes.scene_ids(), scenes.colour * 100 + scenes.background)])
    pairs = rng.permuted(pairs, axis=1)
    captions = scenes.captions()
    described = pairs[np.arange(len(pairs)), rng.integers(0, 2, len(pairs))]
    return PairedPictures(np.concatenate(images), pairs[:, 0], pairs[:, 1], [captions[i] for i in described])


def _neighbours(key: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random disjoint pairs of indices with equal keys, (N, 2)."""
    order = np.lexsort((rng.random(len(key)), key))
    place = np.arange(len(key)) - np.searchsorted(key[order], key[order])  # within the rows of one key
    start = np.flatnonzero((place[:-1] % 2 == 0) & (key[order][1:] == key[order][:-1]))
    return np.stack([order[start], order[start + 1]], 1)


def write_pairs(pictures: PairedPictures, path: Path, seed: int, model_name: str) -> Settings:
    """Label and write pairs in the Pick-a-Pic v2 schema; returns what the set is like."""
    seen, encoded = through_jpeg(pictures.images)
    reading = read(seen)
    first, second = (total(qualities(_rows(reading, index), pictures.prompts), WEIGHTS) for index in (pictures.first, pictures.second))
    labels = judge(first - second, AGREEMENT["own"], 0.0, seed)
    bytes_0, bytes_1 = ([encoded[i] for i in index] for index in (pictures.first, pictures.second))
    table = pick_a_pic_table(pictures.prompts, bytes_0, bytes_1, labels.p0, seed, model_name)
    counts = Counter(pictures.prompts)
    column = table.column_names.index("num_example_per_prompt")
    table = table.set_column(column, "num_example_per_prompt", pa.array([counts[p] for p in pictures.prompts], pa.int64()))
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}")
    pq.write_table(table, hidden, compression="zstd")
    hidden.replace(path)
    return {"pairs": len(labels.p0), "pictures": len(encoded), "agreement": labels.agreement(first - second)}


def _rows(reading: Reading, index: np.ndarray) -> Reading:
    return Reading(**{f.name: getattr(reading, f.name)[index] for f in dataclasses.fields(reading)})


def make_scorer_pairs(config: ScorerConfig, folder: Path) -> Settings:
    """Write train-sampled.parquet and train-rendered.parquet unless they are there; returns what the sets are like."""
    model = config.model or str(asset("testbed", "pipeline"))
    facts = folder / "facts.json"
    if facts.exists():
        found: Settings = json.loads(facts.read_text())
        return found
    # different seeds of labels and ids; neither is the seed of another regime's pairs
    from_renders = rendered(model, config.scenes, config.seed)
    found = {"rendered": write_pairs(from_renders, folder / "train-rendered.parquet", 100 + config.seed, "testbed-renders")}
    from_samples = sampled(model, config.prompts, config.seed, config.processes)
    found["sampled"] = write_pairs(from_samples, folder / "train-sampled.parquet", 200 + config.seed, "testbed-base")
    write_json(facts, found)
    return found


def recipe(config: ScorerConfig, pairs: Path, run: Path) -> RewardModelConfig:
    """configs/testbed/reward_model.yaml with the testbed's model size, tokenizer and pairs; resumes a run that is there."""
    changes = {
        "clip_config": str(config_file("testbed", "reward_model_clip.json")),
        "tokenizer_name": str(asset("testbed", "pipeline", "tokenizer")),
        "train_data_dir": str(pairs),
        "output_dir": str(run),
        "max_train_steps": config.steps,
        "held_out_pairs": config.held_out_pairs,
        "seed": config.seed,
        "resume_from_checkpoint": "latest" if (run / CONFIG_FILE).exists() else None,
    }
    return build(RewardModelConfig, read_yaml(config_file("testbed", "reward_model.yaml"), names_of(RewardModelConfig)) | changes)


def build_scorer(config: ScorerConfig) -> None:
    """Make the pairs, train, measure, and gather the scorer with its manifest in `out`/scorer."""
    out = Path(config.out)
    facts = make_scorer_pairs(config, out / "pairs")
    fitted = fit(recipe(config, out / "pairs", out / "run"))
    measured = measure_scorer(out / "run", config.model, config.validation_prompts, config.processes)
    run = json.loads((out / "run" / MANIFEST_FILE).read_text())
    manifest = {
        "what": "reward model of the testbed, a proxy of its true reward; PickScore layout, float16",
        "command": "diffpref testbed scorer",
        "seed": config.seed,
        "step": fitted.step,
        "pairs": facts | {"fingerprint": run["data"]["fingerprint"], "held_out": run["data"]["held_out_pairs"]},
        "held_out_accuracy": fitted.accuracy,
        "measured": measured,
        "sha256": sha256(out / "run" / "model.safetensors"),
        "versions": versions(),
    }
    scorer = out / "scorer"
    scorer.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(out / "run" / name, scorer / name)
    write_json(scorer / RESULT_FILE, manifest)
    print(json.dumps(measured, indent=1))


def measure_scorer(folder: Path, model: str | None, num_prompts: int, num_processes: int, max_pairs: int | None = None) -> Settings:
    """The scorer on the first `max_pairs` shipped pairs, none of whose pictures it was trained on, and on samples of the base.

    ceiling: how often the shipped labels agree with the true reward, the best that any scorer can expect to reach on them.
    """
    scorer = load_pickscore(str(folder))
    pairs = load_pairs(str(asset("testbed", "pairs")), split="own", max_samples=max_pairs)
    rows = [pairs.row(i) for i in range(len(pairs))]
    pictures = [decode_image(data) for row in rows for data in (row.image_0, row.image_1)]
    texts = [prompt for prompt in pairs.prompts for _ in (0, 1)]
    guess = -np.diff(scorer(pictures, texts).numpy().reshape(-1, 2))[:, 0]
    truth = -np.diff(reward(np.stack([np.asarray(p) for p in pictures]), texts).reshape(-1, 2))[:, 0]
    found: Settings = {"shipped_pairs": len(pairs)}
    for name, wanted, given in (
        ("accuracy", pairs.p0 - 0.5, guess),
        ("agreement_with_true_reward", truth, guess),
        ("ceiling", pairs.p0 - 0.5, truth),
    ):
        right = int((np.sign(wanted) == np.sign(given)).sum())
        found[name] = {"value": right / len(pairs), "interval_95": list(wilson_interval(right, len(pairs)))}
    found["correlation_of_differences"] = _correlation(guess, truth)
    return found | _on_base_samples(folder, model or str(asset("testbed", "pipeline")), num_prompts, num_processes)


def _on_base_samples(folder: Path, model: str, num_prompts: int, num_processes: int) -> Settings:
    """Two base samples for each validation prompt: correlation with the true reward, and how often both order them alike."""
    prompts = draw_prompts("validation", num_prompts)
    images = [sample_parallel(Sampler(model), prompts.texts, seeds_for(num_prompts, sample), num_processes) for sample in (0, 1)]
    scorer = load_pickscore(str(folder))
    scores = np.stack([scorer([Image.fromarray(image) for image in part], prompts.texts).numpy() for part in images])
    truth = np.stack([reward(part, prompts.texts) for part in images])
    different = truth[0] != truth[1]
    same_order = np.sign(scores[0] - scores[1]) == np.sign(truth[0] - truth[1])
    unseen = prompts.unseen
    return {
        "validation_prompts": num_prompts,
        "correlation_on_base_samples": _correlation(scores, truth),
        "correlation_on_unseen_scenes": _correlation(scores[:, unseen], truth[:, unseen]),
        "same_order_of_two_samples": float(same_order[different].mean()),
        "true_reward_of_the_better_of_two": {
            "by_chance": float(truth.mean()),
            "by_the_scorer": float(truth[scores.argmax(0), np.arange(num_prompts)].mean()),
            "by_the_true_reward": float(truth.max(0).mean()),
        },
        "mean_and_spread": [float(scores.mean()), float(scores.std())],
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None for fewer than three numbers."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if a.size > 2 else None
