"""Existing pairs, scored: columns <scorer>_0 and <scorer>_1 beside the human label, or in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.data.images import ImageError, decode_image
from diffpref.data.pairs import PairDataset
from diffpref.data.schema import PairRow
from diffpref.evaluation.combine import RULES
from diffpref.evaluation.scoring import Score, score_pictures
from diffpref.evaluation.stats import wilson_interval
from diffpref.evaluation.work import missing_shards, shard_path, write_table
from diffpref.labelling.pairs import REJECTED_FILE, agreement, write_rejected


def score_pairs(
    folder: Path, pairs: PairDataset, shard_size: int, batch_size: int, scorers: Mapping[str, Score], rank: int = 0, world: int = 1
) -> None:
    """Write scored-<n>.parquet for this rank's shards of rows: index, problem (null if the row is good), <scorer>_0, <scorer>_1."""
    count = -(-len(pairs) // shard_size)
    with ThreadPoolExecutor() as pool:
        for number in missing_shards(folder, "scored", count, rank, world):
            index = list(range(number * shard_size, min((number + 1) * shard_size, len(pairs))))
            parts = [_score_rows(pairs, index[i : i + batch_size], scorers, pool) for i in range(0, len(index), batch_size)]
            write_table(shard_path(folder, "scored", number), pa.concat_tables(parts))


def _score_rows(pairs: PairDataset, index: Sequence[int], scorers: Mapping[str, Score], pool: ThreadPoolExecutor) -> pa.Table:
    found = list(pool.map(_decoded, [_row(pairs, i) for i in index]))
    problems = [content if isinstance(content, str) else None for content in found]
    good = [row for row, problem in enumerate(problems) if problem is None]
    pictures = [image for row in good for image in found[row]]
    scored = score_pictures(scorers, pictures, [pairs.prompts[index[row]] for row in good for _ in (0, 1)])
    for place, row in enumerate(good):
        problems[row] = next((f"jpg_{k}: {text}" for k in (0, 1) if (text := scored.problems[2 * place + k])), None)
    columns: dict[str, Any] = {"index": pa.array(index, pa.int64()), "problem": pa.array(problems, pa.string())}
    for name, values in scored.scores.items():
        both = np.full((len(index), 2), np.nan)
        both[good] = values.reshape(-1, 2)
        columns |= {f"{name}_{k}": pa.array(both[:, k], pa.float64()) for k in (0, 1)}
    return pa.table(columns)


def _row(pairs: PairDataset, index: int) -> PairRow | str:
    """A pair with its encoded pictures, or why they cannot be read."""
    try:
        return pairs.row(index)
    except ValueError as error:
        return f"image: {error.__cause__ or error}"  # the cause without its remedy, which is of another command


def _decoded(row: PairRow | str) -> tuple[Image.Image, Image.Image] | str:
    """Both pictures of a row, or what is wrong with one."""
    if isinstance(row, str):
        return row
    images = []
    for column, data in (("jpg_0", row.image_0), ("jpg_1", row.image_1)):
        try:
            images.append(decode_image(data))
        except ImageError as error:
            return f"{column}: {error}"
    return images[0], images[1]


def write_labels(
    folder: Path, pairs: PairDataset, num_shards: int, names: Sequence[str], rule: str | None, min_margin: float
) -> dict[str, Any]:
    """Write train-<n>.parquet: the pairs with their scores, and with `rule` also with the scorers' label; returns what they are like.

    With a rule, the human label moves to human_label_0 and human_label_1; undecided pairs become ties. Rows that cannot be read or
    scored are listed in rejected_rows.jsonl, those that were set aside on loading first. Raises ValueError if nothing is left.
    """
    tables = [pq.read_table(shard_path(folder, "scored", n)) for n in range(num_shards)]
    scored = pa.concat_tables(tables)
    problems = scored.column("problem").to_pylist()
    good = [row for row, problem in enumerate(problems) if problem is None]
    bad: list[tuple[int, str | None, str]] = [(r.row, r.pair_id, f"{r.column}: {r.reason}") for r in pairs.rejected]
    bad += [(int(pairs.rows[i]), pairs.pair_ids[i], problem) for i, problem in enumerate(problems) if problem]
    write_rejected(folder, bad)
    if not good:
        raise ValueError(f"none of {len(problems)} pairs could be scored; the reasons are in {folder / REJECTED_FILE}")
    scores = {name: np.stack([scored.column(f"{name}_{k}").to_numpy()[good] for k in (0, 1)], 1) for name in names}
    labels = pairs.p0[good]
    if rule:
        verdict = RULES[rule](scores)[:, 0, 1]
        labels = np.where(np.abs(verdict) < min_margin, 0.5, 0.5 + 0.5 * np.sign(verdict))
    first = 0
    for number, table in enumerate(tables):
        part = [k for k, row in enumerate(good) if first <= row < first + len(table)]
        rows = _rows(pairs, [good[k] for k in part], {n: x[part] for n, x in scores.items()}, labels[part], bool(rule))
        write_table(shard_path(folder, "train", number), rows)
        first += len(table)
    human = pairs.p0[good]
    return {
        "pairs": len(good),
        "rejected": len(bad),
        "reasons": dict(Counter(":".join(reason.split(":")[:2]) for _, _, reason in bad)),
        "ties": int((labels == 0.5).sum()),
        "rule": rule,
        "labels_changed": int((np.sign(labels - 0.5) != np.sign(human - 0.5)).sum()),
        "accuracy": {name: accuracy_with_interval(x, human) for name, x in scores.items()},
        "agreement_between_scorers": agreement(scores),
        "score_range": {name: [float(x.min()), float(x.max())] for name, x in scores.items()},
    }


def accuracy_with_interval(scores: np.ndarray, p0: np.ndarray) -> dict[str, float | int | list[float]]:
    """`pair_accuracy` with its 95 % interval and the number of pairs that it is of."""
    decided = int((p0 != 0.5).sum())
    share = pair_accuracy(scores, p0)
    interval = list(wilson_interval(share * decided, decided)) if decided else [0.0, 1.0]
    return {"value": share, "interval_95": interval, "pairs": decided, "equal_scores": int((scores[:, 0] == scores[:, 1]).sum())}


def pair_accuracy(scores: np.ndarray, p0: np.ndarray) -> float:
    """Share of the pairs with a winner that scores (N, 2) order as the label p0 (N,) does; equal scores count one half."""
    decided = p0 != 0.5
    sign = np.sign(scores[decided, 0] - scores[decided, 1]) * np.sign(p0[decided] - 0.5)
    return float((0.5 + 0.5 * sign).mean()) if decided.any() else float("nan")


def _rows(pairs: PairDataset, index: Sequence[int], scores: Mapping[str, np.ndarray], labels: np.ndarray, relabelled: bool) -> pa.Table:
    rows = [pairs.row(i) for i in index]
    columns: dict[str, Any] = {
        "caption": [row.prompt for row in rows],
        "jpg_0": pa.array([row.image_0 for row in rows], pa.binary()),
        "jpg_1": pa.array([row.image_1 for row in rows], pa.binary()),
        "label_0": pa.array(labels, pa.float64()),
        "label_1": pa.array(1 - labels, pa.float64()),
        "image_0_uid": [f"{row.pair_id}-0" for row in rows],
        "image_1_uid": [f"{row.pair_id}-1" for row in rows],
    }
    for name in ("ranking_id", "user_id", "model_0", "model_1"):
        if any(getattr(row, name) is not None for row in rows):
            columns[name] = pa.array([getattr(row, name) for row in rows], pa.string())
    for name, values in scores.items():
        columns |= {f"{name}_{k}": pa.array(values[:, k], pa.float64()) for k in (0, 1)}
    if relabelled:
        human = pairs.p0[list(index)]
        columns |= {"human_label_0": pa.array(human, pa.float64()), "human_label_1": pa.array(1 - human, pa.float64())}
    return pa.table(columns)
