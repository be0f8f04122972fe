"""One paper, one file: equation, hyper-parameters, loss. recipes.py names the published systems that are put together from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods.dense_reward import DenseReward
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.diffusion_kto import DiffusionKTO
from diffpref.methods.dmpo import DMPO
from diffpref.methods.dpop import DPOP
from diffpref.methods.dro import DRO
from diffpref.methods.dspo import DSPO
from diffpref.methods.inversion_dpo import InversionDPO
from diffpref.methods.lcpo import LCPO
from diffpref.methods.lipo import LiPO
from diffpref.methods.mapo import MaPO
from diffpref.methods.odpo import ODPO
from diffpref.methods.rank_dpo import RankDPO
from diffpref.methods.sft import SFT
from diffpref.methods.smpo import SmPO
from diffpref.methods.spo import SPO


class Method(Protocol):
    """A frozen dataclass of hyper-parameters that turns predictions into a loss per group."""

    needs_reference: ClassVar[bool]
    needs_reference_prediction: ClassVar[bool]
    """Whether errors of the reference computed beforehand are not enough."""
    images_per_group: ClassVar[int | None]
    """Images of a group that it looks at; None for all of them."""

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) and scalar metrics."""


METHODS: dict[str, type[Method]] = {
    "dense_reward": DenseReward,
    "diffusion_dpo": DiffusionDPO,
    "diffusion_kto": DiffusionKTO,
    "dmpo": DMPO,
    "dpop": DPOP,
    "dro": DRO,
    "dspo": DSPO,
    "inversion_dpo": InversionDPO,
    "lcpo": LCPO,
    "lipo": LiPO,
    "mapo": MaPO,
    "odpo": ODPO,
    "rank_dpo": RankDPO,
    "sft": SFT,
    "smpo": SmPO,
    "spo": SPO,
}
