"""What a run learns from: pairs of files, or prompts that the policy samples its own pairs for."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffpref.core.types import Conditioning, Predict, PreferenceBatch
from diffpref.data.pairs import PairDataset, write_rejected
from diffpref.data.prompts import PromptSet, load_prompt_set
from diffpref.data.sampler import PairSampler
from diffpref.models.backbone import Backbone, vae_factor
from diffpref.scorers import SCORERS, scorer_from
from diffpref.scorers.step_aware import RELEASED, load_step_aware
from diffpref.sources.dataset import Encoder
from diffpref.sources.rollouts import Rollouts, RolloutState, Share
from diffpref.sources.stepwise import StepScorer, StepwiseSampling, new_asked, sample_pairs
from diffpref.training.config import TrainConfig
from diffpref.training.models import check_resolution
from diffpref.training.objective import Objective, fitted
from diffpref.training.order import new_sampler
from diffpref.training.pairs import load_run_pairs
from diffpref.training.port import Port, new_port
from diffpref.training.run_costs import Pictures
from diffpref.training.sources import new_encoder, new_pixels, new_source

if TYPE_CHECKING:
    from diffpref.training.run import Run


def with_steps(config: TrainConfig, sampler: PairSampler, accelerator: Accelerator) -> TrainConfig:
    """Settings whose max_train_steps are num_train_epochs passes over the pairs, if those are given; the last pass is completed."""
    if config.num_train_epochs is None:
        return config
    micro_batches = sampler.num_micro_batches(config.num_train_epochs, config.train_batch_size)
    steps = math.ceil(micro_batches / (config.gradient_accumulation_steps * accelerator.num_processes))
    return dataclasses.replace(config, max_train_steps=steps)


Begin = Callable[["Run", TrainConfig, int], Iterator[PreferenceBatch]]
"""(run, settings, first step) -> the run's batches from there on."""


@dataclass(frozen=True)
class Supply:
    """The data of a run, fitted to its model."""

    config: TrainConfig  # with the number of steps
    pictures: Pictures
    encoder: Encoder
    begin: Begin


@dataclass(frozen=True)
class NoPictures:
    """What a run that samples knows of its pictures."""

    resolution: int
    num_pictures: int = 2
    slots: tuple[int, ...] = (0, 1)

    def __len__(self) -> int:
        """None is stored."""
        return 0


@dataclass(frozen=True)
class RunPairs:
    """Stored pairs."""

    pairs: PairDataset
    held_out: PairDataset | None
    port: Port | None = None  # what the policy reads besides its prompt

    @property
    def fingerprint(self) -> str:
        """Equal for equal data."""
        return self.pairs.fingerprint

    def supply(self, config: TrainConfig, objective: Objective, backbone: Backbone, accelerator: Accelerator) -> Supply:
        """Pixels, their order, and the number of steps. Raises ValueError when the model cannot take resolution or bucket_step."""
        pixels = new_pixels(config, self.pairs, backbone, objective.groups, accelerator.is_main_process)
        sampler = new_sampler(config, pixels)
        encoder = new_encoder(config, backbone, accelerator.device, pixels.num_pictures)

        def begin(run: Run, settings: TrainConfig, first_step: int) -> Iterator[PreferenceBatch]:
            return new_source(settings, pixels, sampler, encoder, accelerator, first_step, port=self.port)

        return Supply(with_steps(config, sampler, accelerator), pixels, encoder, begin)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        counts = {"pairs": len(self.pairs), "ties": self.pairs.ties, "rejected": len(self.pairs.rejected)}
        return counts | {"fingerprint": self.pairs.fingerprint}

    def write_rejected(self, folder: Path) -> None:
        """List the rows that were set aside."""
        if self.pairs.rejected:
            write_rejected(self.pairs, folder / "rejected_rows.jsonl")
            print(f"rejected rows are listed in {folder / 'rejected_rows.jsonl'}", file=sys.stderr)


@dataclass(frozen=True)
class RunPrompts:
    """Prompts, and who judges what is sampled for them."""

    prompts: PromptSet
    sampling: StepwiseSampling
    scorer: StepScorer
    held_out: PairDataset | None = None
    port: Port | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for equal prompts."""
        return self.prompts.hash

    def supply(self, config: TrainConfig, objective: Objective, backbone: Backbone, accelerator: Accelerator) -> Supply:
        """The resolution, and rollouts by the policy. Raises ValueError for a resolution or grid that the model cannot take."""
        resolution = check_resolution(config, backbone)
        self.sampling.levels(backbone.process.num_timesteps)
        encoder = new_encoder(config, backbone, accelerator.device)

        def begin(run: Run, settings: TrainConfig, first_step: int) -> Iterator[PreferenceBatch]:
            return new_rollouts(run, settings, self, encoder, resolution)

        return Supply(config, NoPictures(resolution), encoder, begin)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        record = getattr(self.scorer, "record", {"name": self.sampling.step_scorer})
        counts = {"prompt_set": self.prompts.name, "prompts": len(self.prompts.texts), "rejected": len(self.prompts.rejected)}
        return counts | {"fingerprint": self.prompts.hash, "step_scorer": record}

    def write_rejected(self, folder: Path) -> None:
        """Say which entries were left out."""
        for reason in self.prompts.rejected[:10]:
            print(f"prompt_set: left out {reason}", file=sys.stderr)


def load_run_data(
    config: TrainConfig, objective: Objective, accelerator: Accelerator, scorer: StepScorer | None
) -> tuple[Objective, RunPairs | RunPrompts]:
    """The objective fitted to its data, and the data: pairs, or prompts and a scorer for a method that samples its own.

    scorer: stands for the one that step_scorer names.

    Raises ValueError for data that cannot be used and for settings that the kind of data would ignore.
    """
    sampling = objective.source
    if sampling is None:
        pairs, held_out = load_run_pairs(config, accelerator.is_main_process, objective.groups)
        objective, pairs = fitted(objective, pairs, config.train_data_dir)
        if objective.conditioning is None:
            return objective, RunPairs(pairs, held_out)
        port = new_port(objective.conditioning, config, pairs, held_out, accelerator.is_main_process)
        return objective, RunPairs(port.pairs, held_out, port)
    _check_settings(config, objective.name)
    if sampling.prompt_set is None:
        raise ValueError(f"prompt_set is missing: method {objective.name} samples its own pairs and needs prompts; give a file with them")
    if sampling.prompts_per_rollout < accelerator.num_processes:
        raise ValueError(
            f"prompts_per_rollout is {sampling.prompts_per_rollout}, but {accelerator.num_processes} processes sample them; raise it to "
            "at least that"
        )
    prompts = load_prompt_set(sampling.prompt_set, sampling.max_prompts)
    if accelerator.is_main_process:
        print(f"{len(prompts.texts)} prompts to sample pairs for, {len(prompts.rejected)} entries left out", file=sys.stderr)
    return objective, RunPrompts(prompts, sampling, scorer or load_step_scorer(sampling.step_scorer, accelerator.device))


_OF_PAIRS = (
    *("train_data_dir", "dataset_name", "streaming", "max_train_samples", "held_out_pairs", "label_noise_prob", "tie_policy"),
    *("choice_model", "random_crop", "no_hflip", "aspect_ratio_buckets", "proportion_empty_prompts", "cache_latents"),
    *("dataloader_num_workers", "num_train_epochs", "desirable_share", "curriculum_stages", "rarity_score", "list_size", "caption_edits"),
    *("latent_cache", "reference_errors"),
)
"""Settings of stored pairs that a method that samples its own would ignore."""


def _check_settings(config: TrainConfig, method: str) -> None:
    for name in _OF_PAIRS:
        if getattr(config, name) != getattr(TrainConfig, name):
            remedy = {
                "train_data_dir": "give prompts with prompt_set instead",
                "dataset_name": "give prompts with prompt_set instead",
                "label_noise_prob": "its control is shuffle_scores",
                "num_train_epochs": "how many pairs a pass gives is not known beforehand; use max_train_steps",
            }.get(name, "leave it out")
            raise ValueError(f"{name} is {getattr(config, name)}, but method {method} samples its own pairs: {remedy}")


def load_step_scorer(spec: str | None, device: torch.device) -> StepScorer:
    """The judge that step_scorer names: a step-aware model, or a scorer of pictures, which is asked without the timestep.

    Raises ValueError when there is no such scorer or it cannot be loaded.
    """
    known = f"{', '.join(RELEASED)}, spm=FOLDER, or a scorer of pictures: {', '.join(SCORERS)}"
    if spec is None:
        raise ValueError(f"step_scorer is missing; accepted: {known}")
    name = spec.partition("=")[0]
    if name not in (*RELEASED, "spm", *SCORERS):
        raise ValueError(f"step_scorer {spec!r} is unknown; accepted: {known}")
    try:
        if name not in SCORERS:
            return load_step_aware(spec, device)
        scorer = scorer_from(spec, device)
    except ValueError as error:
        raise ValueError(f"step_scorer {spec!r}: {error}") from error

    @torch.no_grad()
    def score(pixels: Tensor, prompts: Sequence[str], timestep: int) -> Tensor:
        return scorer.score_pixels(pixels, prompts)

    score.record = scorer.record  # type: ignore[attr-defined]  # for the manifest
    return score


def new_rollouts(run: Run, config: TrainConfig, data: RunPrompts, encoder: Encoder, resolution: int) -> Rollouts:
    """The batches of a run that samples. A probe, which comes before the run's own source, gets a state of its own."""
    accelerator, backbone = run.accelerator, run.backbone
    share = Share(config.train_batch_size, config.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes)
    is_probe = not hasattr(run, "source_from")
    ask = new_asked(
        data.sampling,
        run.process,
        under(run.policy, accelerator.autocast),
        run.null,
        partial(backbone.decode, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[data.sampling.decode_dtype]),
        data.scorer,
        accelerator.device,
    )
    side = resolution // vae_factor(backbone.pipeline)
    shape = (int(backbone.denoiser.config.in_channels), side, side)

    def report(facts: dict[str, float]) -> None:
        if not is_probe:
            run.log.record(run.scheduler.last_epoch + 1, facts)
            run.say(
                f"rollout {facts['rollout/number']:.0f}: {facts['rollout/pairs']:.0f} pairs, {100 * facts['rollout/valid']:.0f} % of "
                f"decisions, score {facts['rollout/score']:.3f}, of finished pictures {facts['rollout/final_score']:.3f}"
            )

    return Rollouts(
        data.sampling,
        data.prompts.texts,
        partial(complete_rows, encoder, resolution),
        lambda places, texts, cond: sample_pairs(data.sampling, ask, places, texts, cond, shape, config.seed),
        run.process,
        share,
        config.seed,
        accelerator.device,
        RolloutState() if is_probe or run.state.rollout is None else run.state.rollout,
        report,
    )


def complete_rows(encoder: Encoder, resolution: int, prompts: Sequence[str]) -> list[Conditioning]:
    """N prompts to N pieces (1, 1, ...) on the device, with the sizes of uncropped pictures where the model wants them."""
    side = float(resolution)
    sizes = torch.tensor([side, side, 0, 0, side, side], device=encoder.device).expand(1, 1, 6)
    rows = [row.map(lambda x: x.to(encoder.device)) for row in encoder.prompt_rows(prompts)]
    return [dataclasses.replace(row, time_ids=sizes) for row in rows] if encoder.uses_time_ids else rows


def under(predict: Predict, context: Callable[[], AbstractContextManager[Any]]) -> Predict:
    """The same function within a context, such as autocast."""

    def inside(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        with context():
            return predict(x_t, timesteps, cond)

    return inside
