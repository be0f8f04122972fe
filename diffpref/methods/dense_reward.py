"""A Dense Reward View (Yang et al., ICML 2024, arXiv:2402.08265): early steps of whole trajectories count more.

    loss = -log p(ranking of the trajectories | s)                        Plackett-Luce; -log sigmoid(s_chosen - s_rejected) for two
    s    = C * mean over drawn steps i of clamp( log p_theta(x_p | x_t) - log p_ref(x_p | x_t), -clip_range, clip_range )

Steps are drawn with probability proportional to discount^i, i = 0 the noisiest; the source draws them (sources/stepwise.py, settings
sampled_steps and discount), the same for all trajectories of a prompt. log p is averaged over (C, h, w).

The authors draw two of five trajectories and start each from noise of its own; here best and worst of K trajectories from one
noise are compared. Their reference is the model before training, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffpref.core.lists import check_ranked, list_mle
from diffpref.core.rewards import error_metrics, margin_metrics, policy_error, reference_error
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DenseReward:
    """Two or more trajectories of a prompt, best first, some of their steps, a reference."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = None

    beta: float = 12.5
    """The paper's C on the mean clipped log ratio: 12.5 for many prompts, 10 for one."""
    log_ratio_range: float = 5e-4
    """Log ratios are held within -+ this and have no gradient outside; 5e-4 for many prompts, 1e-4 for one."""

    def __post_init__(self) -> None:
        for name in ("beta", "log_ratio_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 ({getattr(DenseReward, name)} in the paper)")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of lists. Raises ValueError for lists without a ranking."""
        log_ratio = torch.stack([reference_error([e]) - policy_error([e]) for e in evals])  # (S, G, K)
        kept = log_ratio.clamp(-self.log_ratio_range, self.log_ratio_range)
        score = self.beta * kept.mean(0)
        relevance = batch.relevance.to(score.dtype)
        check_ranked(score, relevance)
        metrics = margin_metrics(score) | error_metrics("policy", policy_error(evals)) | error_metrics("reference", reference_error(evals))
        metrics["dense_reward/clipped"] = (kept != log_ratio).to(score.dtype).mean()
        return LossOutput(list_mle(score, relevance), metrics)
