"""`diffpref evaluate`: a base model and any number of aligned ones, judged by scorers, with intervals, a table and a page.

An interrupted evaluation goes on where it was; processes share the prompts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffpref.data.prompts import PromptSet, load_prompt_set, own_prompts
from diffpref.evaluation.generate import Drawing
from diffpref.evaluation.model_page import write_page
from diffpref.evaluation.model_report import BASE, REJECTED_FILE, ModelReport, rejected_rows, report_of, write_data
from diffpref.evaluation.scoring import Score, split_spec, try_scorers
from diffpref.evaluation.work import claim_folder, write_text
from diffpref.inference.checkpoints import Candidate, open_candidate, parse_candidates
from diffpref.inference.pictures import draw_missing, picture_path, read_measured, score_missing
from diffpref.inference.processes import sharing_processes
from diffpref.inference.sample import SAMPLERS, Sampling, ready

SETTINGS_FILE = "evaluation_settings.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `diffpref evaluate`."""

    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, hub id or single file; the embedded testbed model when not given."""
    revision: str | None = None
    """Git revision of a hub model."""
    variant: str | None = None
    """Weight variant of the base's files, such as fp16."""
    aligned: tuple[str, ...] = ()
    """Aligned models, as path or name=path: a pipeline, a UNet (folder or unet.pth), a LoRA, or the output_dir of a personalised run."""
    lora_scales: tuple[float, ...] = (1.0,)
    """Strengths of the LoRAs; several give a curve of score against strength, also beyond 1."""
    users: tuple[str, ...] = ()
    """Users that personalised models draw for, each a model of its own in the report."""

    prompts: tuple[str, ...] = ()
    """Prompts; quote each."""
    prompt_set: str | None = None
    """Named set (docs/evaluation.md) or file: .txt, .json, .jsonl, .csv, .tsv, .parquet; "diffpref", or the testbed's test prompts."""
    max_prompts: int | None = None
    """Use only the first prompts of the set."""
    num_images_per_prompt: int = 1
    """Pictures per prompt and model."""
    seed: int = 0
    """First seed."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; papers use 7.5 for SD 1.5 and 5 for SDXL."""
    sampler: Literal["checkpoint", "ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc"] = "checkpoint"
    """Scheduler of all models; the base checkpoint's own by default."""
    height: int | None = None
    """Pixels; the model's own when not given."""
    width: int | None = None
    """Pixels; the model's own when not given."""
    batch_size: int = 8
    """Pictures per forward pass."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Dtype of the networks."""
    attention: str = "sdpa"
    """Attention kernel of the UNet, tried before it is used: sdpa is torch's own choice; the others are in docs/speed.md."""

    scorers: tuple[str, ...] = ()
    """Scorers, as name, name=weights or label:name=weights (docs/scorers.md); "implicit=RUN" is what a run learned itself."""
    trained_on: str | None = None
    """Name of the scorer that the aligned models were trained with, if any; the report sets it apart from the others."""
    output_dir: str = "outputs/evaluation"
    """Folder of pictures, scores.parquet, report.json, report.md and report.html."""
    report_pictures: int = 200
    """Prompts whose pictures the page shows."""

    def __post_init__(self) -> None:
        if not self.aligned:
            raise ValueError("aligned is empty; name at least one model, for example --aligned outputs/my-run")
        if not self.scorers:
            raise ValueError("scorers is empty; name at least one, for example --scorers pickscore")
        for name in ("num_images_per_prompt", "num_inference_steps", "batch_size", "report_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height is {self.height} and width {self.width}; give both or neither")
        names = [split_spec(spec)[0] for spec in self.scorers]
        if self.trained_on and self.trained_on not in names:
            raise ValueError(f"trained_on is {self.trained_on!r}, which is not among the scorers {', '.join(names)}")


def evaluate(config: EvaluateConfig, scorers: Mapping[str, Score], base: str, prompts: PromptSet | None = None) -> ModelReport | None:
    """Draw, score, compare and write; returns the report on the main process.

    scorers: the callables by name; those with name, version, convention and checksum have them recorded. base: the model behind
    pretrained_model_name_or_path. prompts: in place of those of the settings. Raises ValueError for settings, models and scorers
    that cannot work, before the first picture where that can be known.
    """
    state = sharing_processes()
    if config.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("precision is fp16, which needs a GPU; on a CPU use fp32 or bf16")
    prompts = prompts or chosen_prompts(config)
    try_scorers(scorers, prompts.texts)
    candidates = [Candidate(BASE, None), *parse_candidates(config.aligned, config.lora_scales, config.users)]
    folder = Path(config.output_dir)
    claim_folder(folder, SETTINGS_FILE, settings_of(config, prompts), state.is_main_process)
    state.wait_for_everyone()
    drawing = drawing_of(config, prompts)
    place = {"rank": state.process_index, "world": state.num_processes}
    for candidate in candidates:
        load = partial(load_candidate, config, base, candidate, state.device)
        drawn = draw_missing(folder, candidate.name, drawing, load, **place)
        state.wait_for_everyone()  # a chunk of scores has pictures of several processes
        scored = score_missing(folder, candidate.name, drawing, scorers, **place)
        print(f"{candidate.name}: {drawn} pictures drawn, {scored} parts scored", file=sys.stderr, flush=True)
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    measured = {c.name: read_measured(folder, c.name, drawing) for c in candidates}
    write_text(folder / REJECTED_FILE, "".join(json.dumps(row) + "\n" for row in rejected_rows(prompts, measured)))
    report = report_of(
        settings_of(config, prompts),
        prompts,
        drawing,
        {c.name: c.facts() | ({"source": base_name(config, base)} if c.name == BASE else {}) for c in candidates},
        scorers,
        measured,
        config.trained_on,
        {c.name: c.run_metrics() for c in candidates},
    )
    write_data(report, folder)
    write_page(report, folder, partial(_picture, folder), config.report_pictures)
    return report


def base_name(config: EvaluateConfig, base: str) -> str:
    """What a report calls the base: a hub id, a folder's name, or the testbed's model."""
    if config.pretrained_model_name_or_path is None:
        return "the testbed's model"
    return Path(base).name if Path(base).exists() else base


def chosen_prompts(config: EvaluateConfig) -> PromptSet:
    """The prompts that the settings name. Raises ValueError for a set that cannot be read."""
    return own_prompts(config.prompts) if config.prompts else load_prompt_set(config.prompt_set or "diffpref", config.max_prompts)


def _picture(folder: Path, model: str, prompt: int) -> np.ndarray:
    """The first picture of a prompt."""
    return np.asarray(Image.open(picture_path(folder, model, prompt, 0)).convert("RGB"))


def settings_of(config: EvaluateConfig, prompts: PromptSet) -> dict[str, Any]:
    """What an evaluation must agree with to be continued."""
    free = {"output_dir", "batch_size", "report_pictures", "attention"}
    found = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items() if name not in free}
    return found | {"prompt_set_hash": prompts.hash, "num_prompts": len(prompts.texts)}


def drawing_of(config: EvaluateConfig, prompts: PromptSet) -> Drawing:
    """The settings of the pictures."""
    return Drawing(
        prompts.texts,
        config.num_images_per_prompt,
        config.seed,
        config.num_inference_steps,
        config.guidance_scale,
        config.batch_size,
        None if config.height is None else (config.height, int(config.width or 0)),
    )


def load_candidate(config: Sampling, base: str, candidate: Candidate, device: torch.device) -> DiffusionPipeline:
    """The candidate on the base, with the evaluation's sampler."""
    pipeline = open_candidate(base, config.revision, config.variant, candidate)
    if config.sampler != "checkpoint":
        name, options = SAMPLERS[config.sampler]
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    return ready(pipeline, config, device)
