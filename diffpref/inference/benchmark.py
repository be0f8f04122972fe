"""`diffpref benchmark`: pictures in the layout of a public benchmark's own scorer, and its results read back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from diffpref.data.prompts import own_prompts
from diffpref.evaluation.benchmarks import BENCHMARKS
from diffpref.evaluation.generate import Drawing
from diffpref.evaluation.work import claim_folder
from diffpref.inference.checkpoints import Candidate, parse_candidates
from diffpref.inference.evaluate import BASE, load_candidate
from diffpref.inference.pictures import draw_missing, picture_path
from diffpref.inference.processes import sharing_processes

SETTINGS_FILE = "benchmark_settings.json"
Name = Literal["geneval", "dpg", "t2i_compbench", "hpdv2"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Settings of `diffpref benchmark draw`."""

    benchmark: Name = "geneval"
    """Whose layout: geneval, dpg, t2i_compbench or hpdv2."""
    prompts: str | None = None
    """The benchmark's own prompts: evaluation_metadata.jsonl, the folder of DPG's .txt files, a category's .txt, a folder of styles."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, hub id or single file."""
    revision: str | None = None
    """Git revision of a hub model."""
    variant: str | None = None
    """Weight variant of the base's files, such as fp16."""
    aligned: tuple[str, ...] = ()
    """Aligned models, as path or name=path; the base itself is drawn too."""
    lora_scales: tuple[float, ...] = (1.0,)
    """Strengths of the LoRAs."""
    users: tuple[str, ...] = ()
    """Users that personalised models draw for."""
    num_images_per_prompt: int | None = None
    """Pictures per prompt; the benchmark's own number when not given."""
    seed: int = 0
    """First seed."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance."""
    sampler: Literal["checkpoint", "ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc"] = "checkpoint"
    """Scheduler of all models; the base checkpoint's own by default."""
    batch_size: int = 8
    """Pictures per forward pass."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Dtype of the networks."""
    attention: str = "sdpa"
    """Attention kernel of the UNet, tried before it is used: sdpa is torch's own choice; the others are in docs/speed.md."""
    output_dir: str = "outputs/benchmark"
    """Folder of the pictures; <output_dir>/<benchmark>/<model> is what the official scorer is given."""

    def __post_init__(self) -> None:
        for name in ("prompts", "pretrained_model_name_or_path"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given; name the {'prompts of the benchmark' if name == 'prompts' else 'base model'}")


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Settings of `diffpref benchmark read`."""

    benchmark: Name = "geneval"
    """Whose results."""
    results: str | None = None
    """The file that the official scorer wrote."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results is not given; name the file that the official scorer wrote")


def draw(config: BenchmarkConfig) -> int:
    """Draw the base and every aligned model, and lay their pictures out. Raises ValueError as `evaluate` does."""
    benchmark = BENCHMARKS[config.benchmark]
    entries = benchmark.read(Path(str(config.prompts)))
    count = config.num_images_per_prompt or benchmark.pictures_per_prompt
    prompts = own_prompts([entry.prompt for entry in entries])
    drawing = Drawing(prompts.texts, count, config.seed, config.num_inference_steps, config.guidance_scale, config.batch_size)
    state = sharing_processes()
    folder = Path(config.output_dir)
    free = ("output_dir", "batch_size", "attention")
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(config).items() if name not in free}
    claim_folder(folder, SETTINGS_FILE, settings | {"prompts_hash": prompts.hash}, state.is_main_process)
    state.wait_for_everyone()
    candidates = [Candidate(BASE, None), *parse_candidates(config.aligned, config.lora_scales, config.users)]
    for candidate in candidates:
        load = partial(load_candidate, config, str(config.pretrained_model_name_or_path), candidate, state.device)
        drawn = draw_missing(folder, candidate.name, drawing, load, state.process_index, state.num_processes)
        print(f"{candidate.name}: {drawn} pictures drawn", file=sys.stderr, flush=True)
    state.wait_for_everyone()
    if state.is_main_process:
        for candidate in candidates:
            target = folder / config.benchmark / candidate.name
            benchmark.lay_out(entries, partial(picture_path, folder, candidate.name), count, target)
            print(target)
    return 0


def read(config: ResultsConfig) -> int:
    """Print the figures of a result file."""
    for name, value in BENCHMARKS[config.benchmark].results(Path(str(config.results))).items():
        print(f"{name:<24}{value:.4f}")
    return 0
