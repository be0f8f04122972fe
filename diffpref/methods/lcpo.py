"""LCPO (arXiv:2509.24159) on diffusion errors: Diffusion-DPO with labels that may be wrong.

    loss = -c log sigmoid(z) - (1 - c) log sigmoid(-z),   z = beta/2 * (r_chosen - r_rejected)
    c    = eta p / (eta p + (1 - eta)(1 - p)),   p = sigmoid(z), without gradient
    r    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2          mean over (C, h, w)

c is the probability that the label is right, given the policy and the reliability eta of whoever gave it; the gradient in z
is p - c. At eta 1/2 nothing is learnt, towards 1 this becomes Diffusion-DPO, and pairs that the policy confidently contradicts
fade. A run re-estimates eta of every annotator after each update as a moving average of the mean c of its labels; a score column
"reliability" fixes it per pair instead. A method for language models; initial value, averaging and floor are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpref.core.links import LinkName, link_of, mixed
from diffpref.core.noisy_labels import label_confidence
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class LCPO:
    """Pairs, a reference, and optionally a reliability per pair."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error difference; larger keeps the policy closer to the reference."""
    loss_type: LinkName = "sigmoid"
    """Link l from z to the loss; in the equations above l(z) = -log sigmoid(z), and p = exp(-l(z)) / (exp(-l(z)) + exp(-l(-z)))."""
    reliability: float = 0.9
    """Probability that a label is right at the start, in (0.5, 1); lower filters more pairs."""
    reliability_decay: float = 0.99
    """Share of an annotator's reliability that stays at each update; 1 leaves it as it is at the start."""
    reliability_floor: float = 0.5
    """Reliability is not estimated below this; at 0.5 an annotator's labels teach nothing any more."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; LCPO needs beta > 0, usually 2000 to 5000 on SD and SDXL")
        if not 0.5 < self.reliability < 1:
            raise ValueError(f"reliability is {self.reliability}; it lies in (0.5, 1): at 0.5 nothing is learnt, 1 is Diffusion-DPO")
        if not 0 <= self.reliability_decay <= 1:
            raise ValueError(f"reliability_decay is {self.reliability_decay}; it lies in [0, 1], usually 0.99; 1 keeps the first value")
        if not 0.5 <= self.reliability_floor <= self.reliability:
            raise ValueError(f"reliability_floor is {self.reliability_floor}; it lies between 0.5 and reliability ({self.reliability})")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        logit, label = reward[:, 0] - reward[:, 1], soft_label(batch)
        given = batch.scores.get("reliability")
        reliability = self.reliability if given is None else given[:, 0]
        link = link_of(self.loss_type, self.beta)
        right, wrong = (label_confidence(link, z, reliability) for z in (logit, -logit))
        probability = label * right + (1 - label) * (1 - wrong)
        return LossOutput(mixed(link, logit, probability), metrics | {"lcpo/confidence": right.mean()}, label * right + (1 - label) * wrong)
