"""One paper, one file: equation, hyper-parameters, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.sft import SFT


class Method(Protocol):
    """A frozen dataclass of hyper-parameters that turns predictions into a loss per group."""

    needs_reference: ClassVar[bool]
    images_per_group: ClassVar[int]

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """Loss (G,) and scalar metrics."""


METHODS: dict[str, type[Method]] = {"diffusion_dpo": DiffusionDPO, "sft": SFT}
