"""`diffpref testbed spm`: the testbed's step-aware preference model, its pairs, its training, and what it can do per noise level.

It starts from the testbed's reward model and learns from the same noisy labels of base samples, pairs and all, never from the true
reward. The pairs that are shipped for training a policy are kept out: on them it is measured.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffpref.core.preference import agreement
from diffpref.data.images import decode_image
from diffpref.data.pairs import PairDataset, load_pairs
from diffpref.data.sampler import Item
from diffpref.evaluation.stats import wilson_interval
from diffpref.locations import asset, config_file
from diffpref.models.backbone import load_backbone
from diffpref.scorers.pickscore import load_pickscore
from diffpref.scorers.preprocessing import ShortestSideCrop
from diffpref.scorers.step_aware import load_step_aware
from diffpref.scorers.weights import sha256
from diffpref.sources.stepwise import StepScorer
from diffpref.testbed.reward import reward
from diffpref.testbed.sampling import GUIDANCE
from diffpref.testbed.scorer import FILES, ScorerConfig, make_scorer_pairs
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_loop import RESULT_FILE, fit
from diffpref.training.reward_pairs import RewardPairs
from diffpref.training.run_folder import CONFIG_FILE, versions, write_json
from diffpref.training.settings import Settings, build, names_of, read_yaml
from diffpref.training.step_aware import LEVELS, EstimateView
from diffpref.training.step_aware_config import StepAwareConfig


@dataclass(frozen=True, kw_only=True)
class SpmConfig:
    """Settings of `diffpref testbed spm`."""

    out: str = "outputs/testbed/spm"
    """Folder of the run and the finished model; a run that is there is gone on with."""
    pairs: str = "outputs/testbed/scorer/pairs"
    """Folder of the reward model's pairs; made anew (`diffpref testbed scorer` does the same) when they are not there."""
    scorer: str | None = None
    """Reward model to start from; the shipped one when not given."""
    steps: int | None = None
    """Another number of updates than the recipe's, for a trial."""
    measured_pairs: int = 500
    """Shipped pairs that the finished model is measured on."""


def build_spm(config: SpmConfig) -> None:
    """Make the pairs, train, measure, and gather the model with its manifest in `out`/step_aware_scorer."""
    out, pairs = Path(config.out), Path(config.pairs)
    facts = make_scorer_pairs(ScorerConfig(out=str(pairs.parent)), pairs)["sampled"]
    chosen = out / "pairs"
    chosen.mkdir(parents=True, exist_ok=True)
    shutil.copy(pairs / "train-sampled.parquet", chosen / "train-sampled.parquet")
    run = out / "run"
    scorer = config.scorer or str(asset("testbed", "scorer"))
    fitted = fit(*recipe(config, scorer, chosen, run))
    measured = measure_spm(load_step_aware(f"spm={run}"), scorer, config.measured_pairs)
    folder = out / "step_aware_scorer"
    folder.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(run / name, folder / name)
    manifest = {
        "what": "step-aware preference model of the testbed, made from its reward model; released layout, float16",
        "command": "diffpref testbed spm",
        "step": fitted.step,
        "pairs": facts,
        "held_out": json.loads((run / RESULT_FILE).read_text()),
        "measured": measured,
        "sha256": sha256(run / "model.safetensors"),
        "versions": versions(),
    }
    write_json(folder / RESULT_FILE, manifest)
    print(json.dumps(measured, indent=1))


def recipe(config: SpmConfig, scorer: str, pairs: Path, run: Path) -> tuple[RewardModelConfig, StepAwareConfig]:
    """configs/testbed/step_aware_scorer.yaml with the testbed's model and pairs."""
    known = [*names_of(RewardModelConfig), *names_of(StepAwareConfig)]
    settings = read_yaml(config_file("testbed", "step_aware_scorer.yaml"), known) | {
        "pretrained_model_name_or_path": scorer,
        "diffusion_model_name_or_path": str(asset("testbed", "pipeline")),
        "train_data_dir": str(pairs),
        "output_dir": str(run),
        "resume_from_checkpoint": "latest" if (run / CONFIG_FILE).exists() else None,
    }
    if config.steps:
        settings |= {"max_train_steps": config.steps, "validation_steps": config.steps}
    own = build(StepAwareConfig, {name: settings.pop(name) for name in names_of(StepAwareConfig) if name in settings})
    return build(RewardModelConfig, settings), own


def measure_spm(scorer: StepScorer, start: str, max_pairs: int) -> Settings:
    """Accuracy per timestep on the shipped pairs, whose pictures were never trained on, beside the reward model it started from.

    accuracy: against the labels; agreement: against the true reward of the pictures, whose own agreement with the labels is the ceiling.
    """
    pairs = load_pairs(str(asset("testbed", "pairs")), split="own", max_samples=max_pairs)
    plain = load_pickscore(start)
    judges: dict[str, StepScorer] = {
        "step_aware": scorer,
        "without_timestep": lambda pixels, prompts, t: plain.score_pixels(pixels, prompts),
    }
    rows = [pairs.row(i) for i in range(len(pairs))]
    truth = [reward(np.stack([np.asarray(decode_image(getattr(r, k))) for r in rows]), pairs.prompts) for k in ("image_0", "image_1")]
    better = torch.from_numpy((truth[0] > truth[1]) + 0.5 * (truth[0] == truth[1])).float()
    labels = torch.from_numpy(pairs.p0).float()
    found: Settings = {"shipped_pairs": len(pairs), "ceiling": float(agreement(torch.from_numpy(np.stack(truth, 1)), labels).mean())}
    for level in LEVELS:
        scores = _scores(judges, pairs, level)
        found[f"t{level}"] = {name: _shares(scores[name], labels, better) for name in judges}
    return found


def _scores(judges: dict[str, StepScorer], pairs: PairDataset, level: int) -> dict[str, torch.Tensor]:
    """Scores (N, 2) of the pairs' estimates at a level, by judge."""
    backbone = load_backbone(str(asset("testbed", "pipeline")))
    side = backbone.default_resolution
    view = EstimateView(backbone, ShortestSideCrop(side), side, side, GUIDANCE, seed=5)
    data = RewardPairs(pairs, view.preprocessing)
    items: list[Item] = [(i, 0) for i in range(len(pairs))]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in judges}
    for batch in data.batches([items[i : i + 64] for i in range(0, len(items), 64)], 1):
        pixels = view.estimates(batch, level)[0]
        prompts = [prompt for prompt in batch.prompts for _ in (0, 1)]
        for name, judge in judges.items():
            parts[name].append(judge(pixels.flatten(0, 1), prompts, level).unflatten(0, (-1, 2)))
    return {name: torch.cat(scores) for name, scores in parts.items()}


def _shares(scores: torch.Tensor, labels: torch.Tensor, better: torch.Tensor) -> Settings:
    right = float(agreement(scores, labels).sum())
    interval = list(wilson_interval(right, len(labels)))
    return {"accuracy": right / len(labels), "interval_95": interval, "agreement": float(agreement(scores, better).mean())}
