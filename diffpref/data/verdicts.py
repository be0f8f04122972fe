"""What the images of a data set turned out to be, kept from one start to the next: decoding all of them takes long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from diffpref.data.images import DEFAULT_LIMITS, FORMATS
from diffpref.data.rows import digest_of
from diffpref.data.scan import Verdict
from diffpref.data.tables import PairTable

_VERSION = 1  # of the decoder's rules; a change of what it refuses asks for another


@contextmanager
def kept_verdicts(table: PairTable, check_images: bool, store: Path) -> Iterator[dict[int, Verdict]]:
    """The verdicts that an earlier pass left in `store`, by position in `table`; what is added to them is kept in turn.

    They count as long as the files of the data (size, time of change), the rules of the decoder and its version are the same.
    Processes that start together take turns, so that one does the work. An interrupted pass keeps what it has seen. Nothing is
    kept for tables in memory.
    """
    known: dict[int, Verdict] = {}
    path = _path(table, check_images, store)
    lock = _locked(path)
    if path is None or lock is None:
        yield known
        return
    try:
        known |= _load(path)
        before = len(known)
        try:
            yield known
        finally:
            if len(known) > before:
                _save(path, known)
    finally:
        lock.release()


def _path(table: PairTable, check_images: bool, store: Path) -> Path | None:
    if not check_images and None not in table.uids:
        return None
    identity = table.identity()
    if identity is None:
        return None
    picks = None if table.picks is None else digest_of(table.picks.tobytes())
    rules = (_VERSION, check_images, DEFAULT_LIMITS, FORMATS, PIL.__version__)
    return store / "checked" / f"{digest_of(rules, identity, table.layout.form, sorted(table.layout.columns.items()), picks)}.parquet"


def _locked(path: Path | None) -> FileLock | None:
    """The lock of `path`, held; None where nothing can be kept."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except (OSError, NotImplementedError):  # a read-only cache, or a file system without locks
        return None
    return lock


def _load(path: Path) -> dict[int, Verdict]:
    try:
        found = pq.read_table(path).to_pydict()
        rows = zip(found["pair"], found["content_id"], found["column"], found["reason"], strict=True)
        return {pair: (content_id, (column, reason) if reason is not None else None) for pair, content_id, column, reason in rows}
    except (OSError, KeyError, pa.ArrowException):  # not there, or damaged: the images are looked at again
        return {}


def _save(path: Path, known: dict[int, Verdict]) -> None:
    problems = [problem or (None, None) for _, problem in known.values()]
    columns: dict[str, pa.Array] = {
        "pair": pa.array(list(known), pa.int64()),
        "content_id": pa.array([content_id for content_id, _ in known.values()], pa.string()),
        "column": pa.array([column for column, _ in problems], pa.string()),
        "reason": pa.array([reason.encode("utf-8", "replace").decode() if reason else reason for _, reason in problems], pa.string()),
    }
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.table(columns), hidden)
        hidden.replace(path)
    except OSError:
        hidden.unlink(missing_ok=True)  # a full disk costs time at the next start, nothing else
