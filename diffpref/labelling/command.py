"""`diffpref label`: make pairs from a model's pictures, or score and label existing ones. Interrupted work goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from diffpref.data.label_report import REPORT_FILE
from diffpref.data.pairs import load_pairs
from diffpref.data.prompts import PromptSet, load_prompt_set, own_prompts
from diffpref.evaluation.generate import Images, generate
from diffpref.evaluation.model_report import scorer_facts
from diffpref.evaluation.scoring import Score, split_spec, try_scorers
from diffpref.evaluation.work import claim_folder, write_text
from diffpref.inference.processes import sharing_processes
from diffpref.inference.sample import DTYPES, SampleConfig, load
from diffpref.labelling.pairs import REJECTED_FILE, pair_up, score_shards
from diffpref.labelling.relabel import score_pairs, write_labels

SETTINGS_FILE = "label_settings.json"


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Settings of `diffpref label`. Give prompts to make pairs, or data to score existing ones."""

    scorers: tuple[str, ...] = ()
    """Scorers, as name, name=weights or label:name=weights (docs/scorers.md); "implicit=RUN" is what a run learned itself."""
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
    """Prompts of new pairs in place of prompts: a file (.txt with a prompt per line, .json, .csv, ...) or a named set."""
    num_images_per_prompt: int = 4
    """Pictures that are drawn and scored per prompt."""
    pairs: Literal["best_worst", "all", "ranked"] = "best_worst"
    """What a prompt's pictures give: one pair, every decided pair, or one row with all of them and their ranks."""
    image_format: Literal["png", "jpeg"] = "png"
    """How pictures are stored; they are scored as they are stored."""
    pretrained_model_name_or_path: str | None = None
    """Model that draws the pictures, and the base of an implicit scorer; the embedded testbed model when not given."""
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
        implicit = any(split_spec(spec)[1].partition("=")[0] == "implicit" for spec in self.scorers)
        if labels and self.pretrained_model_name_or_path and not implicit:
            raise ValueError("pretrained_model_name_or_path is given, but nothing is drawn and no scorer is implicit; leave it out")
        if not self.scorers:
            raise ValueError("scorers is empty; name at least one, for example --scorers pickscore")
        _check_used(self, makes)
        for name in ("shard_size", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if makes and self.num_images_per_prompt < 2:
            raise ValueError(f"num_images_per_prompt is {self.num_images_per_prompt}; a pair needs at least 2")
        if not self.min_margin >= 0:
            raise ValueError(f"min_margin is {self.min_margin}; it must be at least 0")


_MAKING = ("num_images_per_prompt", "pairs", "image_format", "lora", "sampler", "num_inference_steps", "guidance_scale", "precision")
_LABELLING = ("split", "data_format", "cache_dir")


def _check_used(config: LabelConfig, makes: bool) -> None:
    """Raises ValueError for a setting that the chosen work would ignore."""
    for name in _LABELLING if makes else _MAKING:
        value = getattr(config, name)
        if value != LabelConfig.__dataclass_fields__[name].default:
            work = "making pairs from prompts" if makes else "scoring existing pairs"
            raise ValueError(f"{name} is {value}, which has no meaning for {work}; leave it out")


def label(config: LabelConfig, scorers: Mapping[str, Score]) -> int:
    """Do what the settings say with the scorers by name. Raises ValueError for settings, models and data that cannot work."""
    state = sharing_processes()
    folder = Path(config.output_dir)
    work = _make if config.prompts or config.prompt_file else _relabel
    report = work(config, scorers, folder, state)
    if report is not None:
        stored = {name: value for name, value in report.items() if value is not None}
        facts = {name: scorer_facts(scorer) for name, scorer in scorers.items()}
        write_text(folder / REPORT_FILE, json.dumps(stored | {"scorers": facts}, indent=1))
        print(json.dumps(stored))
        if accuracy := stored.get("accuracy"):
            print(accuracy_table(accuracy), file=sys.stderr)
        if stored["rejected"]:
            print(f"{stored['rejected']} rows were set aside; the reasons are in {folder / REJECTED_FILE}", file=sys.stderr)
        print(f"pairs: {folder}", file=sys.stderr)
    return 0


def _claim(config: LabelConfig, content: str, folder: Path, state: PartialState) -> None:
    """Begin or continue the folder; content: what tells the prompts or pairs from others under the same name."""
    free = {"output_dir", "batch_size", "cache_dir"}
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items() if name not in free}
    claim_folder(folder, SETTINGS_FILE, settings | {"content": content}, state.is_main_process)
    state.wait_for_everyone()


def accuracy_table(accuracy: Mapping[str, Mapping[str, Any]]) -> str:
    """How often every scorer orders a pair as its label does, as a table for people."""
    lines = ["| scorer | agrees with the label (95 %) | pairs |", "|---|---|---|"]
    for name, found in accuracy.items():
        low, high = found["interval_95"]
        lines.append(f"| {name} | {100 * found['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) | {found['pairs']} |")
    return "\n".join(lines)


def _make(config: LabelConfig, scorers: Mapping[str, Score], folder: Path, state: PartialState) -> dict[str, Any] | None:
    prompts = config_prompts(config)
    try_scorers(scorers, prompts.texts)
    _claim(config, prompts.hash, folder, state)
    shared = {f.name for f in dataclasses.fields(SampleConfig)} & {f.name for f in dataclasses.fields(LabelConfig)}
    sampling = SampleConfig(**{name: getattr(config, name) for name in shared} | {"prompts": tuple(prompts.texts), "prompt_file": None})
    if config.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("precision is fp16, which needs a GPU; on a CPU use fp32 or bf16")
    pipeline = cache(lambda: load(sampling).to(state.device, DTYPES[config.precision]))  # not needed when everything is drawn

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> Images:
        return generate(
            pipeline(),
            texts,
            seeds,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
        )

    size, count = config.shard_size, -(-len(prompts.texts) // config.shard_size)
    place = {"batch_size": config.batch_size, "rank": state.process_index, "world": state.num_processes}
    score_shards(folder, prompts.texts, config.num_images_per_prompt, size, config.seed, draw, scorers, config.image_format, **place)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    model = Path(config.pretrained_model_name_or_path).name if config.pretrained_model_name_or_path else "testbed"
    report = pair_up(folder, count, list(scorers), config.rule or "mean_z", config.pairs, config.min_margin, config.seed, model)
    lines = [json.dumps({"of": prompts.name, "reason": reason}) + "\n" for reason in prompts.rejected]
    write_text(folder / REJECTED_FILE, "".join(lines) + (folder / REJECTED_FILE).read_text())
    return report | {"rejected": report["rejected"] + len(lines)}


def config_prompts(config: LabelConfig) -> PromptSet:
    """The prompts of new pairs. Raises ValueError for what cannot be read."""
    return own_prompts(config.prompts) if config.prompts else load_prompt_set(str(config.prompt_file))


def _relabel(config: LabelConfig, scorers: Mapping[str, Score], folder: Path, state: PartialState) -> dict[str, Any] | None:
    source = config.train_data_dir or str(config.dataset_name)
    pairs = load_pairs(
        source, config.split, data_format=config.data_format, tie_policy="keep", check_images=False, cache_dir=config.cache_dir
    )
    _claim(config, pairs.fingerprint, folder, state)
    count = -(-len(pairs) // config.shard_size)
    score_pairs(folder, pairs, config.shard_size, config.batch_size, scorers, state.process_index, state.num_processes)
    state.wait_for_everyone()
    return write_labels(folder, pairs, count, list(scorers), config.rule, config.min_margin) if state.is_main_process else None
