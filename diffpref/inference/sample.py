"""`diffpref generate`: prompts and seeds to pictures, with one or several processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffpref.evaluation.generate import as_rows, contact_sheet, generate
from diffpref.inference.processes import sharing_processes
from diffpref.inference.user_pipelines import as_user_pipeline
from diffpref.locations import asset
from diffpref.models.attention import check_attention, use_attention
from diffpref.models.backbone import vae_factor
from diffpref.models.lora_file import merge_lora
from diffpref.models.pipeline import load_pipeline, needs_picture

SAMPLERS: Mapping[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Names for diffusers' schedulers, built from the checkpoint's own noise schedule."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of `diffpref generate`."""

    pretrained_model_name_or_path: str | None = None
    """Folder, hub id or single .safetensors file of a model, base or aligned; the embedded testbed model when not given."""
    revision: str | None = None
    """Git revision of a hub model."""
    variant: str | None = None
    """Weight variant of the model files, such as fp16."""
    single_file_config: str | None = None
    """Folder or hub id with the configs and tokenizers of a single-file checkpoint; the family's public one when not given."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another autoencoder: a folder, hub id or .safetensors file."""
    unet_init: str | None = None
    """Other UNet weights: a UNet or pipeline folder, .safetensors, or a state dict such as unet.pth."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; the checkpoint's scheduler decides when not given."""
    rescale_betas_zero_snr: bool | None = None
    """Whether the noise schedule ends in pure noise; the checkpoint's scheduler decides when not given."""
    lora: str | None = None
    """LoRA in diffusers' or kohya's form: a .safetensors file, or a folder such as the output_dir of a LoRA run."""
    lora_scale: float = 1.0
    """Strength of the adapter; 0 is the base model."""
    user_weights: str | None = None
    """Folder of a PPD or MCDPO run; its LoRA, if it trained one, is given by lora."""
    user: tuple[str, ...] = ()
    """Users to draw for: a name of the training, or several with weights (anna=0.3 ben=0.7)."""
    user_examples: str | None = None
    """Decided pairs of a new user, a folder or file as in docs/data.md, in place of user."""
    user_scale: float = 1.0
    """Strength of the user; 0 draws for nobody."""
    user_mixing: Literal["embeddings", "branches"] = "embeddings"
    """What weights mix: the users' tokens, or the outputs of their branches."""
    prompts: tuple[str, ...] = ()
    """Prompts; quote each."""
    prompt_file: str | None = None
    """Text file with one prompt per line, in place of prompts."""
    num_images_per_prompt: int = 1
    """Pictures per prompt, with seeds seed, seed + 1, ..."""
    seed: int = 0
    """First seed; a picture depends on its prompt, its seed and the settings, not on its neighbours."""
    sampler: Literal["checkpoint", "ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc"] = "checkpoint"
    """Scheduler; the checkpoint's own by default."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 switches it off."""
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
    output_dir: str = "outputs/pictures"
    """Folder of the pictures, grid.png and pictures.jsonl."""
    grid_columns: int | None = None
    """Pictures per row of the grid; the pictures of one prompt, or a square."""

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.prompt_file):
            raise ValueError('give prompts (--prompts "a red ring" ...) or prompt_file, one of the two')
        for name in ("num_images_per_prompt", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height is {self.height} and width {self.width}; give both or neither")
        if (self.user or self.user_examples) and not self.user_weights:
            raise ValueError("user or user_examples is given without user_weights; give the output_dir of a PPD run")
        if self.user_weights and bool(self.user) == bool(self.user_examples):
            raise ValueError("user_weights is given; name user or user_examples, one of the two")


def sample(config: SampleConfig) -> int:
    """Generate and write; each process draws its share, the main process writes the grid."""
    prompts = read_prompts(config)
    state = sharing_processes()
    if config.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("precision is fp16, which needs a GPU; on a CPU use fp32 or bf16")
    size = None if config.height is None else (config.height, int(config.width or 0))
    pipeline = ready(load(config), config, state.device, size)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(p, config.seed + k) for p in prompts for k in range(config.num_images_per_prompt)]
    mine = list(range(len(jobs)))[state.process_index :: state.num_processes]
    for start in range(0, len(mine), config.batch_size):
        rows = mine[start : start + config.batch_size]
        images = generate(
            pipeline,
            [jobs[i][0] for i in rows],
            [jobs[i][1] for i in rows],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
            size=size,
        )
        for i, image in zip(rows, images, strict=True):
            Image.fromarray(image).save(folder / f"{i:05d}.png")
        print(f"{start + len(rows)}/{len(mine)} pictures", end="\r", file=sys.stderr)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(config, jobs, folder)
    return 0


class Sampling(Protocol):
    """Settings with which a model is loaded for sampling."""

    @property
    def revision(self) -> str | None: ...
    @property
    def variant(self) -> str | None: ...
    @property
    def sampler(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def batch_size(self) -> int: ...


def ready(pipeline: DiffusionPipeline, config: Sampling, device: torch.device, size: tuple[int, int] | None = None) -> DiffusionPipeline:
    """The pipeline on its device, in the precision and with the attention of the settings. Raises ValueError for an unknown kernel.

    size: height and width of the pictures; the model's own when not given.
    """
    dtype = DTYPES[config.precision]
    check_attention(config.attention, is_training=False)
    pipeline = pipeline.to(device, dtype)
    own, factor = pipeline.unet.config.sample_size, vae_factor(pipeline)
    latents = (own, own) if size is None else (size[0] // factor, size[1] // factor)
    note = use_attention(pipeline.unet, config.attention, [latents], 2 * config.batch_size, dtype, is_training=False)
    if note is not None:
        print(note, file=sys.stderr)
    return pipeline


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the flags or of the file. Raises ValueError for a missing or empty file."""
    if config.prompts:
        return list(config.prompts)
    try:
        lines = Path(str(config.prompt_file)).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"prompt_file {config.prompt_file!r} cannot be read: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompt_file {config.prompt_file!r} has no prompt; write one per line")
    return prompts


def load(config: SampleConfig) -> DiffusionPipeline:
    """The pipeline with adapter and sampler. Raises ValueError for what cannot be loaded."""
    source = config.pretrained_model_name_or_path or str(asset("testbed", "pipeline"))
    pipeline = load_pipeline(
        source,
        config.revision,
        config.variant,
        single_file_config=config.single_file_config,
        vae=config.pretrained_vae_model_name_or_path,
        unet_init=config.unet_init,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )
    if needs_picture(pipeline):
        raise ValueError(
            f"pretrained_model_name_or_path {source!r} is a {type(pipeline).__name__}, which improves pictures; give a model that "
            "draws from prompts"
        )
    if config.lora:
        merge_lora(pipeline, config.lora, "lora", config.lora_scale)
    elif config.lora_scale != 1.0:
        raise ValueError(f"lora_scale is {config.lora_scale} but no lora is given; add --lora FILE_OR_FOLDER")
    if config.user_weights:
        pipeline = for_user(pipeline, config)
    if config.sampler != "checkpoint":
        name, options = SAMPLERS[config.sampler]
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    return pipeline


def for_user(pipeline: DiffusionPipeline, config: SampleConfig) -> DiffusionPipeline:
    """The pipeline, drawing for the user of the settings. Raises ValueError for unknown users and weights that do not fit."""
    made = as_user_pipeline(pipeline, str(config.user_weights))
    how: Any = {"user_scale": config.user_scale, "user_mixing": config.user_mixing}
    made.set_user(user_weights_of(config.user) if config.user else None, user_examples=config.user_examples, **how)
    return made


def user_weights_of(words: Sequence[str]) -> dict[str, float]:
    """Weights by name from `anna` or `anna=0.3`. Raises ValueError for a weight that is no number."""
    found = {}
    for word in words:
        name, separator, number = word.partition("=")
        try:
            found[name] = float(number) if separator else 1.0
        except ValueError:
            raise ValueError(f"user is {word!r}; write a name, or name=weight with a number") from None
    return found


def finish(config: SampleConfig, jobs: list[tuple[str, int]], folder: Path) -> None:
    """Write grid.png and pictures.jsonl."""
    images = np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")) for i in range(len(jobs))])
    columns = config.grid_columns or (config.num_images_per_prompt if config.num_images_per_prompt > 1 else None)
    contact_sheet(as_rows(images, columns), enlarge=max(1, 128 // images.shape[2])).save(folder / "grid.png")
    rows = [json.dumps({"file": f"{i:05d}.png", "prompt": p, "seed": s}) for i, (p, s) in enumerate(jobs)]
    (folder / "pictures.jsonl").write_text("\n".join(rows) + "\n")
    print(f"{len(jobs)} pictures, {folder / 'grid.png'}")
