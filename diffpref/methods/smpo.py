"""SmPO (Lu et al., 2025, arXiv:2506.02698): the margin is scaled by how sure the preference is.

    loss = -log sigmoid(z), or another link of z,   z = beta/2 * gamma * (2p - 1) * (r_chosen - r_rejected)
    r    = ||eps_ref - e||^2 - ||eps_theta - e||^2              mean over (C, h, w); e implied by the inverted x_t
    p    = exp(n_chosen) / (exp(n_chosen) + exp(n_rejected)),   n = (score - low) / (high - low)

The path is DDIM inversion with one averaged ReNoise iteration. p depends on the score gap only, and stays below 0.7311, so
that the coefficient gamma (2p - 1) is usually below 1 with gamma 10: SmPO weakens the nominal beta. low and high are the
range of the scores over the data set (diffpref.core.scores.score_range); the authors' code has constants of PickScore on
their data, and takes p of a batch from its first pair, here p is per pair. Pairs may stand in either order: a chosen image
with the lower score has p below 1/2. With score none p is the label's own probability, such as a vote share; certain labels
then make this Diffusion-DPO at gamma times beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffpref.core.links import LinkName, link_of
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.scores import named_score, smoothed_probability
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class SmPO:
    """Pairs, a reference, and scores of both images or a probability per pair."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error difference, before smoothing; the authors use 2000 on SD1.5, 5000 on SDXL."""
    gamma: float = 10.0
    """Multiplies 2p - 1; with gamma 1 and p 1 the loss is Diffusion-DPO's."""
    loss_type: LinkName = "sigmoid"
    """Link from z to the loss."""
    score: str | None = "pickscore"
    """Scorer whose scores give p; none for the probability of the label, which then has to be a soft one."""
    score_min: float | None = None
    """Smallest score of the data set; needed with score."""
    score_max: float | None = None
    """Largest score of the data set; needed with score. A wider range brings p nearer to 1/2."""

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; SmPO needs {name} > 0, usually {5000 if name == 'beta' else 10}")
        given = [value for value in (self.score_min, self.score_max) if value is not None]
        if self.score is None and given:
            raise ValueError("score_min and score_max belong to a score; name the scorer with score, or leave them out")
        if len(given) == 2 and not given[0] < given[1]:
            raise ValueError(f"score_min is {given[0]} and score_max {given[1]}; a constant score holds no preference")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs. Raises ValueError when the batch lacks the scores."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        coefficient = self.gamma * (2 * self.probability(batch) - 1)
        logit = coefficient.to(reward.dtype) * (reward[:, 0] - reward[:, 1])
        return LossOutput(link_of(self.loss_type, self.beta)(logit), metrics | {"smpo/coefficient": coefficient.abs().mean()})

    def probability(self, batch: PreferenceBatch) -> Tensor:
        """Smoothed probability (G,) that the first image is the better one."""
        if self.score is None:
            return soft_label(batch)
        if self.score_min is None or self.score_max is None:
            raise ValueError(f"score is {self.score}, but score_min or score_max is not set; give that score's range over the data set")
        return smoothed_probability(named_score(batch, self.score, "method smpo"), self.score_min, self.score_max)
