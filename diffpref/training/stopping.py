"""Ending a run early without losing a step: signals, and updates that are not finite."""

from __future__ import annotations

import signal
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
