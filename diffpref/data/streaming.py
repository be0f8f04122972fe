"""Pairs that are read while training, in the order of their stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset

from diffpref.core.random import permutation
from diffpref.data.pairs import PairDataset
from diffpref.data.reading import PLACES, Request, find_files, hub_error
from diffpref.data.rows import digest_of, files_identity
from diffpref.data.sampler import PairSampler
from diffpref.data.schema import PairRow, Rejected
from diffpref.data.spool import COLUMNS, WINDOW, Follower, Spool

_VERSION = 1  # of what stands in the files of a spool


class StreamedPairs(PairDataset):
    """N pairs of a stream, by number, the first pass in the order in which they arrive.

    A pair is waited for. A stream that ends early begins again, its pairs under other ids. What needs all pairs at once is refused.
    """

    spool: Spool
    num_pairs: int
    order: np.ndarray  # (N,) int64, see `arrival_order`

    def __init__(self, spool: Spool, num_pairs: int, seed: int, fingerprint: str) -> None:
        values = {name: Arriving(self, column) for name, column in _BY_INDEX.items()}
        self.__dict__.update(
            values, scores=NoScores(), spool=spool, num_pairs=num_pairs, order=arrival_order(num_pairs, seed), fingerprint=fingerprint
        )

    def __len__(self) -> int:
        return self.num_pairs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _needs_all(name)

    @property
    def has_two_images(self) -> bool:
        """Rows of single images are not streamed."""
        return True

    @property
    def rejected(self) -> list[Rejected]:  # type: ignore[override]  # a field there
        """Rows set aside so far."""
        return sorted((Rejected(**entry) for facts in self.spool.facts for entry in facts["rejected"]), key=lambda entry: entry.row)

    @property
    def ties(self) -> int:  # type: ignore[override]  # a field there
        """Ties seen so far."""
        return int(self.spool.facts[-1]["ties"])

    def values(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        """Columns of pair `index`, when it has arrived.

        Raises:
            IndexError: `index` is not in 0..N-1.
            ValueError: the stream could not be followed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair index is {index}, accepted: 0..{len(self) - 1}")
        pair = int(self.order[index])
        self.spool.wait(pair)
        lap, pair = divmod(pair, self.spool.size) if pair >= self.spool.size else (0, pair)
        found = self.spool.values(pair, names)
        if lap and "pair_id" in found:
            found["pair_id"] += f"+{lap}"
        return found

    def row(self, index: int) -> PairRow:
        """Pair `index`; raises like `values`."""
        found = self.values(index, COLUMNS)
        images = {name: found.pop(column) for name, column in (("image_0", "jpg_0"), ("image_1", "jpg_1"))}
        return PairRow(prompt=found.pop("caption"), **images, **found)


@dataclass(frozen=True)
class Arriving:
    """One column of streamed pairs, to be asked for the values of some."""

    pairs: StreamedPairs
    column: str

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self[index[0]][:, *index[1:]]
        if isinstance(index, np.ndarray):
            return np.array([self[int(single)] for single in index])
        return self.pairs.values(int(index), [self.column])[self.column]

    def __iter__(self) -> Iterator[Any]:
        raise _needs_all(self.column)


class NoScores(dict[str, np.ndarray]):
    """The scores of streamed pairs: none, and whoever asks for one is told why."""

    def __contains__(self, name: object) -> bool:
        raise _needs_all("scores")


_BY_INDEX = {"pair_ids": "pair_id", "prompts": "caption", "p0": "p0", "user_ids": "user_id"}


def _needs_all(name: str) -> ValueError:
    return ValueError(f"streaming is true, but {name} of all pairs is needed before training; set it to false, or drop what needs that")


def arrival_order(num_pairs: int, seed: int) -> np.ndarray:
    """(N,) int64: the pair of the stream that an index stands for.

    Indices are dealt so that the first pass of PairSampler(num_pairs, seed) meets the pairs as they arrive, shuffled within
    windows. The later passes, when all have arrived, are then shuffled as a whole.
    """
    first_pass = PairSampler(num_pairs, seed).micro_batch(0, 0, 0, batch_size=num_pairs, accumulation=1, world_size=1)
    order = np.empty(num_pairs, dtype=np.int64)
    for start in range(0, num_pairs, WINDOW):
        shuffled = permutation(min(WINDOW, num_pairs - start), seed, "stream", start).numpy()
        order[[index for index, _ in first_pass[start : start + WINDOW]]] = start + shuffled
    return order


def stream_pairs(source: str | Path, request: Request, seed: int, say: Callable[[str], None] | None = None) -> StreamedPairs:
    """The first `request.max_samples` usable pairs of a stream, which a thread follows while they are used.

    Returns when the first WINDOW of them have arrived, so that wrong columns and bad rows are known before training. The images are
    checked when they arrive, if they are to be checked.

    Raises:
        ValueError: the stream cannot be opened or read, holds too many bad rows, or `request` does not limit it.
    """
    if request.max_samples is None:
        raise ValueError(
            "streaming is true, which needs max_train_samples: the number of pairs to take from the stream and to keep on disk"
        )
    identity, open_stream, roots = _find(source, request)
    settings = {name: value for name, value in asdict(request).items() if name not in ("cache_dir", "max_samples")}
    key = digest_of(_VERSION, identity, sorted(settings.items()))
    spool = Spool(request.store / "streams" / key)
    spool.folder.mkdir(parents=True, exist_ok=True)
    Follower(spool.folder, request, open_stream, roots).start()
    needed = min(WINDOW, request.max_samples)
    spool.refresh()
    if say is not None and spool.size < needed:
        say(f"data: {source} as a stream; training begins when the first {needed} pairs have arrived")
    spool.wait(needed - 1)
    if say is not None:
        form = spool.facts[-1]["form"]
        say(f"data: {source} as a stream, rows of the form {form}; {spool.size} pairs have arrived, they are kept in {spool.folder}")
    first = [spool.values(pair, ["pair_id", "p0"]) for pair in range(min(needed, spool.size))]
    return StreamedPairs(spool, request.max_samples, seed, digest_of(key, first))


def _find(source: str | Path, request: Request) -> tuple[str, Callable[[], IterableDataset], tuple[Path, ...]]:
    """(what tells this stream from others, how to open it, where paths in it lead)."""
    path = Path(source).expanduser()
    if not path.exists():
        if request.data_format in PLACES:
            raise ValueError(
                f"data_format is {request.data_format!r}, which is for local data, but {str(source)!r} is no local file or folder"
            )
        return str(source), partial(_open_hub, str(source), request), ()
    kind, files = find_files(path, request)
    builder = {"parquet": "parquet", "jsonl": "json", "webdataset": "webdataset"}.get(kind)
    if builder is None:
        raise ValueError(f"streaming is true, but {str(path)!r} is a folder of pairs, which is read in place anyway; drop streaming")
    names = [str(file) for file in files]
    identity = files_identity(files)
    assert identity is not None
    return identity, partial(datasets.load_dataset, builder, data_files=names, split="train", streaming=True), (files[0].parent,)


def _open_hub(name: str, request: Request) -> IterableDataset:
    try:
        return datasets.load_dataset(name, request.dataset_config_name, split=request.split, streaming=True)
    except Exception as error:
        # The hub client raises its own, requests' and httpx's types; for the user they all mean: not available.
        raise hub_error(name, request.split, error) from error
