"""DPO-Positive (Pal et al., 2024, arXiv:2402.13228) on diffusion errors: the chosen image must not get worse.

    loss = -log sigmoid( beta/2 * (r_chosen - r_rejected - penalty * max(0, -r_chosen)) )
    r    = ||eps_ref - eps||^2 - ||eps_theta - eps||^2          mean over (C, h, w)

-r_chosen is how much worse than the reference the policy denoises the chosen image, which plain DPO allows as long as the
rejected one worsens more. A method for language models: no settings for diffusion are published. The same term outside
the link is the guard `winner_floor`. A soft label p mixes the losses of both orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from diffpref.core.links import LinkName, link_of
from diffpref.core.rewards import implicit_rewards, soft_label
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class DPOP:
    """Pairs, a reference."""

    needs_reference: ClassVar[bool] = True
    needs_reference_prediction: ClassVar[bool] = False
    images_per_group: ClassVar[int | None] = 2

    beta: float = 5000.0
    """Inverse temperature on half the mean squared error difference; larger keeps the policy closer to the reference."""
    loss_type: LinkName = "sigmoid"
    """Link from the penalised margin to the loss."""
    penalty: float = 1.0
    """Weight of the chosen image's loss against the reference; 0 is Diffusion-DPO."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; DPOP needs beta > 0, usually 2000 to 5000 on SD and SDXL")
        if not self.penalty >= 0:
            raise ValueError(f"penalty is {self.penalty}; it is 0 or more, larger holds the chosen image tighter")

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) of pairs, chosen image first."""
        reward, metrics = implicit_rewards(evals, 0.5 * self.beta)
        worse = F.relu(-reward)  # (G, 2), in units of the logit
        margin, label = reward[:, 0] - reward[:, 1], soft_label(batch)
        link = link_of(self.loss_type, self.beta)
        forward, backward = (link(m - self.penalty * w) for m, w in ((margin, worse[:, 0]), (-margin, worse[:, 1])))
        return LossOutput(label * forward + (1 - label) * backward, metrics | {"dpop/penalty": worse[:, 0].detach().mean()})
