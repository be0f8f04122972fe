"""A long measurement in parts: every result is kept at once, so that the same command goes on with what is missing, however it ended.

A part's result is a dictionary. "failed" in it, or in the result of one of its contestants, holds an error; "without" names peers whose
scripts were not given, and the part is done again once they are; "unfinished" says how far it came; "passed" says whether a check holds;
"void" says why a number does not count.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cpu import HERE, machine

from diffpref.training.run_folder import write_json

Stored = dict[str, Any]
LAST_WORDS = 1500  # characters of an error that are kept


def results_file(start: str, tiny: bool, given: Path | None) -> Path:
    """Where the results of this card are kept."""
    card = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "none"
    return given or HERE / "results" / f"{start}-{'tiny-' if tiny else ''}{card}.json"


def run_program(command: Sequence[str], seconds: float) -> str:
    """What a program prints. Raises RuntimeError with the end of what it said when it fails or takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"")[-LAST_WORDS:].decode(errors="replace")
        raise RuntimeError(f"ended after {seconds:.0f} s: {said}") from error
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout)[-LAST_WORDS:])
    return done.stdout


def failures(found: Mapping[str, Any]) -> list[str]:
    """Errors of a part and of its contestants."""
    entrants = found.get("entrants", {}).values()
    return [x["failed"] for x in (found, *entrants) if "failed" in x]


def is_missing(found: Mapping[str, Any] | None, given: Collection[str], again: bool = False) -> bool:
    """Whether a part is still to be done. given: peers whose scripts are there; again: failed parts too."""
    if found is None or "unfinished" in found or any(peer in given for peer in found.get("without", ())):
        return True
    return again and bool(failures(found))


def carry_out(
    path: Path,
    wanted: Mapping[str, Callable[[], dict[str, Any]]],
    *,
    minutes: float,
    given: Collection[str] = (),
    again: bool = False,
    judged: Callable[[Stored], None] = lambda stored: None,
) -> Stored:
    """Do the parts that are missing in the file until the time is over, each kept when it ends; all that is stored.

    judged: adds to the results what follows from all of them.
    """
    start = time.monotonic()
    stored: Stored = read(path)
    for name, work in wanted.items():
        tried = False
        while is_missing(stored.get(name), given, again and not tried):
            if time.monotonic() - start > 60 * minutes:
                return stored
            begun, tried = time.monotonic(), True
            try:
                found = work()
            except Exception as error:  # whatever it is: the next part may do, and this one would fail again
                found = {"failed": f"{type(error).__name__}: {error}"[-LAST_WORDS:]}
            stored[name] = found | {"took": time.monotonic() - begun}
            stored["machine"] = machine() | {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
            judged(stored)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, stored)
            print(f"{name}: {str(stored[name])[:300]}", flush=True)
    return stored


def read(path: Path) -> Stored:
    """The results that are there."""
    return json.loads(path.read_text()) if path.exists() else {}


def summary(stored: Stored, wanted: Collection[str], given: Collection[str]) -> tuple[str, int]:
    """The last line, and the exit code: 0 when every part is there, none failed and no check or number was lost."""
    missing = [name for name in wanted if is_missing(stored.get(name), given)]
    there = [name for name in wanted if name in stored]
    failed = [name for name in there if failures(stored[name])]
    lost = [name for name in there if stored[name].get("passed") is False or "void" in stored[name]]
    text = f"{len(wanted) - len(missing)} of {len(wanted)} parts are there; {len(failed)} failed, {len(lost)} void or not passed"
    text += f"; next: {missing[0]}" if missing else ""
    return text, int(bool(missing or failed or lost))


def clear(folder: Path) -> None:
    """Delete the folder of runs whose numbers have been read: a checkpoint and a pipeline of all of SDXL's weights take 45 GB."""
    shutil.rmtree(folder, ignore_errors=True)
