"""Ending a run early without losing a step: signals, updates that are not finite, and validations that no longer improve."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
MAX_SKIPPED = 3
"""Non-finite updates in a row before the run ends."""
MAX_OVERFLOWS = 25
"""The same for fp16 gradients with a finite loss: the loss scale starts at 65536 and halves at each overflow."""


class Stopped(Exception):
    """The run was asked to stop and has saved; `code` is the exit code of the process."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotFinite(Exception):
    """Too many losses or gradients in a row were not finite."""


@dataclass
class EarlyStopping:
    """Counts validations without a better value; higher is better. Its numbers are part of the checkpoint."""

    patience: int
    key: str
    """Name of the value among a validation's results."""
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0

    def improves(self, step: int, value: float) -> bool:
        """Take the value of a validation; whether it is the best so far. A value that is not finite never is."""
        better = math.isfinite(value) and value > self.best
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best, self.best_step = value, step
        return better

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def state(self) -> dict[str, float | int | None]:
        """For JSON."""
        return {"best": self.best if self.best_step else None, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Continue from `state`."""
        self.best = -math.inf if state["best"] is None else float(state["best"])
        self.best_step, self.waited = int(state["best_step"] or 0), int(state["waited"] or 0)


class StopSignals:
    """Within the block, SIGTERM, SIGINT and SIGUSR1 only set `code`; the loop saves after the step in progress.

    A second signal of the same kind acts at once, as it would without us.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in EXIT_CODES:
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.code = EXIT_CODES[signal.Signals(number)]
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
