"""Archives in webdataset layout: read in place, never unpacked; a bad sample costs that sample, a damaged archive is an error."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpref.data import archives
from diffpref.data.scan import BadRowsError
from tests.hostile_files import write_tar

Pack = Callable[..., Path]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """pack(name, {member: bytes, text, object or TarInfo}) -> the archive."""

    return lambda name, members: write_tar(tmp_path / name, members)


@pytest.fixture
def sample(make_columns: Any) -> Callable[[int, str], dict[str, Any]]:
    """sample(row, key) -> the members of one of eight good pairs."""
    columns = make_columns(8)

    def make(row: int, key: str) -> dict[str, Any]:
        marks = {"caption": columns["caption"][row], "label_0": columns["label_0"][row]}
        return {f"{key}.jpg_0": columns["jpg_0"][row], f"{key}.jpg_1": columns["jpg_1"][row], f"{key}.json": marks}

    return make


def test_round_trip(load: Any, pack: Pack, sample: Any, make_columns: Any, found: Any) -> None:
    path = pack("a.tar", sample(0, "x/000") | sample(1, "x/001") | sample(2, "y.z/001"))
    pairs = load(path)
    assert found(pairs) == found(load(make_columns(3)))
    assert len(set(pairs.pair_ids)) == 3
    assert load(path, check_images=False).pair_ids == pairs.pair_ids


def test_the_published_copy_of_pick_a_pic(load: Any, pack: Pack, make_columns: Any, found: Any) -> None:
    """Text files for prompt and labels, images with a suffix, and keys that begin anew in every archive."""
    columns = make_columns(4)
    for archive in range(2):
        members: dict[str, Any] = {}
        for key in range(2):
            row = 2 * archive + key
            members |= {f"{key}.original_prompt.txt": columns["caption"][row], f"{key}.jpg_0.jpg": columns["jpg_0"][row]}
            members |= {f"{key}.jpg_1.jpg": columns["jpg_1"][row], f"{key}.label_0.txt": str(columns["label_0"][row])}
            members |= {f"{key}.label_1.txt": str(columns["label_1"][row])}
        path = pack(f"w/data/0000{archive}.tar", members)
    pairs = load(path.parent.parent)
    assert found(pairs) == found(load(columns))
    assert len({pair_id.split("-")[0] for pair_id in pairs.pair_ids}) == 4


def test_other_forms_in_archives(load: Any, pack: Pack, encode: Any, found: Any) -> None:
    a, b = encode(1), encode(2)
    chosen = {"0.chosen.png": a, "0.rejected.webp": b, "0.txt": "p\n"}
    votes = {"0.image_0.png": a, "0.image_1.png": b, "0.json": {"prompt": "p", "votes_0": 4, "votes_1": 0, "user_id": 3}}
    for name, members in (("c.tar", chosen), ("v.tar", votes)):
        assert found(load(pack(name, members))) == [("p", a, b, 1.0)]
    assert load(pack("v.tar", votes)).user_ids == ["3"]


@pytest.mark.reliability("S4")
def test_hostile_samples_cost_their_rows(load: Any, pack: Pack, sample: Any, encode: Any, tmp_path: Path) -> None:
    link, hard, device = (tarfile.TarInfo(f"{key}.jpg_0") for key in ("link", "hard", "device"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "ok.jpg_0"
    device.type = tarfile.CHRTYPE
    members = sample(0, "ok")
    members |= {"../../evil.jpg_0": encode(1), "../../evil.jpg_1": encode(2), "../../evil.json": {"caption": "x", "label_0": 1}}
    members |= {f"{tmp_path}/evil.jpg_0": encode(1), f"{tmp_path}/evil.json": {"caption": "x", "label_0": 1}}
    for key, info in (("link", link), ("hard", hard), ("device", device)):
        members |= sample(1, key) | {f"{key}.jpg_0": info}
    members |= sample(2, "lacks")
    del members["lacks.jpg_1"]
    members |= sample(3, "twice") | {"twice.jpg_0|again": encode(9)}
    members |= sample(4, "torn") | {"torn.json": b'{"caption": '}
    members |= sample(5, "bytes") | {"bytes.json": b"\xff"}
    members |= sample(6, "list") | {"list.json": []}
    members |= sample(7, "large") | {"large.json": b" " * 1_000_001}
    members |= {"place.jpg_1": encode(3), "place.json": {"caption": "x", "label_0": 1, "jpg_0": {"offset": 0, "size": 10}}}
    members |= {"path.jpg_1": encode(4), "path.json": {"caption": "x", "label_0": 1, "jpg_0": "/etc/passwd"}}
    path = pack("a.tar", members)
    with pytest.raises(BadRowsError) as caught:
        load(path)
    kinds = [(entry.column, entry.kind) for entry in caught.value.rejected]
    wanted = [("jpg_0", "unsafe name")] * 2 + [("jpg_0", "not a plain file")] * 3 + [("jpg_1", "null"), ("jpg_0", "duplicate member")]
    wanted += [("json", "not JSON"), ("json", "not UTF-8"), ("json", "not an object"), ("json", "too long"), ("jpg_0", "not a path")]
    assert kinds == [*wanted, ("jpg_0", "absolute path")]
    assert not list(tmp_path.rglob("evil*"))
    assert not list(tmp_path.parent.glob("evil*"))


def test_empty_and_unreadable_images_cost_their_rows(load: Any, pack: Pack, sample: Any) -> None:
    members = sample(0, "a") | sample(1, "b") | {"b.jpg_1": b""} | sample(2, "c") | {"c.jpg_0": b"text"}
    pairs = load(pack("a.tar", members))
    assert [(entry.row, entry.kind) for entry in pairs.rejected] == [(1, "empty"), (2, "not a JPEG, PNG or WebP image")]


@pytest.mark.reliability("D10")
def test_a_truncated_archive_is_named(load: Any, pack: Pack, sample: Any) -> None:
    path = pack("w/train-1.tar", sample(0, "a") | sample(1, "b"))
    data = path.read_bytes()
    end = data.rindex(b"b.json")
    for size in (700, end - 100, end + 100, end + 520):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"train-1\.tar' cannot be read: .*copy it again"):
            load(path.parent)


@pytest.mark.reliability("S4")
def test_a_member_that_lies_about_its_size(load: Any, pack: Pack, sample: Any) -> None:
    """Too large a size leads beyond the end of the file, a negative one back to a member before it, in circles."""
    path = pack("a.tar", sample(0, "a"))
    with tarfile.open(path) as archive:
        _, second, third = (member.offset for member in archive)
    data = path.read_bytes()
    info = tarfile.TarInfo("a.json")
    for size in (10**15, second - third - 512):
        info.size = size
        path.write_bytes(data[:third] + info.tobuf(tarfile.GNU_FORMAT)[:512] + data[third + 512 :])
        with pytest.raises(ValueError, match=r"a\.tar' cannot be read"):
            load(path)


def test_a_damaged_header_in_the_middle(load: Any, pack: Pack, sample: Any) -> None:
    path = pack("a.tar", sample(0, "a") | sample(1, "b"))
    data = bytearray(path.read_bytes())
    data[data.index(b"b.jpg_0") + 100] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a\.tar' cannot be read: no member begins at byte"):
        load(path)


def test_compressed_archives_are_refused(load: Any, pack: Pack, sample: Any) -> None:
    path = pack("a.tar", sample(0, "a"))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"unpack a \.tar\.gz"):
        load(path)


def test_the_index_is_kept_until_the_archive_changes(
    load: Any, pack: Pack, sample: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = pack("a.tar", sample(0, "a") | sample(1, "b"))
    first = load(path)
    opened: list[Any] = []
    real = tarfile.open
    monkeypatch.setattr(archives.tarfile, "open", lambda *args, **options: opened.append(1) or real(*args, **options))
    assert load(path).pair_ids == first.pair_ids
    assert opened == []
    [index] = (tmp_path / "cache").rglob("archives/*.json")
    index.write_text("[")
    assert load(path).pair_ids == first.pair_ids
    assert opened == [1]
    pack("a.tar", sample(0, "a") | sample(2, "c"))
    assert load(path).prompts == ["prompt 0", "prompt 2"]


@pytest.mark.reliability("S4")
def test_an_image_that_is_too_large_is_not_read(load: Any, pack: Pack, sample: Any) -> None:
    path = pack("a.tar", sample(0, "a") | sample(1, "b") | {"b.jpg_0": bytes(64_000_001)})
    assert [(entry.row, entry.kind) for entry in load(path).rejected] == [(1, "file too large")]
