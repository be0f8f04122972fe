"""LiPO (Liu et al., 2024, arXiv:2402.01878) on diffusion errors: losses of learning-to-rank on lists of images.

    s = beta/2 * (||eps_ref - eps||^2 - ||eps_theta - eps||^2)         mean over (C, h, w), (G, K)

    lambda    RankDPO's weights with the ranks of the policy's current s, not of the labels
    list_mle  sum_i logsumexp_{j >= i}(s_j) - s_i, images by falling relevance (Plackett-Luce)
    softmax   cross-entropy of softmax(s) against relevance / sum
    logistic  sum over phi_i > phi_j of softplus(-(s_i - s_j))
    hinge     sum over phi_i > phi_j of max(0, 1 - (s_i - s_j))

A method for language models, where lambda was the best; no settings for diffusion are published. The paper's beta has no half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from diffpref.core.links import hinge
from diffpref.core.lists import check_ranked, lambda_dcg, list_mle, pairwise, ranks_in_order, softmax_cross_entropy
from diffpref.core.rewards import implicit_rewards
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class LiPO:
    """Lists of two or more images, best first, a reference."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = None

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error differences; larger keeps the policy closer to the reference."""
    list_loss: Literal["lambda", "list_mle", "softmax", "logistic", "hinge"] = "lambda"
    """Loss on the list."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; LiPO needs beta > 0, for example 5000")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of lists. Raises ValueError for lists without a ranking."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        relevance = batch.relevance.to(reward.dtype)
        check_ranked(reward, relevance)
        return LossOutput(self._list_loss(reward, relevance), metrics)

    def _list_loss(self, reward: Tensor, relevance: Tensor) -> Tensor:
        match self.list_loss:
            case "lambda":
                return lambda_dcg(reward, relevance, ranks_in_order(reward.detach()))
            case "list_mle":
                return list_mle(reward, relevance)
            case "softmax":
                return softmax_cross_entropy(reward, relevance)
            case "logistic":
                return pairwise(reward, relevance, lambda margin: F.softplus(-margin))
            case "hinge":
                return pairwise(reward, relevance, hinge)
