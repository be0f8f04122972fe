"""Starts training processes, breaks them with faults from outside, and tells what was lost.

One `Trainer` says how a training script is started and where its results lie. Ours is forked from a process that has imported
everything; any other script is started as it is (any_script.py puts the crash cases to it).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

FAULTS = Path(__file__).with_name("faults.py")
sys.path.insert(0, str(FAULTS.parents[2]))

from safetensors.torch import load_file  # noqa: E402

from tests.reliability import faults  # noqa: E402
from tests.reliability.faults import Fault, Limits  # noqa: E402

NO_LIMITS = Limits()
SECONDS = 300  # for one process, on a machine that does other things too


class Process(Protocol):
    """A started process."""

    pid: int

    def wait(self) -> int:
        """Exit code, negative for a signal."""


@dataclass
class Outcome:
    """How a process ended."""

    code: int
    errors: str
    seconds: float
    peak_mb: float | None = None
    """Most memory that the process has had; known of ours when it ended by itself."""

    @property
    def last_line(self) -> str:
        """The last line on stderr that is no progress bar."""
        lines = [line for line in re.split(r"[\r\n]+", self.errors) if line.strip() and "%|" not in line]
        return lines[-1] if lines else ""


class Forked:
    """A process forked from the warm server."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.pid: int = process.pid

    def wait(self) -> int:
        """Exit code, negative for a signal. A process that takes too long is killed."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return int(self.process.exitcode)


class Spawned:
    """A process of its own."""

    def __init__(self, words: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
            self.process = subprocess.Popen(words, stdout=out, stderr=err, env=os.environ | environment)
        self.pid = self.process.pid

    def wait(self) -> int:
        """Exit code, negative for a signal. A process that takes too long is killed."""
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@dataclass
class Trainer:
    """A way to train: start(folder, steps, resume, faults, log) -> process; and what a finished run leaves."""

    begin: Callable[[Path, bool, Sequence[Fault], Limits, Path], Process]
    result: Callable[[Path], str]
    """A digest of what the run was for."""
    every: int
    """Steps between checkpoints."""
    log: Path
    runs: int = field(default=0)

    def start(self, folder: Path, resume: bool, *faults: Fault, limits: Limits = NO_LIMITS) -> tuple[Process, Callable[[], Outcome]]:
        """A process, and what to call for its end."""
        self.runs += 1
        log, begun = self.log / f"run-{self.runs}", time.monotonic()
        process = self.begin(folder, resume, faults, limits, log)

        def end() -> Outcome:
            code = process.wait()
            told = Path(f"{log}.err")  # missing when the process was killed before it began
            errors, seconds = told.read_text(errors="replace") if told.exists() else "", time.monotonic() - begun
            peak = Path(f"{log}.peak")
            return Outcome(code, errors, seconds, float(peak.read_text()) if peak.exists() else None)

        return process, end

    def run(self, folder: Path, *faults: Fault, resume: bool = False, limits: Limits = NO_LIMITS) -> Outcome:
        """Until the process ends."""
        return self.start(folder, resume, *faults, limits=limits)[1]()


def diffpref(settings: dict[str, Any], every: int, log: Path, environment: dict[str, str] | None = None, command: str = "train") -> Trainer:
    """`diffpref train` with these settings, or another command that has an output_dir and is not resumed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.reliability.warm"])

    def begin(folder: Path, resume: bool, given: Sequence[Fault], limits: Limits, log: Path) -> Process:
        words, more = [command], {"output_dir": folder}
        if command == "train":
            more |= {"checkpointing_steps": every} | ({"resume_from_checkpoint": "latest"} if resume else {})
        for name, value in (settings | more).items():
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environment or {})
        process = context.Process(target=faults.run_ours, args=(words, list(given), str(log), env, limits))
        process.start()
        return Forked(process)

    return Trainer(begin, final_state, every, log)


def final_state(folder: Path) -> str:
    """Digest of the newest checkpoint's tensors, the exported adapter, and metrics.jsonl without times."""
    newest = max(folder.glob("checkpoint-*"), key=step_of)
    digest = hashlib.sha256(newest.name.encode())
    for path in [*sorted(newest.glob("*.safetensors")), *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {file_digest(path)}".encode())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def any_script(words: Sequence[str], steps: int, every: int, result: str, log: Path, environment: dict[str, str] | None = None) -> Trainer:
    """A training script; `words` may hold {folder}, {steps}, {every} and {resume:words to resume}."""

    def filled(word: str, folder: Path, resume: bool) -> list[str]:
        match = re.fullmatch(r"\{resume:(.*)\}", word)
        if match:
            return match[1].split() if resume else []
        return [word.format(folder=folder, steps=steps, every=every)]

    def begin(folder: Path, resume: bool, given: Sequence[Fault], limits: Limits, log: Path) -> Process:
        command = [part for word in words for part in filled(word, folder, resume)]
        return Spawned(
            [sys.executable, str(FAULTS), faults.as_text(given, limits), *command], log, {"OMP_NUM_THREADS": "1"} | (environment or {})
        )

    return Trainer(begin, lambda folder: file_digest(Path(result.format(folder=folder))), every, log)


def file_digest(path: Path) -> str:
    """Of what a file says: the header of safetensors stands in random order beside its tensors."""
    if not path.is_file():
        return "nothing"
    digest = hashlib.sha256()
    if path.suffix == ".safetensors":
        for name, x in sorted(load_file(path).items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode() + x.numpy().tobytes())
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def step_of(folder: Path) -> int:
    """The number behind the last dash of a checkpoint's name; -1 for anything else."""
    tail = folder.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint folder, complete or not; 0 without one."""
    return max((step_of(p) for p in folder.glob("[!.]*-*") if p.is_dir() and not p.name.startswith(("bad", "later"))), default=0)


def leftovers(folder: Path) -> list[str]:
    """What an interrupted save must not leave behind once the run is done."""
    return sorted(p.name for p in folder.glob(".tmp*"))


@dataclass
class Row:
    """A line of the table."""

    case: str
    tried: int = 0
    lost: int = 0
    """Steps lost at once, at most."""
    passed: bool = True
    note: str = ""

    def add(self, lost: int, passed: bool, note: str = "") -> None:
        """One more try."""
        self.tried, self.lost, self.passed = self.tried + 1, max(self.lost, lost), self.passed and passed
        self.note = self.note or ("" if passed else note)


def table(rows: Sequence[Row]) -> str:
    """Case, times tried, steps lost, pass."""
    lines = [f"{'case':<10}{'tried':>7}{'steps lost':>12}  pass"]
    lines += [f"{r.case:<10}{r.tried:>7}{r.lost:>12}  {'yes' if r.passed else 'NO'}{'  ' + r.note if r.note else ''}" for r in rows]
    return "\n".join(lines)


SAVE = {  # phases of our save, and the event just before which the process is killed
    "tensors written": Fault("SIGKILL", "open", r"tmp-checkpoint.*/trainer_state"),
    "before the manifest": Fault("SIGKILL", "open", r"tmp-checkpoint.*/manifest"),
    "before the rename": Fault("SIGKILL", "os.rename", r"tmp-checkpoint"),
    "renamed": Fault("SIGKILL", "open", r"/run$", 2),  # the first time is the check that the folder can be written
    "while pruning": Fault("SIGKILL", "shutil.rmtree", r"/checkpoint-"),
}


def random_kills(trainer: Trainer, folder: Path, want: str, number: int, seed: int, longest: float) -> Row:
    """Kill `number` times: at a moment within the `longest` seconds of a run, and each second time once a save has begun.

    A run that ends in between has to end with the result `want`, and another one is started. Steps lost are those of metrics.jsonl
    beyond the newest checkpoint, or unknown for a script that writes no such file.
    """
    row, draws, where = Row("R4"), random.Random(seed), Counter[str]()
    while row.tried < number and row.passed:
        process, end = trainer.start(folder, folder.exists())
        before, done_before = newest_step(folder), lines_of(folder / "metrics.jsonl")
        if row.tried % 2:
            await_save(folder, longest)
            time.sleep(draws.uniform(0, SAVE_SECONDS))
        else:
            time.sleep(draws.uniform(0, longest))
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        outcome = end()
        code, done = outcome.code, lines_of(folder / "metrics.jsonl")
        if code == 0:
            row.passed &= trainer.result(folder) == want
            row.note = "" if row.passed else f"another result after {row.tried} kills"
            shutil.rmtree(folder)
        elif code == -signal.SIGKILL:
            where["in a save" if leftovers(folder) else "in a step" if done > done_before else "while loading"] += 1
            lost = max(0, done - newest_step(folder)) if newest_step(folder) else min(done, trainer.every)
            row.add(lost, newest_step(folder) >= before and lost <= trainer.every, "more than an interval was lost")
        else:
            row.add(0, False, f"start after a kill ended with {code}: {outcome.last_line[:200]}")
    row.note = row.note or ", ".join(f"{count} {place}" for place, count in where.items())
    return row


SAVE_SECONDS = 0.03
"""About what a save of the tiny model takes."""


def await_save(folder: Path, longest: float) -> None:
    """Until a folder of a checkpoint is begun, at most so many seconds."""
    known, until = set(folder.glob("*checkpoint-*")), time.monotonic() + longest
    while time.monotonic() < until and not set(folder.glob("*checkpoint-*")) - known:
        time.sleep(0.001)


def wait_until(holds: Callable[[], bool], longest: float = 120.0) -> None:
    """Until something is so; it has to be within so many seconds."""
    until = time.monotonic() + longest
    while not holds():
        assert time.monotonic() < until, "it never came to this"
        time.sleep(0.01)


def lines_of(path: Path) -> int:
    """Complete lines of a file; 0 without it."""
    return path.read_text().count("\n") if path.exists() else 0
