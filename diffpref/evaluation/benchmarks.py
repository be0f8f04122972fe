"""Layouts of public benchmarks whose scorers run elsewhere: prompts in, pictures out as those scorers expect, results back in.

    geneval      arXiv:2310.11513   <n>/metadata.jsonl, <n>/samples/0000.png; 4 pictures per prompt
    dpg          arXiv:2403.05135   <prompt id>.png, the prompt's 4 pictures as a 2 x 2 grid in reading order
    t2i_compbench arXiv:2307.06350  samples/<prompt>_<6 digits>.png, counted over all pictures; 10 pictures per prompt
    hpdv2        arXiv:2306.09341   <style>/<n>.jpg, one folder per style; 1 picture per prompt

No detector and no question-answering model is rebuilt here: the official scorers do that part.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffpref.evaluation.work import write_bytes, write_text


@dataclass(frozen=True)
class Entry:
    """One prompt of a benchmark and what its layout needs to know."""

    prompt: str
    key: str  # the benchmark's own name of it
    line: str = ""  # geneval: its metadata as it was


Locate = Callable[[int, int], Path]
"""(prompt index, picture) -> file of a drawn picture."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its prompts are read, its pictures laid out, its results read back."""

    pictures_per_prompt: int
    read: Callable[[Path], list[Entry]]
    lay_out: Callable[[Sequence[Entry], Locate, int, Path], None]
    results: Callable[[Path], dict[str, float]]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"benchmark file {str(path)!r} cannot be read: {error}") from error


def _place(source: Path, target: Path) -> None:
    """Put a picture into the layout, as a link where the file system allows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_geneval(path: Path) -> list[Entry]:
    """Lines of evaluation_metadata.jsonl. Raises ValueError naming the line that is not JSON or has no prompt."""
    entries: list[Entry] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entries.append(Entry(str(json.loads(line)["prompt"]), f"{len(entries):05d}", line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"benchmark file {str(path)!r}, line {number}: needs JSON with a prompt ({error})") from error
    return entries


def lay_out_geneval(entries: Sequence[Entry], locate: Locate, pictures: int, folder: Path) -> None:
    """<n>/metadata.jsonl and <n>/samples/0000.png."""
    for i, entry in enumerate(entries):
        (folder / entry.key / "samples").mkdir(parents=True, exist_ok=True)
        write_text(folder / entry.key / "metadata.jsonl", entry.line)
        for k in range(pictures):
            _place(locate(i, k), folder / entry.key / "samples" / f"{k:04d}.png")


def results_geneval(path: Path) -> dict[str, float]:
    """Accuracy of every task over its pictures, and their mean as "overall", from the lines of evaluate_images.py."""
    by_task: dict[str, list[bool]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            by_task.setdefault(str(row["tag"]), []).append(bool(row["correct"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"result file {str(path)!r}, line {number}: needs JSON with tag and correct ({error})") from error
    if not by_task:
        raise ValueError(f"result file {str(path)!r} is empty")
    scores = {task: float(np.mean(found)) for task, found in by_task.items()}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def read_dpg(path: Path) -> list[Entry]:
    """A folder of <prompt id>.txt, in the order of their names."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not files:
        raise ValueError(f"benchmark prompts {str(path)!r}: needs the folder with DPG-Bench's .txt files")
    return [Entry(" ".join(_lines(file)).strip(), file.stem) for file in files]


def lay_out_dpg(entries: Sequence[Entry], locate: Locate, pictures: int, folder: Path) -> None:
    """One grid per prompt, two columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, entry in enumerate(entries):
        images = [Image.open(locate(i, k)).convert("RGB") for k in range(pictures)]
        width, height = images[0].size
        grid = Image.new("RGB", (width * min(2, pictures), height * -(-pictures // 2)))
        for k, image in enumerate(images):
            grid.paste(image, (k % 2 * width, k // 2 * height))
        buffer = io.BytesIO()
        grid.save(buffer, "PNG")
        write_bytes(folder / f"{entry.key}.png", buffer.getvalue())


def results_dpg(path: Path) -> dict[str, float]:
    """Mean over prompts, times 100, as "overall", and the categories that compute_dpg_bench.py prints.

    The file's categories rest on answers of the last grid cell only (so the script computes them); the overall score does not.
    """
    means, scores = [], {}
    for line in _lines(path):
        category = re.fullmatch(r"\t(.+): ([-\d.eE]+|nan)", line)
        if category:
            scores[category.group(1)] = float(category.group(2))
        elif ".png, " in line:
            means.append(float(line.rpartition(", ")[2]))
    if not means:
        raise ValueError(f"result file {str(path)!r} holds no line of a picture; give the file that --res-path named")
    return {"overall": 100 * float(np.mean(means)), **scores}


def read_t2i_compbench(path: Path) -> list[Entry]:
    """Prompts of one category's file, a line each, what follows a tab left out. Raises ValueError for one that is no file name."""
    prompts = [line.split("\t")[0].strip() for line in _lines(path) if line.strip()]
    bad = [p for p in prompts if "/" in p or "_" in p or len(p.encode()) > 240]
    if bad:
        raise ValueError(
            f"benchmark file {str(path)!r}: prompt {bad[0][:80]!r} cannot be a file name of this layout (no / or _, 240 bytes)"
        )
    return [Entry(prompt, prompt) for prompt in prompts]


def lay_out_t2i_compbench(entries: Sequence[Entry], locate: Locate, pictures: int, folder: Path) -> None:
    """samples/<prompt>_<number>.png, numbered over all pictures."""
    for i, entry in enumerate(entries):
        for k in range(pictures):
            _place(locate(i, k), folder / "samples" / f"{entry.key}_{i * pictures + k:06d}.png")


def results_t2i_compbench(path: Path) -> dict[str, float]:
    """Mean of the answers in vqa_result.json as "overall"."""
    try:
        answers = [float(row["answer"]) for row in json.loads("\n".join(_lines(path)))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"result file {str(path)!r}: needs a JSON list of objects with answer ({error})") from error
    if not answers:
        raise ValueError(f"result file {str(path)!r} is empty")
    return {"overall": float(np.mean(answers))}


def read_hpdv2(path: Path) -> list[Entry]:
    """A folder with one JSON list of prompts per style."""
    files = sorted(path.glob("*.json")) if path.is_dir() else []
    if not files:
        raise ValueError(f"benchmark prompts {str(path)!r}: needs the folder with the styles' .json files")
    found = []
    for file in files:
        prompts = json.loads("\n".join(_lines(file)))
        found += [Entry(str(prompt), f"{file.stem}/{n:05d}") for n, prompt in enumerate(prompts)]
    return found


def lay_out_hpdv2(entries: Sequence[Entry], locate: Locate, pictures: int, folder: Path) -> None:
    """<style>/<n>.jpg in quality 95, the first picture of each prompt."""
    for i, entry in enumerate(entries):
        buffer = io.BytesIO()
        Image.open(locate(i, 0)).convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
        target = folder / f"{entry.key}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, buffer.getvalue())


def results_hpdv2(path: Path) -> dict[str, float]:
    """Means of a JSON object {style: score or list of scores}, and their mean as "overall"."""
    try:
        scores = {str(style): float(np.mean(found)) for style, found in json.loads("\n".join(_lines(path))).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"result file {str(path)!r}: needs a JSON object of scores by style ({error})") from error
    return scores | {"overall": float(np.mean(list(scores.values())))}


BENCHMARKS: Mapping[str, Benchmark] = {
    "geneval": Benchmark(4, read_geneval, lay_out_geneval, results_geneval),
    "dpg": Benchmark(4, read_dpg, lay_out_dpg, results_dpg),
    "t2i_compbench": Benchmark(10, read_t2i_compbench, lay_out_t2i_compbench, results_t2i_compbench),
    "hpdv2": Benchmark(1, read_hpdv2, lay_out_hpdv2, results_hpdv2),
}
"""Benchmarks by name."""
