"""Several training scripts taking turns in blocks of steps, so that a change of the machine hits all of them alike.

Every contestant is a process of its own under `under_clock.py`; one runs while the others wait. A round goes through them forwards and
then backwards (A B B A), so that a drift within the round cancels. Compared are CPU seconds where there is no GPU: on one thread they
are steady even on a machine that others use.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUSY = 0.5
"""A round in which a contestant had less than this share of a core is measured again."""
ATTEMPTS = 3


@dataclass(frozen=True)
class Contestant:
    """A script and what it does per optimizer step."""

    script: Path
    flags: Sequence[str]
    items: float = 1.0  # pairs, or pictures, per optimizer step
    stand_ins: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """Of the process."""
        named = [word for name in self.stand_ins for word in ("--stand_in", name)]
        return [sys.executable, str(HERE / "under_clock.py"), *named, str(self.script), *map(str, self.flags)]


class Entrant:
    """A contestant's process; waits after its first step."""

    def __init__(self, name: str, contestant: Contestant, logs: Path, patience: float | None = None) -> None:
        self.name, self.contestant, self.log = name, contestant, logs / f"{name.replace(' ', '_')}.log"
        self.patience = patience  # seconds to wait for a report
        to_child, from_child = os.pipe(), os.pipe()
        environment = {**os.environ, **contestant.environment, "DIFFPREF_CONTEST": f"{to_child[0]},{from_child[1]}"}
        start = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                contestant.command(),
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=(to_child[0], from_child[1]),
            )
        os.close(to_child[0])
        os.close(from_child[1])
        self.to, self.replies = os.fdopen(to_child[1], "w"), os.fdopen(from_child[0])
        try:
            self.answer()
        except RuntimeError:
            self.stop()
            raise
        self.seconds_to_first_step = time.perf_counter() - start

    def answer(self) -> dict[str, Any]:
        """The next report. Raises RuntimeError with the end of its log when the process has ended, or says nothing for too long."""
        if not select.select([self.replies], [], [], self.patience)[0]:
            raise RuntimeError(f"{self.name} has said nothing for {self.patience:.0f} s:\n{self.log.read_text()[-3000:]}")
        line = self.replies.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def block(self, steps: int) -> dict[str, Any]:
        """Take `steps` steps."""
        print(steps, file=self.to, flush=True)
        return self.answer()

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.to.close()
        self.replies.close()


def contest(
    contestants: Mapping[str, Contestant],
    logs: Path,
    *,
    rounds: int = 3,
    steps: int = 6,
    warm_up: int = 3,
    unit: str = "cpu",
    patience: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Name -> seconds per item and what else was measured of it.

    unit: "cpu", the median of the steps' CPU seconds; "wall", the mean, because a GPU runs behind what is launched.
    patience: seconds to wait for a start or a block of steps; without end if None.
    """
    logs.mkdir(parents=True, exist_ok=True)
    entrants: list[Entrant] = []
    try:
        entrants += [Entrant(name, contestant, logs, patience) for name, contestant in contestants.items()]
        for entrant in entrants:
            if warm_up:
                entrant.block(warm_up)
        results = [one_round(entrants, steps, unit) for _ in range(rounds)]
        last = {e.name: e.block(1)["peak_bytes"] for e in entrants}
    finally:
        for entrant in entrants:
            entrant.stop()
    found = {}
    for e in entrants:
        per_round = [r[e.name] / e.contestant.items for r in results]
        found[e.name] = {
            "seconds_per_item": statistics.median(per_round),
            "rounds": per_round,
            "items_per_step": e.contestant.items,
            "seconds_to_first_step": e.seconds_to_first_step,
            "peak_bytes": last[e.name],
        }
    return found


def one_round(entrants: Sequence[Entrant], steps: int, unit: str) -> dict[str, float]:
    """Seconds per step of everybody, from one block on the way there and one on the way back."""
    for attempt in range(ATTEMPTS):
        seen: dict[str, list[float]] = {e.name: [] for e in entrants}
        shares = []
        for e in [*entrants, *reversed(entrants)]:
            reply = e.block(steps)
            seen[e.name] += reply[unit]
            shares.append(sum(reply["cpu"]) / sum(reply["wall"]))
        if unit == "wall" or min(shares) >= BUSY or attempt == ATTEMPTS - 1:
            break
    of = statistics.median if unit == "cpu" else statistics.mean
    return {name: of(times) for name, times in seen.items()}


def ratios(found: Mapping[str, Mapping[str, Any]], slower: str, faster: str) -> dict[str, float]:
    """How many times as many items per second `faster` does: from the medians, with the least and largest of the rounds."""
    by_round = [a / b for a, b in zip(found[slower]["rounds"], found[faster]["rounds"], strict=True)]
    return {
        "ratio": found[slower]["seconds_per_item"] / found[faster]["seconds_per_item"],
        "least": min(by_round),
        "largest": max(by_round),
    }
