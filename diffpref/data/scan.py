"""The single pass over a table that decides which rows become pairs, in file order."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from diffpref.data.images import ImageError, decode_image
from diffpref.data.schema import (
    IMAGE_COLUMNS,
    Problem,
    Rejected,
    TiePolicy,
    caption_problem,
    is_tie,
    pair_id_from_content,
    pair_id_from_uids,
)
from diffpref.data.stored import image_bytes
from diffpref.data.tables import PairTable

BAD_ROWS_ALWAYS_ALLOWED = 10
BAD_SHARE_LIMIT = 0.01

_CHUNK = 64  # pairs whose images are in memory at once


class BadRowsError(ValueError):
    """Too many rows were set aside; `rejected` lists them."""

    def __init__(self, message: str, rejected: list[Rejected] | None = None) -> None:
        super().__init__(message)
        self.rejected = rejected or []


Verdict = tuple[str | None, Problem | None]
"""What the images of a pair tell: an id made of their content (None if the source names them), and why they are refused."""


@dataclass
class Scan:
    """What a pass over the pairs found. Lists of accepted pairs run in parallel."""

    pairs: list[int] = field(default_factory=list)  # positions in the table
    pair_ids: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ties: int = 0
    left_out: int = 0
    examined: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # of the pairs whose images were looked at, now or before


def scan(
    table: PairTable,
    tie_policy: TiePolicy,
    max_samples: int | None,
    check_images: bool,
    result: Scan | None = None,
    first_row: int = 0,
) -> Scan:
    """Go through the pairs until `max_samples` are accepted or the table ends.

    Images are read for pairs whose images have no names, whose id is a hash of the content, and for all when `check_images` is
    set; not where `result` brings a verdict along. Decoding runs in threads; the result does not depend on their number.

    `result` goes on with an earlier pass, `first_row` is the number of rows before this table; both are for tables in parts.

    Raises:
        ValueError: `tie_policy` is "error" and there is a tie.
    """
    result = result or Scan()
    candidates = _candidates(table, tie_policy, result, first_row)
    # Decoding a large data set takes hours; a process that says nothing for so long looks hung.
    bar = tqdm(total=len(table), desc="checking images (check_images)", unit="pair", delay=5, mininterval=2, leave=False)
    with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while chunk := list(itertools.islice(candidates, _CHUNK)):
            for pair, verdict in zip(chunk, _verdicts(table, chunk, check_images, result, pool.map), strict=True):
                _record(table, result, pair, verdict, first_row)
                if len(result.pair_ids) == max_samples:
                    return result
            bar.update(chunk[-1] + 1 - bar.n)
    return result


def _candidates(table: PairTable, tie_policy: TiePolicy, result: Scan, first_row: int) -> Iterator[int]:
    """Pairs with valid caption and labels that the tie policy keeps; the others are counted in `result`."""
    for pair in range(len(table)):
        if table.left_out is not None and table.left_out[pair]:
            result.left_out += 1
            continue
        result.examined += 1
        problem = table.problems.get(pair)
        if problem is None and (reason := caption_problem(table.captions[pair])) is not None:
            problem = "caption", reason
        row = first_row + table.source_row(pair)
        if problem is not None:
            uids = table.uids[pair]
            result.rejected.append(Rejected(row, pair_id_from_uids(*uids) if uids else None, *problem))
            continue
        tie = is_tie(float(table.p0[pair]))
        result.ties += tie
        if tie_policy == "error" and tie:
            raise ValueError(f"row {row} is a tie and tie_policy is 'error', accepted for data with ties: drop, keep")
        if not (tie_policy == "drop" and tie):
            yield pair


def _verdicts(
    table: PairTable, chunk: list[int], check_images: bool, result: Scan, run: Callable[..., Iterator[Verdict]]
) -> Iterator[Verdict]:
    """One verdict per pair, in order."""
    needed = [pair for pair in chunk if (check_images or table.uids[pair] is None) and pair not in result.verdicts]
    stored = table.stored(needed) if needed else []
    captions, named = [str(table.captions[pair]) for pair in needed], [table.uids[pair] is not None for pair in needed]
    result.verdicts.update(zip(needed, run(_inspect, captions, named, stored, itertools.repeat(check_images)), strict=True))
    return (result.verdicts.get(pair, (None, None)) for pair in chunk)


def _inspect(caption: str, named: bool, stored: tuple[object, ...], check_images: bool) -> Verdict:
    images = []
    for column, value in zip(IMAGE_COLUMNS, stored, strict=False):
        try:
            images.append(image_bytes(value))
            if check_images:
                decode_image(images[-1])
        except ImageError as error:
            return None, (column, str(error))
    if len(images) == 2 and images[0] == images[1]:
        return None, ("jpg_1", "identical images: the files are equal byte for byte")
    return None if named else pair_id_from_content(caption, *images), None


def _record(table: PairTable, result: Scan, pair: int, verdict: Verdict, first_row: int) -> None:
    uids = table.uids[pair]
    pair_id, problem = pair_id_from_uids(*uids) if uids else verdict[0], verdict[1]
    if uids and len(uids) == 2 and uids[0] == uids[1]:
        problem = "image_1_uid", "identical images: both have the same name"
    if problem is not None:
        result.rejected.append(Rejected(first_row + table.source_row(pair), pair_id, *problem))
        return
    assert pair_id is not None
    result.seen[pair_id] += 1
    # A pair that was judged twice stays twice in the data; draws are keyed by the id, so each needs its own.
    result.pair_ids.append(pair_id if result.seen[pair_id] == 1 else f"{pair_id}-{result.seen[pair_id]}")
    result.pairs.append(pair)


def check_share(result: Scan) -> None:
    """Stop when the data is worse than a few damaged rows explain.

    Raises:
        BadRowsError: no rows, no pair left, or more than 10 bad rows that are also more than 1 % of those examined.
    """
    bad, examined = len(result.rejected), result.examined
    if examined == 0 and result.left_out:
        raise BadRowsError(f"dreamlike_pairs_only leaves none of {result.left_out} pairs; drop the flag or use other data")
    if examined == 0:
        raise BadRowsError("the dataset has 0 rows, accepted: 1 or more; check the source and the split")
    if not result.pair_ids and not bad:
        raise BadRowsError(f"all {examined} rows are ties and tie_policy is 'drop'; set tie_policy to keep, or use other data")
    if not result.pair_ids:
        raise BadRowsError(f"none of {examined} rows can be used ({result.ties} ties):\n{reasons(result.rejected)}", result.rejected)
    if bad > BAD_ROWS_ALWAYS_ALLOWED and bad > BAD_SHARE_LIMIT * examined:
        raise BadRowsError(
            f"{bad} of {examined} rows ({100 * bad / examined:.1f} %) are bad, accepted: {BAD_ROWS_ALWAYS_ALLOWED} rows or "
            f"{100 * BAD_SHARE_LIMIT:g} %; repair or remove them:\n{reasons(result.rejected)}",
            result.rejected,
        )


def reasons(rejected: list[Rejected]) -> str:
    """A table with one line per column and kind of reason: count, first row, an example."""
    groups: dict[tuple[str, str], list[Rejected]] = {}
    for entry in sorted(rejected, key=lambda entry: entry.row):
        groups.setdefault((entry.column, entry.kind), []).append(entry)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [f"{len(found):>8}  {column:<12} {found[0].reason[:80]} (first: row {found[0].row})" for (column, _), found in ordered]
    return "\n".join([f"{'rows':>8}  {'column':<12} reason", *lines])
