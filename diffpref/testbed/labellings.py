"""The testbed's regimes under other labels: the controls of the leaderboard, and labels by the testbed's own reward model.

Controls exchange the pictures of a row and leave everything else as it is, so that labels, ranks and scores say the wrong thing
alike and every method meets the same control, whatever it reads.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.core.random import permutation, uniform
from diffpref.testbed.pairs import make_pairs
from diffpref.testbed.scorer import shipped_scorer

SCORE = "testbed_pickscore"
_SEED = 0


def labelled_data(folder: Path, regime: str, labels: str, data: str, model: str, num_pairs: int, num_processes: int) -> Path:
    """Folder with the rows of a regime under other labels, made if it is not there.

    data: pairs or lists; labels: given, shuffled, inverted, or scorer (pairs only), which are the higher scores.
    """
    made = folder / f"{regime}-{labels}-{data}"
    path = made / "train.parquet"
    if not path.exists():
        table = _rows(folder, regime, data, model, num_pairs, num_processes)
        made.mkdir(parents=True, exist_ok=True)
        hidden = path.with_suffix(".part")
        pq.write_table(relabelled(table, labels), hidden, compression="zstd")
        hidden.replace(path)
    return made


def _rows(folder: Path, regime: str, data: str, model: str, num_pairs: int, num_processes: int) -> pa.Table:
    """Pairs with the scores of the testbed's reward model, or lists, of a regime; sampled if they are not there."""
    source = folder / (f"{regime}.parquet" if data == "pairs" else f"{regime}_lists.parquet")
    if not source.exists():
        make_pairs(regime, model, num_pairs, _SEED, num_processes, folder)
    table = pq.read_table(source)
    return with_scores(table) if data == "pairs" else table


def with_scores(table: pa.Table) -> pa.Table:
    """Pairs in the Pick-a-Pic schema with columns testbed_pickscore_0 and testbed_pickscore_1."""
    scorer, prompts = shipped_scorer(), table.column("caption").to_pylist()
    for k in (0, 1):
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in table.column(f"jpg_{k}").to_pylist()]
        scores = np.concatenate(
            [np.asarray(scorer(pictures[i : i + 100], prompts[i : i + 100]), np.float64) for i in range(0, len(pictures), 100)]
        )
        table = table.append_column(f"{SCORE}_{k}", pa.array(scores, pa.float64()))
    return table


def relabelled(table: pa.Table, labels: str) -> pa.Table:
    """The same rows under other labels. Raises ValueError for labels that are not known or not there for lists."""
    if labels == "given":
        return table
    if labels in ("shuffled", "inverted"):
        return _exchanged(table, labels) if "jpg_0" in table.column_names else _reordered(table, labels)
    if labels != "scorer" or f"{SCORE}_0" not in table.column_names:
        raise ValueError(f"labels are {labels!r}; accepted: given, shuffled, inverted, and for pairs with scores scorer")
    difference = table.column(f"{SCORE}_0").to_numpy() - table.column(f"{SCORE}_1").to_numpy()
    p0 = 0.5 + 0.5 * np.sign(difference)
    for k, values in ((0, p0), (1, 1 - p0)):
        table = table.set_column(table.column_names.index(f"label_{k}"), f"label_{k}", pa.array(values, pa.float64()))
    return table


def _exchanged(table: pa.Table, labels: str) -> pa.Table:
    """Pairs with their pictures exchanged: all of them, or each with probability one half."""
    coins = np.array([labels == "inverted" or uniform(_SEED, "control_labels", i) < 0.5 for i in range(len(table))])
    pictures = [table.column(f"jpg_{k}").to_pylist() for k in (0, 1)]
    for k in (0, 1):
        mixed = [pictures[1 - k if coin else k][i] for i, coin in enumerate(coins)]
        table = table.set_column(table.column_names.index(f"jpg_{k}"), f"jpg_{k}", pa.array(mixed, pa.binary()))
    return table


def _reordered(table: pa.Table, labels: str) -> pa.Table:
    """Lists whose pictures stand at the ranks in reversed order of rank, or in random order."""
    ranks, lists = table.column("ranks").to_pylist(), table.column("images").to_pylist()
    mixed = []
    for i, (rank, images) in enumerate(zip(ranks, lists, strict=True)):
        by_rank = np.argsort(rank, kind="stable")  # best first
        source = by_rank[::-1] if labels == "inverted" else by_rank[permutation(len(rank), _SEED, "control_labels", i).numpy()]
        moved = dict(zip(by_rank.tolist(), source.tolist(), strict=True))
        mixed.append([images[moved[k]] for k in range(len(images))])
    return table.set_column(table.column_names.index("images"), "images", pa.array(mixed, pa.list_(pa.binary())))
