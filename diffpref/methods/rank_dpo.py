"""RankDPO (Karthik et al., ICCV 2025, arXiv:2410.18013): all pairs of a ranked list, weighted by what they matter to it.

    loss = sum over phi_i > phi_j of |G_i - G_j| |1/D_i - 1/D_j| softplus(-beta/2 (r_i - r_j))
    G = 2^phi - 1,   D = log(1 + rank by phi),   r = ||eps_ref - eps||^2 - ||eps_theta - eps||^2     mean over (C, h, w)

phi in [0, 1] is an image's relevance, in the paper the share of comparisons won over five scorers (`win_counts` in
core/scores.py). Timesteps are shared by a list, noise is drawn per image (the path's shared_noise false). The paper's beta has
no half: one of theirs is two of ours; it names neither beta nor learning rate. Equal relevance shares a mean rank, so that the
order of images in a list is no matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.lists import check_ranked, lambda_dcg, ranks
from diffpref.core.rewards import implicit_rewards
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class RankDPO:
    """Lists of two or more images, best first, a reference."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = None

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error differences; larger keeps the policy closer to the reference."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; RankDPO needs beta > 0, for example 5000")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,), sum over the pairs of a list. Raises ValueError for lists without a ranking."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        relevance = batch.relevance.to(reward.dtype)
        check_ranked(reward, relevance)
        return LossOutput(lambda_dcg(reward, relevance, ranks(relevance)), metrics)
