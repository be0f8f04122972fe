"""Pictures of a model, scored and paired: N per prompt, every one judged by every scorer, stored in the Pick-a-Pic schema."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.core.random import uniform
from diffpref.data.images import decode_image
from diffpref.evaluation.combine import RULES, Picked, pick_pairs, ranks
from diffpref.evaluation.generate import Images
from diffpref.evaluation.scoring import Score, score_pictures
from diffpref.evaluation.work import missing_shards, shard_path, write_bytes, write_table, write_text

REJECTED_FILE = "rejected_rows.jsonl"
"""Rows and prompts that were set aside, with the reasons."""
Draw = Callable[[Sequence[str], Sequence[int]], Images]


def encoded(image: np.ndarray, image_format: str) -> bytes:
    """A picture uint8 (H, W, 3) as the bytes of a file; jpeg in quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if image_format == "jpeg" else {}
    Image.fromarray(image).save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def picture_uid(data: bytes) -> str:
    """Name of a picture: a hash of its file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def score_shards(
    folder: Path,
    prompts: Sequence[str],
    num_images: int,
    shard_size: int,
    seed: int,
    draw: Draw,
    scorers: Mapping[str, Score],
    image_format: str,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write scored-<n>.parquet for this rank's shards: prompt, images (files), one list of scores per scorer, and problem.

    Picture k of prompt i starts from the seed (seed, i, k) alone, so that shards can be made in any order and by any rank. Pictures
    are kept batch by batch until their shard is scored. problem: null, or why a scorer refused one of the prompt's pictures.
    """
    count = -(-len(prompts) // shard_size)
    for number in missing_shards(folder, "scored", count, rank, world):
        rows = range(number * shard_size, min((number + 1) * shard_size, len(prompts)))
        texts = [prompts[i] for i in rows for _ in range(num_images)]
        seeds = [picture_seed(seed, i, k) for i in rows for k in range(num_images)]
        place = folder / f".drawn-{number:05d}"
        files = drawn_files(place, texts, seeds, draw, image_format, batch_size)
        scored = score_pictures(scorers, [decode_image(data) for data in files], texts)  # as training will see them

        def grouped(values: Sequence[Any]) -> list[list[Any]]:
            return [list(values[i : i + num_images]) for i in range(0, len(values), num_images)]

        columns: dict[str, Any] = {
            "prompt": [prompts[i] for i in rows],
            "images": pa.array(grouped(files), pa.list_(pa.binary())),
            "problem": pa.array([next(filter(None, found), None) for found in grouped(scored.problems)], pa.string()),
            **{name: grouped(values.tolist()) for name, values in scored.scores.items()},
        }
        write_table(shard_path(folder, "scored", number), pa.table(columns))
        shutil.rmtree(place, ignore_errors=True)


def drawn_files(place: Path, texts: Sequence[str], seeds: Sequence[int], draw: Draw, image_format: str, batch_size: int) -> list[bytes]:
    """The encoded pictures, drawn in batches; those that lie in the folder `place` from an interrupted attempt are not drawn again."""
    place.mkdir(parents=True, exist_ok=True)
    paths = [place / f"{i:05d}" for i in range(len(texts))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        for i, image in zip(rows, draw([texts[i] for i in rows], [seeds[i] for i in rows]), strict=True):
            write_bytes(paths[i], encoded(image, image_format))
    return [path.read_bytes() for path in paths]


def picture_seed(seed: int, prompt: int, picture: int) -> int:
    """The generation seed of a picture."""
    return int(uniform(seed, "picture", prompt, picture) * 2**31)


@dataclass(frozen=True)
class ScoredPrompts:
    """The scored shards of G prompts, without the pictures."""

    prompts: list[str]  # (G,)
    problems: list[str | None]  # (G,) why a scorer refused a picture
    scores: dict[str, np.ndarray]  # scorer -> (G, K), NaN where it refused
    sizes: list[int]  # prompts per shard

    @property
    def good(self) -> np.ndarray:
        """bool (G,)."""
        return np.array([problem is None for problem in self.problems])


def read_scored(folder: Path, num_shards: int, names: Sequence[str]) -> ScoredPrompts:
    """What `score_shards` wrote. Writes rejected_rows.jsonl; raises ValueError if every prompt was refused."""
    tables = [pq.read_table(shard_path(folder, "scored", n), columns=["prompt", "problem", *names]) for n in range(num_shards)]
    whole = pa.concat_tables(tables)
    found = ScoredPrompts(
        whole.column("prompt").to_pylist(),
        whole.column("problem").to_pylist(),
        {name: np.array(whole.column(name).to_pylist(), dtype=np.float64) for name in names},
        [len(table) for table in tables],
    )
    write_rejected(folder, [(i, prompt, text) for i, (prompt, text) in enumerate(zip(found.prompts, found.problems, strict=True)) if text])
    if not found.good.any():
        raise ValueError(f"none of {len(whole)} prompts could be scored; the reasons are in {folder / REJECTED_FILE}")
    return found


def write_rejected(folder: Path, rows: Iterable[tuple[int, str | None, str]]) -> None:
    """Write rejected_rows.jsonl: (row, pair id or prompt, reason), one line each."""
    lines = [json.dumps({"row": row, "of": what, "reason": reason}) + "\n" for row, what, reason in rows]
    write_text(folder / REJECTED_FILE, "".join(lines))


def pair_up(
    folder: Path, num_shards: int, names: Sequence[str], rule: str, which: str, min_margin: float, seed: int, model: str
) -> dict[str, Any]:
    """Turn the scored shards into train-<n>.parquet; returns what the set is like.

    which: best_worst, all or ranked (one row per decided prompt with all pictures and their ranks). Prompts with a picture that a
    scorer refused are listed in rejected_rows.jsonl. Raises ValueError when no pair is decided.
    """
    found = read_scored(folder, num_shards, names)
    good = found.good
    scores = {name: values[good] for name, values in found.scores.items()}
    verdicts = np.zeros((len(good), *2 * next(iter(scores.values())).shape[1:]))
    verdicts[good] = RULES[rule](scores)  # refused prompts stay at 0: undecided
    pairs, undecided = pick_pairs(verdicts, "all" if which == "all" else "best_worst", min_margin)
    if not pairs:
        raise ValueError(
            f"none of {undecided} pairs is decided by rule {rule!r} with min_margin {min_margin}; lower min_margin or use another rule"
        )
    order, first = ranks(verdicts), 0
    for number, size in enumerate(found.sizes):
        chosen = [p for p in pairs if first <= p.group < first + size]
        stored = pq.read_table(shard_path(folder, "scored", number))
        if which == "ranked":
            groups = [p.group for p in chosen]
            rows = ranked_table(stored.take([g - first for g in groups]), order[groups], names)
        else:
            rows = pair_table(stored, chosen, first, names, seed, model)
        write_table(shard_path(folder, "train", number), rows)
        first += size
    return {
        "prompts": len(good),
        "rejected": int((~good).sum()),
        "pictures_per_prompt": int(verdicts.shape[1]),
        "pairs": len(pairs) if which != "ranked" else None,
        "lists": len(pairs) if which == "ranked" else None,
        "undecided": undecided - int((~good).sum()) * _comparisons(verdicts.shape[1], which),
        "rule": rule,
        "mean_margin": float(np.mean([p.margin for p in pairs])),
        "scores": {name: {"mean": float(x.mean()), "sd": float(x.std())} for name, x in scores.items()},
        "agreement_between_scorers": agreement(scores),
    }


def _comparisons(num_images: int, which: str) -> int:
    """Verdicts that `pick_pairs` looks at per prompt."""
    return num_images * (num_images - 1) // 2 if which == "all" else 1


def agreement(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share of a prompt's picture pairs that two scorers order alike, for every two of them."""
    names = list(scores)
    signs = {name: np.sign(x[:, :, None] - x[:, None, :]) for name, x in scores.items()}
    above = np.triu_indices(next(iter(scores.values())).shape[1], 1)
    return {
        f"{a} and {b}": float((signs[a][:, above[0], above[1]] == signs[b][:, above[0], above[1]]).mean())
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def pair_table(stored: pa.Table, pairs: Sequence[Picked], first: int, names: Sequence[str], seed: int, model: str) -> pa.Table:
    """Rows in the Pick-a-Pic schema, image 0 and 1 in random order, with <scorer>_0 and <scorer>_1."""
    swapped = [uniform(seed, "order_of_pair", p.group, p.better, p.worse) < 0.5 for p in pairs]
    order = [(p.worse, p.better) if swap else (p.better, p.worse) for p, swap in zip(pairs, swapped, strict=True)]
    local = [p.group - first for p in pairs]
    images: Any = stored.column("images").to_pylist()
    files = [[images[g][pair[k]] for g, pair in zip(local, order, strict=True)] for k in (0, 1)]
    labels = [[float((k == 0) != swap) for swap in swapped] for k in (0, 1)]
    prompts = stored.column("prompt").to_pylist()
    table: dict[str, Any] = {"caption": [prompts[g] for g in local]}
    for k in (0, 1):
        table |= {
            f"jpg_{k}": pa.array(files[k], pa.binary()),
            f"label_{k}": pa.array(labels[k], pa.float64()),
            f"image_{k}_uid": [picture_uid(data) for data in files[k]],
            f"model_{k}": [model] * len(pairs),
        }
        for name in names:
            values: Any = stored.column(name).to_pylist()
            table[f"{name}_{k}"] = pa.array([values[g][pair[k]] for g, pair in zip(local, order, strict=True)], pa.float64())
    table["margin"] = pa.array([p.margin for p in pairs], pa.float64())
    table["ranking_id"] = pa.array([p.group for p in pairs], pa.int64())
    return pa.table(table)


def ranked_table(stored: pa.Table, found: np.ndarray, names: Sequence[str]) -> pa.Table:
    """One row per prompt: prompt, images, rank (1 = best) and the scores, as lists."""
    columns: dict[str, Any] = {"prompt": stored.column("prompt"), "images": stored.column("images")}
    columns["rank"] = pa.array([row.tolist() for row in found], pa.list_(pa.int64()))
    columns |= {name: stored.column(name) for name in names}
    return pa.table(columns)
