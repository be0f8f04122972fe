"""What a run takes: the model counted, and the cost of its steps under the given settings and under others that might be advised."""

from __future__ import annotations

from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from diffpref.models.backbone import Backbone, vae_factor
from diffpref.models.execution import Recompute
from diffpref.models.lora import ATTENTION
from diffpref.models.packed import packable_bytes
from diffpref.training.config import TrainConfig
from diffpref.training.memory import Counts, factored_numbers, latent_cache_bytes, memory_parts, number_bytes, optimizer_bytes
from diffpref.training.models import has_errors
from diffpref.training.objective import Objective
from diffpref.training.sources import pictures_at_once
from diffpref.training.step_cost import StepCost, step_cost, upper_bound, vae_bytes

HEAP_ALLOWANCE = 1.4
"""On a CPU activations count this often: the heap of the C library does not give back all that is freed (docs/preflight.md)."""
PLENTY = 4
"""On a CPU nothing is counted when a loose upper bound fits this often: counting takes half a second or more."""


class Pictures(Protocol):
    """What is known of the pictures of a run; PairPixels is one, for stored pairs."""

    @property
    def resolution(self) -> int:
        """Side in pixels."""

    @property
    def num_pictures(self) -> int:
        """Pictures that are decoded for a group."""

    @property
    def slots(self) -> tuple[int, ...]:
        """The picture of each image of a group."""

    def __len__(self) -> int:
        """Stored groups."""


class RunCosts:
    """Memory and FLOPs of a run on a device that has `budget` bytes to give."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        backbone: Backbone,
        module: nn.Module,
        pixels: Pictures,
        accelerator: Accelerator,
        budget: int,
    ) -> None:
        self.config = config
        self.objective = objective
        self.backbone = backbone
        self.module = module
        self.resolution = resolution = pixels.resolution
        self.pictures, self.slots = pixels.num_pictures, len(pixels.slots)
        self.autocast = accelerator.mixed_precision != "no"
        self.on_gpu = accelerator.device.type == "cuda"
        self.budget = budget
        self.cache = self._cache(len(pixels)) if config.cache_latents and not config.latent_cache else 0
        self.counts = self._counts(accelerator.num_processes)
        self._steps: dict[tuple[int, Recompute, bool], StepCost] = {}
        images = 2 * objective.steps_at_once * self.images_per_group * config.train_batch_size  # twice, for guidance
        self._bound: int | None = upper_bound(backbone, module, images, resolution)
        if self.on_gpu or PLENTY * sum(self.parts().values()) > budget:
            self._bound = None

    @property
    def images_per_group(self) -> int:
        """Pictures of a group that the method looks at."""
        return min(self.objective.images_per_group or self.slots, self.slots)

    @property
    def needs_reference(self) -> bool:
        """Whether the run asks a reference: its errors may lie in a file."""
        return self.objective.needs_reference and not has_errors(self.config)

    @property
    def is_bound(self) -> bool:
        """Whether activations are an upper bound and FLOPs are not known."""
        return self._bound is not None

    def parts(self, config: TrainConfig | None = None, counts: Counts | None = None) -> dict[str, int]:
        """Part -> bytes, under the run's settings if none are given."""
        config = config or self.config
        activations = self.activations(config)
        return memory_parts(config, self.needs_reference, counts or self.counts, activations, self._trajectory(config))

    def activations(self, config: TrainConfig) -> int:
        """Bytes at the peak of a micro-batch, of the autoencoder's work on it or of validation pictures: never there at once."""
        if self._bound is not None:
            return self._bound
        vae = self.backbone.pipeline.vae
        peaks = [self.step(config).activations]
        if not config.latent_cache:
            peaks.append(vae_bytes(vae, pictures_at_once(config, self.pictures), self.resolution))
        if self.objective.source:
            peaks.append(vae_bytes(vae, self.objective.source.rollout_batch_size, self.resolution, decode=True))
        if config.validation_steps:
            drawn = min(config.num_validation_images, 4)
            peaks.append(vae_bytes(vae, drawn, self.backbone.default_resolution, decode=True))
        return int(max(peaks) * (1 if self.on_gpu else HEAP_ALLOWANCE))

    def step(self, config: TrainConfig) -> StepCost:
        """One micro-batch of the policy at the steps that it takes together; with guidance each picture is there twice."""
        key = (config.train_batch_size, config.gradient_checkpointing, config.gradient_accumulation_steps > 1)
        if key not in self._steps:
            groups = (self.objective.groups_at_once(config.train_batch_size), self.images_per_group)
            how: dict[str, Any] = {"autocast": self.autocast, "recompute": key[1], "on_gpu": self.on_gpu, "accumulates": key[2]}
            self._steps[key] = step_cost(self.backbone, self.module, groups, self.resolution, **how)
        return self._steps[key]

    @property
    def flops_per_pair(self) -> float:
        """Of policy and reference at one step on the path, with what checkpointing computes again."""
        step = self.step(self.config)
        flops = step.flops + (step.forward_flops if self.needs_reference else 0)
        return flops / (self.config.train_batch_size * self.objective.steps_at_once)

    @property
    def kernels(self) -> int:
        """Launched by a micro-batch at one step on the path, by policy and reference, uncompiled."""
        step = self.step(self.config)
        return step.kernels + (step.forward_kernels if self.needs_reference else 0)

    @property
    def host_bytes(self) -> int:
        """RAM that a run on a GPU needs: cached latents, and the larger file of a checkpoint while it is written."""
        return self.cache + max(number_bytes(self.config) * self.counts.trained, optimizer_bytes(self.config.optimizer, self.counts))

    @property
    def _latent_numbers(self) -> int:
        side = self.resolution // vae_factor(self.backbone.pipeline)
        return int(self.backbone.pipeline.vae.config.latent_channels * side * side)

    def _cache(self, num_pairs: int) -> int:
        return latent_cache_bytes(num_pairs * self.pictures, not self.config.no_hflip, self._latent_numbers)

    def _trajectory(self, config: TrainConfig) -> int:
        return 4 * self.objective.kept_latents * config.train_batch_size * self.images_per_group * self._latent_numbers

    def _counts(self, num_processes: int) -> Counts:
        networks = [part for part in self.backbone.pipeline.components.values() if isinstance(part, nn.Module)]
        is_meta = next(self.backbone.denoiser.parameters()).is_meta  # then nothing is loaded, else parts without weights were left out
        weights = [p for part in networks for p in part.parameters() if p.is_meta == is_meta]
        unet = [p for name, p in self.backbone.denoiser.named_parameters() if "lora_" not in name]
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return Counts(
            weights=sum(p.numel() * p.element_size() for p in weights),
            unet=sum(p.numel() * p.element_size() for p in unet),
            trained=sum(p.numel() for p in trained),
            factored=factored_numbers(p.shape for p in trained),
            adapter=adapter_numbers(self.backbone.denoiser, self.config.rank),
            cache=0 if self.on_gpu else self.cache,
            packed=packable_bytes(self.backbone.denoiser),
            num_processes=num_processes,
        )


def adapter_numbers(unet: nn.Module, rank: int) -> int:
    """Numbers of an adapter of this rank on the attention layers."""
    layers = [m for name, m in unet.named_modules() if isinstance(m, nn.Linear) and name.removesuffix(".base_layer").endswith(ATTENTION)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)
