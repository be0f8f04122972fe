"""Streamed pairs: the same as loaded ones, in the order of the stream, kept on disk, waited for and never lost."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from diffpref.data import spool, streaming
from diffpref.data.loader import PairPixels, batches
from diffpref.data.reading import Request
from diffpref.data.sampler import PairSampler
from diffpref.data.spool import Follower
from diffpref.data.streaming import StreamedPairs, stream_pairs

Stream = Callable[..., StreamedPairs]


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """stream(source, number of pairs, **settings) -> pairs, in windows of 32 and files of 16 pairs from chunks of 8 rows."""
    for module, name, size in ((streaming, "WINDOW", 32), (spool, "WINDOW", 32), (spool, "_FILE_PAIRS", 16), (spool, "_CHUNK", 8)):
        monkeypatch.setattr(module, name, size)

    def run(source: Path | str, num_pairs: int | None, seed: int = 0, **settings: Any) -> StreamedPairs:
        return stream_pairs(source, Request(max_samples=num_pairs, cache_dir=tmp_path / "cache", **settings), seed)

    yield run
    for thread in threading.enumerate():
        if isinstance(thread, Follower):
            thread.stop()


def _first_pass(pairs: StreamedPairs, seed: int = 0) -> list[str]:
    sampler = PairSampler(len(pairs), seed)
    items = (sampler.micro_batch(position, 0, 0, batch_size=1, accumulation=1, world_size=1) for position in range(len(pairs)))
    return [pairs.row(index).prompt for [(index, _)] in items]


def test_streamed_pairs_are_the_loaded_ones(stream: Stream, load: Any, make_columns: Any, write_parquet: Any, found: Any) -> None:
    columns = make_columns(80, user_id=[str(row) for row in range(80)], margin=[0.5] * 80, model_0=["m"] * 80)
    path = write_parquet(columns)
    streamed, loaded = stream(path, 80), load(path)
    rows = {streamed.row(index) for index in range(80)}
    assert rows == {loaded.row(index) for index in range(80)}
    assert len(rows) == 80


def test_the_first_pass_follows_the_stream_in_windows(stream: Stream, make_columns: Any, write_parquet: Any) -> None:
    pairs = stream(write_parquet(make_columns(80)), 80, seed=3)
    seen = [int(prompt.split()[1]) for prompt in _first_pass(pairs, seed=3)]
    for start, end in ((0, 32), (32, 64), (64, 80)):
        assert sorted(seen[start:end]) == list(range(start, end))
        assert seen[start:end] != list(range(start, end))
    assert [int(prompt.split()[1]) for prompt in _first_pass(stream(write_parquet(make_columns(80)), 80, seed=4), seed=4)] != seen


def test_only_what_is_asked_for_is_read(stream: Stream, make_columns: Any, write_parquet: Any, tmp_path: Path) -> None:
    pairs = stream(write_parquet(make_columns(200)), 20)
    assert {int(prompt.split()[1]) for prompt in _first_pass(pairs)} == set(range(20))
    time.sleep(0.3)
    assert pairs.spool.size == 24  # the chunk that holds the twentieth ends there


def test_a_stream_that_ends_early_begins_again(stream: Stream, make_columns: Any, write_parquet: Any) -> None:
    pairs = stream(write_parquet(make_columns(10)), 25)
    rows = [pairs.row(index) for index in range(25)]
    assert len({row.pair_id for row in rows}) == 25
    prompts = [row.prompt for row in rows]
    assert {prompts.count(f"prompt {row}") for row in range(5)} == {3}
    assert {prompts.count(f"prompt {row}") for row in range(5, 10)} == {2}


def test_another_start_goes_on_where_the_spool_ends(
    stream: Stream, make_columns: Any, write_parquet: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    columns = make_columns(100)
    columns["jpg_1"][3] = columns["jpg_0"][90] = b"broken"
    columns["caption"][4], columns["label_0"][60], columns["label_1"][60] = "", 0.5, 0.5
    for name, values in columns.items():
        values[70] = values[5] if name != "caption" else values[70]
    columns["caption"][70] = columns["caption"][5]
    path = write_parquet(columns)
    whole = stream(path, 97)  # one more than there are
    want = [whole.row(index) for index in range(97)]
    cut = Follower._batches

    def short(self: Follower, rows_before: int) -> Iterator[Any]:
        for number, batch in enumerate(cut(self, rows_before)):
            if number == 6:
                raise OSError("the network is gone")
            yield batch

    other = tmp_path / "other"
    request = Request(max_samples=97, cache_dir=other)
    monkeypatch.setattr(Follower, "_batches", short)
    begun = stream_pairs(path, request, 0)
    with pytest.raises(ValueError, match=r"following the stream failed \(OSError: the network is gone\); what has arrived is kept"):
        _first_pass(begun)
    monkeypatch.setattr(Follower, "_batches", cut)
    again = stream_pairs(path, request, 0)
    assert [again.row(index) for index in range(97)] == want
    assert again.fingerprint == begun.fingerprint == whole.fingerprint
    assert [(entry.row, entry.column, entry.kind) for entry in again.rejected] == [
        (3, "jpg_1", "not a JPEG, PNG or WebP image"),
        (4, "caption", "empty"),
        (90, "jpg_0", "not a JPEG, PNG or WebP image"),
    ]
    assert again.rejected == whole.rejected
    assert again.ties == whole.ties == 1
    assert sum(row.pair_id.endswith("-2") for row in want) == 1


def test_the_spool_is_shared(stream: Stream, make_columns: Any, write_parquet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(make_columns(60))
    opened: list[int] = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: opened.append(1) or real(*args, **options))
    first, second = stream(path, 40), stream(path, 40)
    assert _first_pass(first) == _first_pass(second)
    assert opened == [1]
    assert len(_first_pass(stream(path, 60))) == 60  # more pairs go on from the same files
    assert opened == [1, 1]
    assert first.spool.folder == second.spool.folder


def test_workers_and_other_processes_wait_for_rows(stream: Stream, make_columns: Any, write_parquet: Any) -> None:
    pairs = stream(write_parquet(make_columns(48)), 48)
    copy = ForkingPickler.loads(ForkingPickler.dumps(pairs))
    assert copy.row(40) == pairs.row(40)
    sampler = PairSampler(48, 0)
    order = [sampler.micro_batch(step, 0, 0, batch_size=8, accumulation=1, world_size=1) for step in range(6)]
    alone = [batch["pair_id"] for batch in batches(PairPixels(pairs, 8), lambda: order)]
    assert [batch["pair_id"] for batch in batches(PairPixels(pairs, 8), lambda: order, 2)] == alone


def test_a_row_is_waited_for(stream: Stream, make_columns: Any, write_parquet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, cut = threading.Event(), Follower._batches

    def slow(self: Follower, rows_before: int) -> Iterator[Any]:
        for number, batch in enumerate(cut(self, rows_before)):
            if number == 6:
                gate.wait(20)
            yield batch

    monkeypatch.setattr(Follower, "_batches", slow)
    pairs = stream(write_parquet(make_columns(64)), 64)
    late = int((pairs.order == 63).nonzero()[0][0])
    threading.Timer(0.3, gate.set).start()
    assert pairs.spool.size < 64
    assert pairs.row(late).prompt == "prompt 63"


def test_other_kinds_of_files(stream: Stream, load: Any, put: Any, make_columns: Any, found: Any, tmp_path: Path) -> None:
    columns = make_columns(3)
    lines = []
    for row in range(3):
        names = {f"image_{side}": put(f"j/{row}-{side}.png", columns[f"jpg_{side}"][row]).name for side in (0, 1)}
        lines.append(json.dumps({"prompt": columns["caption"][row], "label_0": columns["label_0"][row]} | names))
    path = put("j/x.jsonl", "\n".join(lines))
    assert sorted(found(stream(path, 3))) == sorted(found(load(columns)))
    put("f/l/x.png", b"x")
    with pytest.raises(ValueError, match="folder of pairs, which is read in place"):
        stream(put("f/w/x.png", b"x").parent.parent, 3)


def test_archives_and_image_columns(stream: Stream, load: Any, make_columns: Any, found: Any, tmp_path: Path, encode: Any) -> None:
    columns = make_columns(10)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for row in range(10):
            mark = json.dumps({"caption": columns["caption"][row], "label_0": columns["label_0"][row]}).encode()
            for name, data in (("jpg_0.png", columns["jpg_0"][row]), ("jpg_1", columns["jpg_1"][row]), ("json", mark)):
                info = tarfile.TarInfo(f"{row}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    assert sorted(found(stream(tmp_path / "x.tar", 10))) == sorted(found(load(columns)))
    table = {"prompt": columns["caption"], "chosen": columns["jpg_0"], "rejected": columns["jpg_1"]}
    images = datasets.Dataset.from_dict(table).cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())
    images.to_parquet(tmp_path / "c.parquet")
    assert sorted(found(stream(tmp_path / "c.parquet", 10))) == sorted(found(load(table)))
    lists = {"prompt": ["p"], "images": [[encode(1), encode(2), encode(3)]], "rank": [[1, 2, 3]]}
    datasets.Dataset.from_dict(lists).cast_column("images", datasets.Sequence(datasets.Image())).to_parquet(tmp_path / "r.parquet")
    assert sorted(found(stream(tmp_path / "r.parquet", 3))) == sorted(found(load(lists)))


def test_wrong_streams_fail_before_training(
    stream: Stream, make_columns: Any, write_parquet: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="needs max_train_samples"):
        stream(write_parquet(make_columns(2)), None)
    with pytest.raises(ValueError, match=r"fit no accepted form.*caption_column"):
        stream(write_parquet({"a": [1, 2]}, "a.parquet"), 2)
    with pytest.raises(ValueError, match=r"40 of 40 rows|none of \d+ rows can be used"):
        stream(write_parquet(make_columns(40, jpg_0=[b"x"] * 40), "b.parquet"), 2)
    columns = make_columns(40)
    columns["label_0"][10:25] = [3.0] * 15
    with pytest.raises(ValueError, match=r"15 of 32 rows \(46\.9 %\) are bad"):
        stream(write_parquet(columns, "c.parquet"), 40)
    rows = {"prompt": ["p"] * 2, "prompt_id": ["1"] * 2, "image": make_columns(2)["jpg_0"], "rank": [1, 2]}
    with pytest.raises(ValueError, match="do not lie in one row"):
        stream(write_parquet(rows, "d.parquet"), 2)

    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"'some/pairs'.*no network.*train_data_dir"):
        stream("some/pairs", 2)


def test_what_needs_all_pairs_is_refused(stream: Stream, make_columns: Any, write_parquet: Any) -> None:
    pairs = stream(write_parquet(make_columns(4)), 4)
    for index in range(4):
        row = pairs.row(index)
        assert (pairs.pair_ids[index], pairs.prompts[index], pairs.p0[index]) == (row.pair_id, row.prompt, row.p0)
    some = np.array([3, 1])
    assert pairs.p0[some].tolist() == pairs.p0[some, None][:, 0].tolist() == [pairs.p0[3], pairs.p0[1]]
    assert dict(pairs.scores) == {}
    for needs_all in (lambda: list(pairs.prompts), lambda: "hps" in pairs.scores, lambda: pairs.select([0])):
        with pytest.raises(ValueError, match=r"streaming is true, but .* of all pairs"):
            needs_all()
    with pytest.raises(IndexError, match="pair index is 4"):
        pairs.row(4)
    assert not hasattr(pairs, "__nothing__")
