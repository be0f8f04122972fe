"""The whole DDIM inversion trajectory by the frozen reference: the path of Inversion-DPO (Li et al., 2025, arXiv:2507.11554).

    e*_t  = e_ref(x, t - stride),  y_t = move(x, e*_t, t - stride -> t),  x <- y_t   for t = 0, stride, 2 stride, ...
    step: at y_t a perfect policy predicts e*_t, the noise that maps y_t back to x exactly; weight 1 / (2 alpha_t^2 n)

The released code compares the networks at x instead of y_t. There the target is the reference's own prediction, so the
reference's error is 0 and a policy equal to it has no gradient at all: training can only leave that point by rounding errors.
That form is kept as eval_point "source", with a warning. It also asks the reference at t, where the move ends, with x from where it
begins (network_timestep "destination"): the reference takes part of the picture for noise, and the clean picture that the target
implies is its own prediction with less contrast, which leads away from what is in the chosen picture (docs/methods/inversion_dpo.md).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffpref.core.policy import guided
from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, PathStep, Predict, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class InversionTrajectory:
    """Many steps per batch, the same nodes for every pair unless a subset is drawn."""

    num_steps: int = 80
    """Nodes of the trajectory; cost and memory of the stored latents grow with it."""
    eval_point: Literal["denoise", "source"] = "denoise"
    """Where the networks are compared: at the latent that the denoising step starts from, or as in the released code."""
    guidance_scale: float = 2.0
    """Classifier-free guidance of the inversion and of both networks in the loss; 1 is none, and half the cost."""
    sampled_steps: int | None = None
    """Compare at this many nodes, drawn per pair, with weights that keep the expected sum; all of them when not given."""
    network_timestep: Literal["destination", "source"] | None = None
    """The level that the inverting reference is told: source, where a move starts and x is, as in the paper's figure; or destination, where
    it ends, as in the released code. Source when not given, destination with eval_point source."""
    steps_at_once: int = 1
    """Nodes at which the networks are compared together, in one batch: fewer and larger products, and the activations of them all."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a trajectory needs at least 1 step, usually 40 to 80")
        if self.sampled_steps is not None and not 1 <= self.sampled_steps <= self.num_steps:
            raise ValueError(f"sampled_steps is {self.sampled_steps}; choose 1 to num_steps ({self.num_steps}), or leave it out for all")
        compared = self.sampled_steps or self.num_steps
        if not 1 <= self.steps_at_once <= compared:
            raise ValueError(f"steps_at_once is {self.steps_at_once}; choose 1 to {compared}, the nodes that are compared")
        if self.eval_point == "source" and self.network_timestep == "source":
            raise ValueError("network_timestep is source with eval_point source, which compares where moves end; use eval_point denoise")
        if self.eval_point == "source":
            warnings.warn(
                "eval_point is source, the released form of Inversion-DPO: where policy and reference are equal its gradient is exactly "
                "zero, so that training cannot start from the base model. Use eval_point denoise, or start from fine-tuned weights",
                stacklevel=2,
            )

    @property
    def equal_forwards(self) -> bool:
        """Whether every process asks the network equally often: not where each batch ends at the last of its own drawn nodes."""
        return self.sampled_steps is None

    @property
    def is_told_the_end(self) -> bool:
        """Whether the reference is asked at the level where a move ends."""
        return (self.network_timestep or ("destination" if self.eval_point == "source" else "source")) == "destination"

    @property
    def kept_latents(self) -> int:
        """Float32 latents per picture that are there when the loss is computed: position and target of every node; prediction of policy
        and reference and the loss's gradient of every compared one."""
        return 2 * self.num_steps + 3 * (self.sampled_steps or self.num_steps)

    @torch.no_grad()
    def __call__(
        self,
        batch: PreferenceBatch,
        process: DdpmProcess,
        draws: PairRandom,
        policy: Predict | None = None,
        reference: Predict | None = None,
        null: Conditioning | None = None,
    ) -> tuple[PathStep, ...]:
        """Invert the latents (G, K, C, h, w) along the grid; one PathStep per compared node.

        Raises ValueError without a reference, and for guidance without null conditioning.
        """
        if reference is None:
            raise ValueError("path trajectory inverts with the reference, but the run has none; use a method with a reference")
        predict = guided(reference, null, self.guidance_scale)
        stride = process.num_timesteps // self.num_steps
        if stride < 1:
            raise ValueError(f"num_steps is {self.num_steps}, but the schedule has {process.num_timesteps} timesteps; use at most as many")
        process.check_passage("trajectory", stride * (self.num_steps - 1))
        chosen, last = None, self.num_steps - 1
        if self.sampled_steps is not None:
            chosen = draws.subset("trajectory_nodes", self.num_steps, self.sampled_steps)
            last = int(chosen.max())
        x = batch.latents.to(torch.promote_types(batch.latents.dtype, torch.float32))
        steps = []
        for node in range(last + 1):
            t = torch.full(batch.group_shape, node * stride, device=x.device)
            start = (t - stride).clamp(min=0)
            told = t if self.is_told_the_end else start
            prediction = predict(x, told, batch.cond).to(x.dtype)
            noise = process.epsilon(x, prediction, told)
            y = process.ddim_move(x, noise, start, t)
            steps.append(self._step(process, x, y, t, prediction, noise))
            x = y
        return tuple(steps) if chosen is None else self._sampled(steps, chosen)

    def _step(self, process: DdpmProcess, x: Tensor, y: Tensor, t: Tensor, prediction: Tensor, noise: Tensor) -> PathStep:
        """The comparison at one node t (G, K)."""
        weight = process.noise_slope(t).square() / (2 * process.alpha(t).square() * self.num_steps)
        step = PathStep(y, t, y, weight.to(x.dtype), process.log_snr(t).float(), self.guidance_scale)
        if self.eval_point == "source":
            return replace(step, x_t=x, target=prediction, reference=prediction)
        return replace(step, target=process.implied(y, noise, t))

    def _sampled(self, steps: list[PathStep], chosen: Tensor) -> tuple[PathStep, ...]:
        """Each pair's own nodes, chosen (G, S), as S steps whose weighted sum has the expectation of the whole."""
        factor = self.num_steps / chosen.shape[1]
        sampled = []
        for nodes in chosen.T.tolist():
            own = [(steps[node], g) for g, node in enumerate(nodes)]
            step = replace(
                steps[0],
                x_t=torch.stack([s.x_t[g] for s, g in own]),
                timesteps=torch.stack([s.timesteps[g] for s, g in own]),
                target=torch.stack([s.target[g] for s, g in own]),
                weight=factor * torch.stack([s.weight[g] for s, g in own]),
                log_snr=torch.stack([s.log_snr[g] for s, g in own if s.log_snr is not None]),
            )
            sampled.append(step if step.reference is None else replace(step, reference=step.target))
        return tuple(sampled)
