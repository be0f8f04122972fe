"""Preference pairs as a map-style dataset: labels checked, bad rows set aside, image bytes read when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from datasets import Dataset

from diffpref.core.random import uniform
from diffpref.data.images import ImageError
from diffpref.data.scan import BadRowsError, TiePolicy, check_share, image_bytes, optional_text, scan
from diffpref.data.schema import PairRow, Rejected
from diffpref.data.tables import Source, open_table


@dataclass(frozen=True, eq=False)
class PairDataset:
    """N pairs over a memory-mapped table. Everything but the images is in memory; `load_pairs` makes one."""

    table: Dataset  # M >= N rows in Arrow format, column names of schema.py
    rows: np.ndarray  # (N,) int64, position of each pair in `table`
    pair_ids: list[str]  # (N,) unique
    prompts: list[str]  # (N,)
    p0: np.ndarray  # (N,) float64, probability that image 0 is better
    user_ids: list[str | None]  # (N,)
    rejected: list[Rejected]  # rows set aside when the source was read
    ties: int  # ties among the valid rows, before the tie policy acted

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> PairRow:
        """Pair `index` with its encoded images, read now.

        Raises:
            IndexError: `index` is not in 0..N-1.
            ValueError: an image is no bytes; only possible when the images were not checked on loading.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair index is {index}, accepted: 0..{len(self) - 1}")
        stored = self.table[[int(self.rows[index])]].to_pylist()[0]
        try:
            image_0, image_1 = image_bytes(stored["jpg_0"]), image_bytes(stored["jpg_1"])
        except ImageError as error:
            raise ValueError(
                f"pair {self.pair_ids[index]} (row {int(self.rows[index])}): image is {error}; load with check_images=True to set it aside"
            ) from error
        extra = {name: optional_text(stored.get(name)) for name in ("ranking_id", "user_id", "model_0", "model_1")}
        return PairRow(self.pair_ids[index], self.prompts[index], image_0, image_1, float(self.p0[index]), **extra)

    def select(self, indices: Iterable[int]) -> PairDataset:
        """The pairs at `indices`, in that order. `rejected` and `ties` still describe the source."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            pair_ids=[self.pair_ids[index] for index in chosen],
            prompts=[self.prompts[index] for index in chosen],
            p0=self.p0[chosen],
            user_ids=[self.user_ids[index] for index in chosen],
        )

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over the pair ids and p0, in order: equal for equal data, wherever it lies."""
        digest = hashlib.blake2b("\n".join(self.pair_ids).encode(), digest_size=16)
        digest.update(b"\0" + np.ascontiguousarray(self.p0, dtype="<f8").tobytes())
        return digest.hexdigest()


def load_pairs(
    source: Source,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    tie_policy: TiePolicy = "drop",
    max_samples: int | None = None,
    check_images: bool = True,
    cache_dir: str | Path | None = None,
) -> PairDataset:
    """Read pairs, check every row and set the bad ones aside.

    `source`: a parquet file, a folder of parquet files (those of `split` by the start of their names, all if none fits), a
    `save_to_disk` folder, a hub id, or a table in memory. `columns` maps our names (Pick-a-Pic v2) to those in the data.
    `tie_policy` decides about p0 = 0.5. `max_samples` stops after that many accepted pairs, in file order. `check_images`
    decodes every image once; without it a damaged image shows up only when it is used.

    Raises:
        ValueError: a setting is wrong, or the source cannot be read or lacks columns.
        BadRowsError: (a ValueError) there are no pairs, or more than 10 rows and more than 1 % of them are bad.
    """
    if tie_policy not in get_args(TiePolicy):
        raise ValueError(f"tie_policy is {tie_policy!r}, accepted: {', '.join(get_args(TiePolicy))}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}, accepted: 1 or more, or None for all")
    table = open_table(source, split, columns, cache_dir)
    found = scan(table, tie_policy, max_samples, check_images)
    check_share(found)
    return PairDataset(
        table=table,
        rows=np.array([candidate.row for candidate in found.accepted], dtype=np.int64),
        pair_ids=found.pair_ids,
        prompts=[candidate.prompt for candidate in found.accepted],
        p0=np.array([candidate.p0 for candidate in found.accepted], dtype=np.float64),
        user_ids=[candidate.user_id for candidate in found.accepted],
        rejected=sorted(found.rejected, key=lambda entry: entry.row),
        ties=found.ties,
    )


def write_rejected(dataset: PairDataset | BadRowsError, path: str | Path) -> None:
    """Write the rows that were set aside as JSON lines: row, pair_id, column, reason. A BadRowsError has them too."""
    lines = (json.dumps(asdict(entry)) + "\n" for entry in dataset.rejected)
    Path(path).write_text("".join(lines), encoding="utf-8")


def split_held_out(dataset: PairDataset, num_pairs: int, seed: int) -> tuple[PairDataset, PairDataset]:
    """(train, held out): whole prompts are held out, in a keyed random order, until at least `num_pairs` pairs are.

    Prompts that differ only in case or white space count as one, so that none is on both sides. Both sides keep the order of
    `dataset`.

    Raises:
        ValueError: `num_pairs` is negative, or nothing would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(dataset.prompts):
        groups.setdefault(" ".join(prompt.casefold().split()), []).append(index)
    held: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: (uniform(seed, "held_out", prompt), prompt)):
        if len(held) >= num_pairs:
            break
        held.update(groups[prompt])
    if num_pairs < 0 or len(held) == len(dataset):
        raise ValueError(
            f"num_pairs is {num_pairs}, accepted: 0 or more, leaving at least one prompt to train on; the dataset has {len(dataset)} "
            f"pairs of {len(groups)} prompts, and all pairs of a prompt are held out together"
        )
    train = (index for index in range(len(dataset)) if index not in held)
    return dataset.select(train), dataset.select(sorted(held))
