"""The crash cases for any training script that can be started with a command:

    python tests/reliability/any_script.py --steps 12 --every 3 --result '{folder}/result.safetensors' --json found.json \\
        -- train.py --output_dir '{folder}' --max_steps '{steps}' --save_every '{every}' '{resume:--resume latest}'

prints a table of case, times tried, steps lost and pass. Of the script only its command is known, that its checkpoints are folders
`<name>-<step>` in {folder}, and the file that it trains for. The faults are those of the training processes of our own tests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file

from tests.reliability.faults import Fault, Limits
from tests.reliability.harness import Row, Trainer, any_script, newest_step, random_kills, step_of, table, wait_until


@dataclass
class Script:
    """A script under test, and what an uninterrupted run of it left."""

    trainer: Trainer
    home: Path
    kills: int
    result: Callable[[Path], Path]
    want: str = ""

    def folder(self, name: str) -> Path:
        """Where a broken run writes."""
        return self.home / name.replace(" ", "-")

    def resumed(self, row: Row, folder: Path, lost: int = 0) -> None:
        """Resume, and note whether the end is that of the uninterrupted run."""
        outcome = self.trainer.run(folder, resume=True)
        if outcome.code:
            row.add(lost, False, f"the resume ends with {outcome.code}: {outcome.last_line[:100]}")
        else:
            row.add(lost, self.trainer.result(folder) == self.want, "the resume ends with another result")


def same_twice(script: Script) -> Row:
    """R1: two runs are the same run."""
    row, whole = Row("R1"), script.folder("whole")
    outcome = script.trainer.run(whole)
    if outcome.code:
        raise SystemExit(f"the script fails without any fault: exit {outcome.code}\n{outcome.errors[-2000:]}")
    script.want = script.trainer.result(whole)
    again = script.folder("again")
    script.trainer.run(again)
    row.add(0, script.trainer.result(again) == script.want != "nothing", "two runs differ")
    return row


def killed_in_a_step(script: Script) -> Row:
    """R2: stopped between two saves and resumed."""
    row, folder, every = Row("R2"), script.folder("R2"), script.trainer.every
    script.trainer.run(folder, Fault("SIGKILL", "backward", count=every + 2))
    script.resumed(row, folder, every + 1 - newest_step(folder))
    return row


def killed_in_a_save(script: Script) -> Row:
    """R3: when the first file of the second checkpoint is there, when half of them are, and when all are."""
    row, every = Row("R3"), script.trainer.every
    number = files_of(script.folder("whole"), every)
    for place in sorted({1, max(1, number // 2), number}):
        folder = script.folder(f"R3-{place}")
        process, end = script.trainer.start(folder, False)
        wait_until(lambda: files_of(folder, 2 * every) >= place or newest_step(folder) > 2 * every)  # noqa: B023, called at once
        os.kill(process.pid, signal.SIGKILL)
        end()
        script.resumed(row, folder, every)
    return row


def files_of(folder: Path, step: int) -> int:
    """Number of files in the checkpoint of a step, complete or being written."""
    return len([path for path in folder.glob(f"*-{step}*/**/*") if path.is_file()])


def without_space(script: Script) -> Row:
    """R5: no file may become larger than half of a checkpoint's largest; then there is space again."""
    row, folder = Row("R5"), script.folder("R5")
    newest = max(script.folder("whole").glob("*-*"), key=step_of)
    half = max(p.stat().st_size for p in newest.rglob("*") if p.is_file()) // 2
    script.trainer.run(folder, limits=Limits(file_bytes=half))
    script.resumed(row, folder)
    return row


def asked_to_stop(script: Script) -> Row:
    """R6: SIGTERM and SIGINT in a step."""
    row, every = Row("R6"), script.trainer.every
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        folder = script.folder(name)
        outcome = script.trainer.run(folder, Fault(name, "backward", count=every + 2))
        lost = max(0, every + 1 - newest_step(folder))
        if outcome.code != code or lost:
            row.add(lost, False, f"{name}: exit {outcome.code}, nothing saved")
        else:
            script.resumed(row, folder, lost)
    return row


def damaged(script: Script) -> Row:
    """R7: one bit of the newest checkpoint is wrong."""
    row, folder, every = Row("R7"), script.folder("R7"), script.trainer.every
    script.trainer.run(folder, Fault("SIGKILL", "backward", count=2 * every + 2))
    newest = max((p for p in folder.glob("[!.]*-*") if p.is_dir()), key=step_of)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(bytes(data))
    script.resumed(row, folder, every)
    return row


def two_in_one_folder(script: Script) -> Row:
    """R14: a second run is refused while the first is in its folder."""
    row, folder = Row("R14"), script.folder("R14")
    process, end = script.trainer.start(folder, False, Fault("SIGSTOP", "backward", count=script.trainer.every + 2))
    wait_until(lambda: newest_step(folder) > 0)
    second = script.trainer.run(folder, resume=True)
    os.kill(process.pid, signal.SIGCONT)
    end()
    same = script.trainer.result(folder) == script.want
    row.add(
        0, second.code != 0 and same, f"the second run ends with {second.code}" + ("" if same else ", and the first with another result")
    )
    return row


def not_finite(script: Script) -> Row:
    """N2: from the second step on no gradient is finite; the run must not end as a success with such weights."""
    row, folder = Row("N2"), script.folder("N2")
    outcome = script.trainer.run(folder, Fault("nan", "backward", count=2, lasting=True))
    path = script.result(folder)
    bad = path.suffix == ".safetensors" and path.is_file() and not all(bool(x.isfinite().all()) for x in load_file(path).values())
    row.add(0, outcome.code != 0 and not bad, f"exit {outcome.code}" + (", and the weights are not finite" if bad else ""))
    return row


def killed_at_random(script: Script) -> Row:
    """R4: at random moments, half of them in saves."""
    longest = script.trainer.run(script.folder("timed")).seconds
    folder = script.folder("R4")
    row = random_kills(script.trainer, folder, script.want, script.kills, seed=0, longest=longest)
    if row.passed:
        outcome = script.trainer.run(folder, resume=folder.exists())
        row.passed = outcome.code == 0 and script.trainer.result(folder) == script.want
        row.note = row.note if row.passed else f"the last resume ends with {outcome.code or 'another result'}"
    return row


CASES = [
    same_twice,
    killed_in_a_step,
    killed_in_a_save,
    killed_at_random,
    without_space,
    asked_to_stop,
    damaged,
    two_in_one_folder,
    not_finite,
]


def crash_cases(words: Sequence[str], steps: int, every: int, result: str, kills: int, home: Path) -> list[Row]:
    """All cases for the script that is started with `words`."""
    trainer = any_script(words, steps, every, result, home)
    script = Script(trainer, home, kills, lambda folder: Path(result.format(folder=folder)))
    rows = []
    for case in CASES:
        rows.append(case(script))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """The table for any script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--result", required=True, help="file that the run is for; {folder} is its output folder")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("words", nargs="+", help="script and its flags")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        rows = crash_cases(given.words, given.steps, given.every, given.result, given.kills, Path(home))
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
