"""The single pass over a table that decides which rows become pairs, in file order."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset

from diffpref.data.images import ImageError, decode_image
from diffpref.data.schema import IMAGE_COLUMNS, Rejected, is_tie, pair_id_from_content, pair_id_from_uids, row_problem
from diffpref.data.tables import encoded_images, metadata

TiePolicy = Literal["drop", "keep", "error"]

BAD_ROWS_ALWAYS_ALLOWED = 10
BAD_SHARE_LIMIT = 0.01

_CHUNK = 64  # rows whose images are in memory at once


class BadRowsError(ValueError):
    """Too many rows were set aside; `rejected` lists them."""

    def __init__(self, message: str, rejected: list[Rejected] | None = None) -> None:
        super().__init__(message)
        self.rejected = rejected or []


@dataclass(frozen=True)
class Candidate:
    """A row whose caption and labels hold; its images are not looked at yet."""

    row: int
    prompt: str
    p0: float
    uids: tuple[str, str] | None
    user_id: str | None


@dataclass
class Scan:
    """What a pass over the rows found. Lists of accepted pairs run in parallel."""

    accepted: list[Candidate] = field(default_factory=list)
    pair_ids: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ties: int = 0
    examined: int = 0


Finding = tuple[str | None, tuple[str, str] | None]  # (pair id, (column, reason) if the images are refused)


def scan(table: Dataset, tie_policy: TiePolicy, max_samples: int | None, check_images: bool) -> Scan:
    """Go through the rows until `max_samples` pairs are accepted or the table ends.

    Images are read for rows without uids, whose id is a hash of the content, and for all rows when `check_images` is set.
    Decoding runs in threads; the result does not depend on their number.

    Raises:
        ValueError: `tie_policy` is "error" and there is a tie.
    """
    result, seen = Scan(), Counter[str]()
    candidates = _candidates(table, tie_policy, result)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while chunk := list(itertools.islice(candidates, _CHUNK)):
            findings = _findings(table, chunk, check_images, pool.map)
            for candidate, finding in zip(chunk, findings, strict=True):
                _record(result, seen, candidate, finding)
                if len(result.accepted) == max_samples:
                    return result
    return result


def _candidates(table: Dataset, tie_policy: TiePolicy, result: Scan) -> Iterator[Candidate]:
    """Rows with valid caption and labels that the tie policy keeps; the others are counted in `result`."""
    columns = metadata(table)
    absent: list[object] = [None] * len(table)
    uids_0, uids_1 = columns.get("image_0_uid", absent), columns.get("image_1_uid", absent)
    users = columns.get("user_id", absent)
    for row, (caption, label_0, label_1) in enumerate(zip(columns["caption"], columns["label_0"], columns["label_1"], strict=True)):
        result.examined += 1
        uids = None if uids_0[row] is None or uids_1[row] is None else (str(uids_0[row]), str(uids_1[row]))
        problem = row_problem(caption, label_0, label_1)
        if problem is not None:
            result.rejected.append(Rejected(row, pair_id_from_uids(*uids) if uids else None, *problem))
            continue
        p0 = float(label_0)  # type: ignore[arg-type]  # row_problem has checked that it is a number
        result.ties += is_tie(p0)
        if tie_policy == "error" and is_tie(p0):
            raise ValueError(f"row {row} is a tie and tie_policy is 'error', accepted for data with ties: drop, keep")
        if not (tie_policy == "drop" and is_tie(p0)):
            yield Candidate(row, str(caption), p0, uids, optional_text(users[row]))


def _findings(table: Dataset, chunk: list[Candidate], check_images: bool, run: Callable[..., Iterator[Finding]]) -> list[Finding]:
    """One finding per candidate, in order. Bytes are read here, in one thread, because only decoding is worth sharing out."""
    needed = [candidate.row for candidate in chunk if check_images or candidate.uids is None]
    stored = dict(zip(needed, encoded_images(table, needed), strict=True)) if needed else {}
    return list(run(_inspect, chunk, [stored.get(candidate.row) for candidate in chunk], itertools.repeat(check_images)))


def _inspect(candidate: Candidate, stored: tuple[object, object] | None, check_images: bool) -> Finding:
    pair_id = pair_id_from_uids(*candidate.uids) if candidate.uids else None
    if candidate.uids and candidate.uids[0] == candidate.uids[1]:
        return pair_id, ("image_1_uid", "identical images: both have the same uid")
    if stored is None:
        return pair_id, None
    images = []
    for column, value in zip(IMAGE_COLUMNS, stored, strict=True):
        try:
            images.append(image_bytes(value))
            if check_images:
                decode_image(images[-1])
        except ImageError as error:
            return pair_id, (column, str(error))
    if images[0] == images[1]:
        return pair_id, ("jpg_1", "identical images: the files are equal byte for byte")
    return pair_id or pair_id_from_content(candidate.prompt, *images), None


def _record(result: Scan, seen: Counter[str], candidate: Candidate, finding: Finding) -> None:
    pair_id, problem = finding
    if problem is not None:
        result.rejected.append(Rejected(candidate.row, pair_id, *problem))
        return
    assert pair_id is not None
    seen[pair_id] += 1
    # A pair that was judged twice stays twice in the data; draws are keyed by the id, so each needs its own.
    result.pair_ids.append(pair_id if seen[pair_id] == 1 else f"{pair_id}-{seen[pair_id]}")
    result.accepted.append(candidate)


def image_bytes(value: object) -> bytes:
    """The encoded bytes of a stored image: bytes, or a dict with "bytes" (the Image feature of `datasets`).

    Raises:
        ImageError: anything else. Paths are refused: a data file must not decide which local files are opened.
    """
    if isinstance(value, dict):
        inner = value.get("bytes")
        if inner is None and value.get("path"):
            raise ImageError("only a path, no bytes: store the encoded image in the row")
        value = inner
    if value is None:
        raise ImageError("null")
    if not isinstance(value, bytes):
        raise ImageError(f"not bytes: {type(value).__name__}")
    return value


def optional_text(value: object) -> str | None:
    """`value` as text; ids are integers in some data sets."""
    return None if value is None else str(value)


def check_share(result: Scan) -> None:
    """Stop when the data is worse than a few damaged rows explain.

    Raises:
        BadRowsError: no rows, no pair left, or more than 10 bad rows that are also more than 1 % of those examined.
    """
    bad, examined = len(result.rejected), result.examined
    if examined == 0:
        raise BadRowsError("the dataset has 0 rows, accepted: 1 or more; check the source and the split")
    if not result.accepted and not bad:
        raise BadRowsError(f"all {examined} rows are ties and tie_policy is 'drop'; use tie_policy='keep' or other data")
    if not result.accepted:
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
