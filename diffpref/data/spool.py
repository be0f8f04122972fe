"""The files into which a stream of pairs is followed: written by one thread, read by all who wait for pairs.

They are the whole state. A run that goes on later, other ranks and other runs with the same settings find what is there; the stream
is then read again from its start up to where the files end, without a look at the rows before.
"""

from __future__ import annotations

import atexit
import bisect
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import IterableDataset
from filelock import FileLock, Timeout

from diffpref.data.reading import Request
from diffpref.data.rows import ListRows, plain_lists
from diffpref.data.scan import Scan, check_share, scan
from diffpref.data.schema import Rejected, number_problem
from diffpref.data.stored import image_bytes
from diffpref.data.tables import PairTable, optional_text, pair_table

WINDOW = 1024
"""Pairs within which the order of the first pass is shuffled; training begins when so many have arrived."""

_FILE_PAIRS = 256  # about a hundred megabytes
_CHUNK = 64  # rows of the stream in memory at once
_TEXTS = ("ranking_id", "user_id", "model_0", "model_1")
_TYPES: dict[str, Any] = {name: pa.string() for name in ("pair_id", "caption", *_TEXTS)}
_TYPES |= {"p0": pa.float64(), "margin": pa.float64(), "jpg_0": pa.large_binary(), "jpg_1": pa.large_binary()}
_SCHEMA = pa.schema(_TYPES)

COLUMNS = tuple(_SCHEMA.names)
"""What is kept of a pair."""


class Spool:
    """The folder into which a stream is followed, seen by those who take rows from it. Files are added to it, never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.firsts: list[int] = []  # number of the first pair of each file
        self.tables: list[pa.Table] = []  # memory-mapped

    def __reduce__(self) -> tuple[type[Spool], tuple[Path]]:
        return Spool, (self.folder,)  # another process maps the files itself

    def refresh(self) -> None:
        """Take note of the files that have come since."""
        for path in sorted(self.folder.glob("pairs-*.arrow"))[len(self.tables) :]:
            self.tables.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
            self.firsts.append(int(path.stem.removeprefix("pairs-")))

    @property
    def size(self) -> int:
        """Number of pairs that are known to have arrived."""
        return self.firsts[-1] + len(self.tables[-1]) if self.tables else 0

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What the stream was like up to the end of each file; "rejected" has the rows of that file alone."""
        return [_facts(table) for table in self.tables]

    @property
    def has_ended(self) -> bool:
        """Whether the stream has no more pairs than these."""
        return bool(self.tables) and bool(_facts(self.tables[-1])["ended"])

    @property
    def failure(self) -> Path:
        """Where it is written why the stream could not be followed."""
        return self.folder / "failure.txt"

    def wait(self, pair: int) -> None:
        """Return when `pair` has arrived or the stream has ended.

        Raises:
            ValueError: the stream could not be followed.
        """
        while self.size <= pair:
            self.refresh()
            if self.size > pair or self.has_ended:
                return
            if self.failure.exists():
                raise ValueError(self.failure.read_text(encoding="utf-8"))
            time.sleep(0.1)

    def values(self, pair: int, names: Sequence[str]) -> dict[str, Any]:
        """Columns of a pair that has arrived."""
        place = bisect.bisect_right(self.firsts, pair) - 1
        return {name: self.tables[place].column(name)[pair - self.firsts[place]].as_py() for name in names}


def _facts(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.schema.metadata[b"facts"])
    return found


class Follower(threading.Thread):
    """Writes a stream into its spool. Of all processes that have one for the same spool, one works and the others stand by."""

    def __init__(self, folder: Path, request: Request, open_stream: Callable[[], IterableDataset], roots: tuple[Path, ...]) -> None:
        super().__init__(name="pairs of a stream", daemon=True)
        self.spool = Spool(folder)  # its own: threads share nothing but the files
        self.request, self.open_stream, self.roots = request, open_stream, roots
        self.stopped = threading.Event()
        self.found = Scan()

    def start(self) -> None:
        """Start, and end with the process."""
        self.spool.failure.unlink(missing_ok=True)
        atexit.register(self.stop)
        super().start()

    def stop(self) -> None:
        """Let the thread end after the chunk that it is at."""
        self.stopped.set()
        self.join(timeout=10)

    def run(self) -> None:
        """Follow the stream until there are enough pairs, it ends or the process does."""
        lock = FileLock(self.spool.folder / "lock")
        while not self.stopped.is_set():
            try:
                with lock.acquire(timeout=1):
                    self._follow()
                return
            except Timeout:
                continue
            except Exception as error:
                # Whatever went wrong here is raised where a row is waited for, perhaps in another process.
                text = f"following the stream failed ({type(error).__name__}: {error}); what has arrived is kept, start again to go on"
                self.spool.failure.write_text(str(error) if isinstance(error, ValueError) else text, encoding="utf-8")
                return

    def _follow(self) -> None:
        for path in self.spool.folder.glob(".pairs-*"):
            path.unlink()
        rows_before, reported = self._recall()
        pending: list[pa.RecordBatch] = []
        rows, form = rows_before, ""
        if self._has_enough or self.spool.has_ended:
            return
        for rows, form, batch in self._batches(rows_before):
            pending.append(batch)
            if self._has_enough or sum(map(len, pending)) >= _FILE_PAIRS:
                self._write(pending, rows, form, reported, ended=False)
                pending, reported = [], len(self.found.rejected)
            if self._has_enough or self.stopped.is_set():
                return
        check_share(self.found)
        self._write(pending, rows, form, reported, ended=True)

    @property
    def _has_enough(self) -> bool:
        return len(self.found.pair_ids) >= int(self.request.max_samples or 0)

    def _recall(self) -> tuple[int, int]:
        """Take up what an earlier process left: (rows of the stream that it has read, rows that it has set aside)."""
        self.spool.refresh()
        if not self.spool.tables:
            return 0, 0
        facts, found = self.spool.facts, self.found
        found.ties, found.examined, found.left_out = facts[-1]["ties"], facts[-1]["examined"], facts[-1]["left_out"]
        found.rejected = [Rejected(**entry) for part in facts for entry in part["rejected"]]
        found.pair_ids = [str(pair_id) for table in self.spool.tables for pair_id in table.column("pair_id").to_pylist()]
        found.seen = Counter(pair_id.partition("-")[0] for pair_id in found.pair_ids)
        return int(facts[-1]["rows"]), len(found.rejected)

    def _batches(self, rows_before: int) -> Iterator[tuple[int, str, pa.RecordBatch]]:
        """(rows read so far, form, pairs) of each chunk of the stream after the first `rows_before` rows."""
        rows, request = 0, self.request
        for chunk in _undecoded(self.open_stream()).iter(batch_size=_CHUNK):
            columns = plain_lists(chunk)
            first, rows = rows, rows + len(next(iter(columns.values())))
            if rows <= rows_before:
                continue
            source = ListRows(columns, rows - first, roots=self.roots)
            layout = request.layout(source.names, "the stream")
            if layout.form == "ranked" and not source.holds_lists(layout.columns["images"]):
                raise ValueError(
                    "streaming is true, but the rows of a ranked list do not lie in one row of the stream; set streaming to false"
                )
            if layout.form in ("labelled", "captions"):
                raise ValueError(f"streaming is true, but the rows have the form {layout.form}, which is not streamed; set it to false")
            table = pair_table(source, layout, request.ranked_pairs, request.choice_model, request.dreamlike_pairs_only)
            before = len(self.found.pair_ids)
            self.found.pairs, self.found.verdicts = [], {}  # positions in the chunk
            scan(table, request.tie_policy, None, request.check_images, self.found, first)
            if len(self.found.rejected) and self.found.examined >= WINDOW:
                check_share(self.found)
            yield rows, layout.describe(), _batch(table, self.found.pairs, self.found.pair_ids[before:])

    def _write(self, batches: list[pa.RecordBatch], rows: int, form: str, reported: int, ended: bool) -> None:
        found = self.found
        facts = {"rows": rows, "ties": found.ties, "examined": found.examined, "left_out": found.left_out, "form": form, "ended": ended}
        facts["rejected"] = [asdict(entry) for entry in found.rejected[reported:]]
        schema = _SCHEMA.with_metadata({"facts": json.dumps(facts)})
        first = len(found.pair_ids) - sum(map(len, batches))
        hidden = self.spool.folder / f".pairs-{os.getpid()}"
        with pa.OSFile(str(hidden), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        hidden.replace(self.spool.folder / f"pairs-{first:09d}.arrow")


def _undecoded(stream: IterableDataset) -> IterableDataset:
    """The stream with encoded images in place of decoded ones."""
    for name, feature in (stream.features or {}).items():
        element = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
        elif isinstance(element, datasets.Image):
            stream = stream.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return stream


def _batch(table: PairTable, pairs: list[int], pair_ids: Iterable[str]) -> pa.RecordBatch:
    """Pairs of a chunk as they stand in the spool."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for pair, pair_id, stored in zip(pairs, pair_ids, table.stored(pairs), strict=True):
        extra = table.extra(pair) | {"user_id": table.users[pair]}
        margin = extra.get("margin")
        row = {"pair_id": pair_id, "caption": table.captions[pair], "p0": float(table.p0[pair])}
        row |= {"jpg_0": image_bytes(stored[0]), "jpg_1": image_bytes(stored[1]), "margin": None if number_problem(margin) else margin}
        row |= {name: optional_text(extra.get(name)) for name in _TEXTS}
        for name, column in columns.items():
            column.append(row[name])
    return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)
