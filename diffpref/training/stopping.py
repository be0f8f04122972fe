"""Ending a run early without losing a step: signals, updates that are not finite, and validations that no longer improve."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
MAX_SKIPPED = 3
"""Non-finite updates in a row before the run ends."""
MAX_OVERFLOWS = 25
"""The same for fp16 gradients with a finite loss: the loss scale starts at 65536 and halves at each overflow."""


MAX_RETURNS = 3
"""Returns to a checkpoint under non_finite roll_back before the run ends."""
SAME_REQUEST = 1.0
"""Seconds within which a repeated signal counts as the first: a scheduler signals the processes and their launcher, which passes it on."""


class Ended(Exception):
    """The run is over before its end, for a reason that is no mistake in a setting; `code` is the exit code of the process."""

    code: int


class Stopped(Ended):
    """The run was asked to stop and has saved."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotFinite(Ended):
    """Too many losses or gradients in a row were not finite."""

    code = 3


class NotSaved(Ended):
    """The last checkpoint or the result could not be written."""

    code = 4


class FolderInUse(Ended):
    """Another run writes into the run folder."""

    code = 5


class OutOfMemory(Ended):
    """A step did not fit into memory."""

    code = 6


def say_end(end: Ended) -> int:
    """Print why the run is over, as the last line; returns the exit code."""
    print(end if isinstance(end, Stopped) else f"error: {end}", file=sys.stderr, flush=True)
    return end.code


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

    The same signal again, more than SAME_REQUEST seconds later, ends the process at once, also while it waits for another rank: a
    thread reads the signals, because Python's own handlers run between two instructions only.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[signal.Signals, object] = {}
        self._wakeup_before = -1
        self._write_end = -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # the caller handles signals
        for number in EXIT_CODES:
            self._before[number] = signal.signal(number, self._on_signal)
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=end_on_repetition, args=(read_end,), daemon=True, name="signals").start()
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.code = EXIT_CODES[signal.Signals(number)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._write_end >= 0:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._write_end)  # ends the thread
            self._write_end = -1
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def end_on_repetition(read_end: int) -> None:
    """Read numbers of signals until the pipe is closed; end the process at the repetition of one."""
    first: dict[int, float] = {}
    with open(read_end, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            now = time.monotonic()
            if now - first.setdefault(number[0], now) > SAME_REQUEST and number[0] in EXIT_CODES:
                os._exit(EXIT_CODES[signal.Signals(number[0])])
