"""`diffpref label`: make pairs from a model's pictures, or score and label existing ones. Interrupted work goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from diffpref.data.pairs import load_pairs
from diffpref.evaluation.generate import Images, generate
from diffpref.evaluation.work import claim_folder
from diffpref.inference.sample import DTYPES, SampleConfig, load, read_prompts
from diffpref.labelling.pairs import Score, pair_up, score_shards
from diffpref.labelling.relabel import score_pairs, write_labels

SETTINGS_FILE = "label_settings.json"


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Settings of `diffpref label`. Give prompts to make pairs, or data to score existing ones."""

    scorers: tuple[str, ...] = ()
    """Scorers, as name or name=weights; "testbed" is the testbed's true reward, "testbed_pickscore" its proxy."""
    rule: Literal["mean_z", "log_sigmoid", "majority", "win_count", "pareto"] | None = None
    """How several scorers decide; mean_z for new pairs when not given, the human label stays for existing ones."""
    min_margin: float = 0.0
    """Pairs whose verdict is smaller are undecided: left out of new pairs, ties among existing ones."""
    output_dir: str = "outputs/pairs"
    """Folder of the parquet files; train on it with --train_data_dir."""
    shard_size: int = 64
    """Prompts (or existing pairs) per file: what is lost at most when the work is interrupted."""

    prompts: tuple[str, ...] = ()
    """Prompts of new pairs; quote each."""
    prompt_file: str | None = None
    """Text file with one prompt per line, in place of prompts."""
    num_images_per_prompt: int = 4
    """Pictures that are drawn and scored per prompt."""
    pairs: Literal["best_worst", "all", "ranked"] = "best_worst"
    """What a prompt's pictures give: one pair, every decided pair, or one row with all of them and their ranks."""
    image_format: Literal["png", "jpeg"] = "png"
    """How pictures are stored; they are scored as they are stored."""
    pretrained_model_name_or_path: str | None = None
    """Model that draws the pictures; the embedded testbed model when not given."""
    lora: str | None = None
    """LoRA on that model."""
    sampler: Literal["checkpoint", "ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc"] = "checkpoint"
    """Scheduler; the checkpoint's own by default."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 switches it off."""
    batch_size: int = 8
    """Pictures per forward pass."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Dtype of the networks."""
    seed: int = 0
    """Seed of the pictures and of their order in a pair."""

    train_data_dir: str | None = None
    """Existing pairs: a file or folder as for training."""
    dataset_name: str | None = None
    """Existing pairs by hub id."""
    split: str = "train"
    """Split of the existing pairs."""
    data_format: str = "auto"
    """Form of the existing pairs (docs/data.md)."""
    cache_dir: str | None = None
    """Where converted data is kept."""

    def __post_init__(self) -> None:
        makes, labels = bool(self.prompts or self.prompt_file), bool(self.train_data_dir or self.dataset_name)
        if makes == labels:
            raise ValueError(
                "give prompts (or prompt_file) to make pairs, or train_data_dir (or dataset_name) to score pairs; one of the two"
            )
        if not self.scorers:
            raise ValueError("scorers is empty; name at least one, for example --scorers pickscore")
        for name in ("shard_size", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if makes and self.num_images_per_prompt < 2:
            raise ValueError(f"num_images_per_prompt is {self.num_images_per_prompt}; a pair needs at least 2")
        if not self.min_margin >= 0:
            raise ValueError(f"min_margin is {self.min_margin}; it must be at least 0")


def label(config: LabelConfig, scorers: Mapping[str, Score]) -> int:
    """Do what the settings say with the scorers by name. Raises ValueError for settings, models and data that cannot work."""
    state = PartialState(cpu=not torch.cuda.is_available())
    folder = Path(config.output_dir)
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    hidden = {"output_dir", "batch_size", "cache_dir"}
    claim_folder(folder, SETTINGS_FILE, {name: v for name, v in settings.items() if name not in hidden}, state.is_main_process)
    state.wait_for_everyone()
    work = _make if config.prompts or config.prompt_file else _relabel
    report = work(config, scorers, folder, state)
    if report is not None:
        print(json.dumps({name: value for name, value in report.items() if value is not None}))
        print(f"pairs: {folder}", file=sys.stderr)
    return 0


def _make(config: LabelConfig, scorers: Mapping[str, Score], folder: Path, state: PartialState) -> dict[str, Any] | None:
    shared = {f.name for f in dataclasses.fields(SampleConfig)} & {f.name for f in dataclasses.fields(LabelConfig)}
    sampling = SampleConfig(**{name: getattr(config, name) for name in shared})
    prompts = read_prompts(sampling)
    if config.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("precision is fp16, which needs a GPU; on a CPU use fp32 or bf16")
    pipeline = load(sampling).to(state.device, DTYPES[config.precision])

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> Images:
        return generate(
            pipeline,
            texts,
            seeds,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
        )

    size, count = config.shard_size, -(-len(prompts) // config.shard_size)
    place = {"rank": state.process_index, "world": state.num_processes}
    score_shards(folder, prompts, config.num_images_per_prompt, size, config.seed, draw, scorers, config.image_format, **place)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    model = Path(config.pretrained_model_name_or_path).name if config.pretrained_model_name_or_path else "testbed"
    return pair_up(folder, count, list(scorers), config.rule or "mean_z", config.pairs, config.min_margin, config.seed, model)


def _relabel(config: LabelConfig, scorers: Mapping[str, Score], folder: Path, state: PartialState) -> dict[str, Any] | None:
    source = config.train_data_dir or str(config.dataset_name)
    pairs = load_pairs(
        source, config.split, data_format=config.data_format, tie_policy="keep", check_images=False, cache_dir=config.cache_dir
    )
    count = -(-len(pairs) // config.shard_size)
    score_pairs(folder, pairs, config.shard_size, config.batch_size, scorers, state.process_index, state.num_processes)
    state.wait_for_everyone()
    return write_labels(folder, pairs, count, list(scorers), config.rule, config.min_margin) if state.is_main_process else None
