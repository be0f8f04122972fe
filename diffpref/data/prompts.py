"""Sets of prompts for evaluation, with the hash that says which one a number belongs to."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.locations import asset

_PROMPT_KEYS = ("prompt", "Prompt", "Prompts", "caption", "text", "Text")
_GROUP_KEYS = ("category", "Category", "tag", "style", "Challenge")

HUB_SETS: Mapping[str, tuple[str, str, str]] = {
    "partiprompts": ("nateraw/parti-prompts", "PartiPrompts, 1632 prompts", "train"),
    "hpdv2": ("zhwang/HPDv2", "the HPDv2 benchmark, 800 prompts in each of four styles", "benchmark"),
    "drawbench": ("sayakpaul/drawbench", "DrawBench, 200 prompts", "train"),
    "pickapic_test": ("yuvalkirstain/pickapic_v2", "Pick-a-Pic's unique test prompts", "test_unique"),
}
"""Public sets: hub data set, what it is, split or folder. They are not redistributed here; give a local copy as name=path."""


@dataclass(frozen=True)
class PromptSet:
    """N prompts of a named set."""

    name: str
    texts: list[str]  # (N,)
    groups: list[str]  # (N,), the set's own categories; empty where it has none
    rejected: list[str]  # why entries were left out, with their place

    @property
    def hash(self) -> str:
        """16 hex digits over the prompts in order."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()[:16]

    def first(self, count: int | None) -> PromptSet:
        """The first `count` prompts. Raises ValueError for a count below 1."""
        if count is None:
            return self
        if count < 1:
            raise ValueError(f"max_prompts is {count}; it must be at least 1")
        return PromptSet(self.name, self.texts[:count], self.groups[:count], self.rejected)


def own_prompts(texts: Sequence[str]) -> PromptSet:
    """Prompts given on the command line. Raises ValueError for an empty one."""
    if not all(text.strip() for text in texts):
        raise ValueError(f"prompts holds an empty prompt among {len(texts)}; leave it out")
    return PromptSet("command line", list(texts), [""] * len(texts), [])


def load_prompt_set(source: str, max_prompts: int | None = None) -> PromptSet:
    """A set by name ("diffpref", those of HUB_SETS), by name=path for a local copy, or a file or folder of one's own.

    Files: .txt with a prompt per line, .json, .jsonl, .csv, .tsv, .parquet with a column prompt, caption or text. A folder is
    read file by file, the file's name becoming the group. Entries without text are left out and listed in `rejected`. Raises
    ValueError for what cannot be read, and when no prompt is left.
    """
    name, _, path = source.partition("=")
    if source == "diffpref":
        return _read("diffpref", asset("prompts", "diffpref.tsv")).first(max_prompts)
    if path and name in HUB_SETS:
        return _read(name, Path(path)).first(max_prompts)
    if source in HUB_SETS:
        return _from_hub(source).first(max_prompts)
    if not Path(source).exists():
        raise ValueError(f"prompt_set {source!r} is no file or folder, and no set called so: diffpref, {', '.join(HUB_SETS)}")
    return _read(Path(source).name, Path(source)).first(max_prompts)


def _from_hub(name: str) -> PromptSet:
    repository, what, split = HUB_SETS[name]
    try:
        if name == "hpdv2":
            from huggingface_hub import snapshot_download

            return _read(name, Path(snapshot_download(repository, repo_type="dataset", allow_patterns=f"{split}/*.json")) / split)
        import datasets

        loaded = datasets.load_dataset(repository, split=split)
        loaded = loaded.select_columns([c for c in loaded.column_names if c in (*_PROMPT_KEYS, *_GROUP_KEYS)])
        return _prompt_set(name, list(loaded))
    except Exception as error:
        # The hub client raises its own, requests' and httpx's types; for the user they all mean: not available.
        raise ValueError(
            f"prompt_set {name!r} ({what}) could not be loaded from the hub data set {repository} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); put a copy on this machine and give prompt_set {name}=PATH"
        ) from error


def _read(name: str, path: Path) -> PromptSet:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _READERS)
        entries: list[Any] = [{"prompt": _text(e), "category": file.stem} for file in files for e in _entries(file)]
        return _prompt_set(name, entries)
    return _prompt_set(name, _entries(path))


def _entries(path: Path) -> list[Any]:
    if path.suffix not in _READERS:
        raise ValueError(f"prompt_set {str(path)!r} is of type {path.suffix!r}; accepted: {', '.join(_READERS)}")
    try:
        return list(_READERS[path.suffix](path))
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        raise ValueError(f"prompt_set {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()  # the end of a file is no empty prompt
    return lines


def _json(path: Path) -> list[Any]:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, list):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a list of prompts")
    return loaded


def _rows(path: Path, delimiter: str) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


_READERS: Mapping[str, Any] = {
    ".txt": _lines,
    ".json": _json,
    ".jsonl": lambda path: [json.loads(line) for line in _lines(path) if line.strip()],
    ".csv": lambda path: _rows(path, ","),
    ".tsv": lambda path: _rows(path, "\t"),
    ".parquet": lambda path: pq.read_table(path).to_pylist(),
}


def _text(entry: Any) -> object:
    """The prompt of an entry: itself, or the first of the known keys."""
    if not isinstance(entry, dict):
        return entry
    return next((entry[key] for key in _PROMPT_KEYS if key in entry), None)


def _group(entry: Any) -> str:
    return str(next((entry[key] for key in _GROUP_KEYS if entry.get(key)), "")) if isinstance(entry, dict) else ""


def _prompt_set(name: str, entries: Iterable[Any]) -> PromptSet:
    texts, groups, rejected = [], [], []
    for place, entry in enumerate(entries, 1):
        text = _text(entry)
        if isinstance(text, str) and text.strip():
            texts.append(text.strip())
            groups.append(_group(entry))
        else:
            rejected.append(f"entry {place}: " + ("empty" if isinstance(text, str) else "no text under " + ", ".join(_PROMPT_KEYS)))
    if not texts:
        reason = f"; {rejected[0]}" if rejected else ""
        raise ValueError(f"prompt_set {name!r} has no prompt{reason}")
    return PromptSet(name, texts, groups, rejected)
