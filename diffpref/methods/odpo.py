"""ODPO (Amini et al., 2024, arXiv:2402.10571) on diffusion errors: clearer preferences ask for a larger margin.

    loss = -log sigmoid(z - offset),   z = beta/2 * (r_chosen - r_rejected),   offset = alpha * (score_chosen - score_rejected)
    r    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2          mean over (C, h, w)

The paper's offset is alpha times an increasing function of the score gap, the logarithm in its experiments, which does not
exist where the scores contradict the label; here it is the gap itself, negative in that case. A method for language models:
no settings for diffusion are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.links import LinkName, link_of, mixed
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.scores import named_score
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class ODPO:
    """Pairs, a reference, and scores of both images."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error difference; larger keeps the policy closer to the reference."""
    loss_type: LinkName = "sigmoid"
    """Link from the offset z to the loss."""
    alpha: float = 1.0
    """Logits of margin per unit of score gap; 0 is Diffusion-DPO. Choose it so that a typical gap gives about 1."""
    score: str = "score"
    """Scorer whose scores give the gap."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; ODPO needs beta > 0, usually 2000 to 5000 on SD and SDXL")
        if not self.alpha >= 0:
            raise ValueError(f"alpha is {self.alpha}; it is 0 or more: a negative one would ask least of the clearest pairs")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first. Raises ValueError when the batch lacks the scores."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        score = named_score(batch, self.score, "method odpo").to(reward.dtype)
        offset = self.alpha * (score[:, 0] - score[:, 1])
        loss = mixed(link_of(self.loss_type, self.beta), reward[:, 0] - reward[:, 1] - offset, soft_label(batch))
        return LossOutput(loss, metrics | {"odpo/offset": offset.mean()})
