"""Inversion-DPO (Li et al., 2025, arXiv:2507.11554): DPO on whole inversion trajectories.

    loss = -log sigmoid(z),   z = -beta/2 * sum_t w_t (d_chosen - d_rejected) / n,   w_t = 1 / (2 alpha_t^2)
    d    = ||eps_theta(y_t) - e*_t||^2 - ||eps_ref(y_t) - e*_t||^2            mean over (C, h, w)

e*_t is the noise of the reference's own inversion step and y_t the latent where that step ended; path "trajectory" makes both
and the weights w_t / n. The released code differs three times: it asks the inverting reference at the level where the step ends (the
path's network_timestep "destination"), it compares the networks where the step began (eval_point "source"), and its z has the opposite
sign, which rewards leaving the reference on chosen images and staying on rejected ones, against the paper's own figure.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffpref.core.links import LinkName, link_of, mixed
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class InversionDPO:
    """Pairs, a reference, many steps per pair."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = True  # the path inverts with it
    images_per_group: ClassVar[int | None] = 2

    beta: float = 2000.0
    """Inverse temperature on half the weighted mean over the trajectory; larger keeps the policy closer to the reference."""
    loss_type: LinkName = "sigmoid"
    """Link from z to the loss."""
    sign: Literal["paper", "official"] = "paper"
    """Fit the chosen trajectories and leave the rejected ones, or the reverse, as the released code does."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; Inversion-DPO needs beta > 0, the authors use 2000")
        if self.sign == "official":
            warnings.warn(
                "sign is official: the released loss moves the policy away from the reference on chosen images and towards it on rejected "
                "ones, the opposite of the paper's figure; use sign paper to train",
                stacklevel=2,
            )

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta * (1 if self.sign == "paper" else -1))
        return LossOutput(mixed(link_of(self.loss_type, self.beta), reward[:, 0] - reward[:, 1], soft_label(batch)), metrics)
