"""How x_t and its regression target are reached from a batch."""

from __future__ import annotations

from typing import Protocol

from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, PathStep, Predict, PreferenceBatch
from diffpref.paths.forward import ForwardNoising
from diffpref.paths.inversion import DdimInversion
from diffpref.paths.recorded import Recorded
from diffpref.paths.trajectory import InversionTrajectory


class Path(Protocol):
    """A frozen dataclass of settings that turns a batch into places on the diffusion path, without gradient."""

    def __call__(
        self,
        batch: PreferenceBatch,
        process: DdpmProcess,
        draws: PairRandom,
        policy: Predict | None = None,
        reference: Predict | None = None,
        null: Conditioning | None = None,
    ) -> tuple[PathStep, ...]:
        """Steps for all groups. null: conditioning of the empty prompt (1, 1, ...), for guidance."""


PATHS: dict[str, type[Path]] = {
    "forward": ForwardNoising,
    "inversion": DdimInversion,
    "recorded": Recorded,
    "trajectory": InversionTrajectory,
}
