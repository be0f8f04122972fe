"""Writing the checkpoints of a run: beside the training where that is asked for, and what happens when one cannot be written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffpref.training.checkpoint import num_bytes, save_checkpoint
from diffpref.training.stopping import NotSaved

TRIES, PAUSE = 3, 2.0
"""Tries of the last save, and seconds between them; so many failures in a row end a run whose folder is gone."""

Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass
class CheckpointWriter:
    """Writes one checkpoint after another. A full disk costs a checkpoint and not the run."""

    folder: Path
    keep: int | None
    say: Callable[[int, str], None]  # (step, text)
    in_background: bool = False
    """Copy the tensors and write them in a thread; what is written is the same."""
    failed: int = 0
    """Saves in a row that did not work."""
    waited: float = 0.0
    """Seconds that training has stood still for saving."""
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)
    _pending: Future[bool] | None = field(default=None, repr=False)

    def save(self, step: int, tensors: Parts, state: Mapping[str, Any]) -> bool:
        """Write, or begin to; False if this checkpoint, or the one before that was still being written, is known to have failed.

        Raises NotSaved when the folder is gone for the third time.
        """
        start = time.perf_counter()
        saved = self.wait()
        if self.in_background:
            copies = {part: {name: x.detach().to("cpu", copy=True) for name, x in named.items()} for part, named in tensors.items()}
            self._pool = self._pool or ThreadPoolExecutor(1, "checkpoints")
            self._pending = self._pool.submit(self._write, step, copies, state)
        else:
            saved = self._write(step, tensors, state)
        self.waited += time.perf_counter() - start
        if self.failed >= TRIES and not self.folder.is_dir():
            raise NotSaved(f"output_dir {str(self.folder)!r} has vanished, and nothing can be saved; start again in another output_dir")
        return saved

    def save_last(self, step: int, tensors: Parts, state: Mapping[str, Any]) -> bool:
        """`save`, finished before it returns, and tried again a few times: nothing comes after it."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            if self.save(step, tensors, state) and self.wait():
                return True
        return False

    def wait(self) -> bool:
        """Until nothing is being written; whether the newest checkpoint was written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        return self.failed == 0

    def _write(self, step: int, tensors: Parts, state: Mapping[str, Any]) -> bool:
        try:
            save_checkpoint(self.folder, step, tensors, state, self.keep)
        except (OSError, FloatingPointError) as error:
            self.failed += 1
            reason = getattr(error, "strerror", None) or error
            size = f"{num_bytes(tensors) / 1e6:.1f} MB"
            self.say(step, f"checkpoint of step {step} ({size}) not written ({reason}); older ones are kept, training goes on")
            return False
        self.failed = 0
        return True
