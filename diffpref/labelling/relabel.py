"""Existing pairs, scored: columns <scorer>_0 and <scorer>_1 beside the human label, or in its place."""

from __future__ import annotations

import json
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
from diffpref.evaluation.work import missing_shards, shard_path, write_table, write_text
from diffpref.labelling.combine import RULES
from diffpref.labelling.pairs import Score, agreement


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
    found = list(pool.map(_decoded, [pairs.row(i) for i in index]))
    good = [row for row, content in enumerate(found) if not isinstance(content, str)]
    pictures = [image for row in good for image in found[row]]
    texts = [pairs.prompts[index[row]] for row in good for _ in (0, 1)]
    columns: dict[str, Any] = {
        "index": pa.array(index, pa.int64()),
        "problem": pa.array([content if isinstance(content, str) else None for content in found], pa.string()),
    }
    for name, score in scorers.items():
        values = np.full((len(index), 2), np.nan)
        if good:
            values[good] = np.asarray(score(pictures, texts), dtype=np.float64).reshape(-1, 2)
        columns |= {f"{name}_{k}": pa.array(values[:, k], pa.float64()) for k in (0, 1)}
    return pa.table(columns)


def _decoded(row: PairRow) -> tuple[Image.Image, Image.Image] | str:
    """Both pictures of a row, or what is wrong with one."""
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
    """Write train-<n>.parquet: the pairs with their scores, and with `rule` also with the scorers' label.

    With a rule, the human label moves to human_label_0 and human_label_1; undecided pairs become ties. Rows with a picture that
    cannot be read are listed in rejected_rows.jsonl. Returns and stores label_report.json. Raises ValueError if nothing is left.
    """
    scored = pa.concat_tables([pq.read_table(shard_path(folder, "scored", n)) for n in range(num_shards)])
    problems = scored.column("problem").to_pylist()
    good = [row for row, problem in enumerate(problems) if problem is None]
    bad = [{"row": i, "pair_id": pairs.pair_ids[i], "reason": problem} for i, problem in enumerate(problems) if problem]
    write_text(folder / "rejected_rows.jsonl", "".join(json.dumps(row) + "\n" for row in bad))
    if not good:
        raise ValueError(f"none of {len(problems)} pairs could be scored; the reasons are in {folder / 'rejected_rows.jsonl'}")
    scores = {name: np.stack([scored.column(f"{name}_{k}").to_numpy()[good] for k in (0, 1)], 1) for name in names}
    labels = pairs.p0[good]
    if rule:
        verdict = RULES[rule](scores)[:, 0, 1]
        labels = np.where(np.abs(verdict) < min_margin, 0.5, 0.5 + 0.5 * np.sign(verdict))
    size = -(-len(problems) // num_shards)
    for number in range(num_shards):
        part = [k for k, row in enumerate(good) if number * size <= row < (number + 1) * size]
        write_table(
            shard_path(folder, "train", number),
            _rows(pairs, [good[k] for k in part], {n: x[part] for n, x in scores.items()}, labels[part], bool(rule)),
        )
    report = {
        "pairs": len(good),
        "rejected": len(bad),
        "reasons": dict(Counter(str(row["reason"]).split(":")[1].strip() for row in bad)),
        "ties": int((labels == 0.5).sum()),
        "rule": rule,
        "agreement_with_the_label": {name: pair_accuracy(x, pairs.p0[good]) for name, x in scores.items()},
        "agreement_between_scorers": agreement(scores),
    }
    write_text(folder / "label_report.json", json.dumps(report, indent=1))
    return report


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
