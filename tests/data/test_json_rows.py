"""JSON lines and arrays: a damaged line costs that line, paths stay in the folder, a damaged array is an error."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from diffpref.data import json_rows
from diffpref.data.scan import BadRowsError


@pytest.fixture
def rows(put: Any, make_columns: Any) -> list[dict[str, Any]]:
    """Objects for three pairs whose images lie in j/images/."""
    columns = make_columns(3)
    out = []
    for row in range(3):
        names = {f"image_{side}": f"images/{row}-{side}.png" for side in (0, 1)}
        for side in (0, 1):
            put(f"j/images/{row}-{side}.png", columns[f"jpg_{side}"][row])
        out.append({"prompt": columns["caption"][row], **names, "label_0": columns["label_0"][row]})
    return out


def _lines(objects: list[Any]) -> str:
    return "\n".join(json.dumps(found) for found in objects) + "\n"


def test_lines_and_arrays_round_trip(load: Any, put: Any, rows: Any, make_columns: Any, found: Any) -> None:
    want = found(load(make_columns(3)))
    extra = [row | {"user_id": n, "margin": n / 2, "ranking_id": "r", "model_0": "m"} for n, row in enumerate(rows)]
    pairs = load(put("j/pairs.jsonl", _lines(extra)))
    assert found(pairs) == want
    assert pairs.user_ids == ["0", "1", "2"]
    assert (pairs.row(1).margin, pairs.row(1).ranking_id, pairs.row(1).model_0, pairs.row(1).model_1) == (0.5, "r", "m", None)
    windows = _lines(rows).replace("\n", "\r\n\n")
    for name, text in (("b.jsonl", "\ufeff" + _lines(rows)), ("c.json", json.dumps(rows, indent=1)), ("d.json", windows)):
        again = load(put(f"j/{name}", text))
        assert found(again) == want
        assert again.pair_ids == pairs.pair_ids


def test_the_other_forms_as_lines(load: Any, put: Any, rows: Any, found: Any, tmp_path: Path) -> None:
    a, b = rows[0]["image_0"], rows[0]["image_1"]
    images = {name: (tmp_path / "j" / name).read_bytes() for name in (a, b)}
    for number, line in enumerate(
        (
            {"prompt": "p", "chosen": a, "rejected": b},
            {"prompt": "p", "image1": a, "image2": b, "votes_image1": 9, "votes_image2": 0},
            {"prompt": "p", "generations": [a, b], "ranking": [1, 2]},
        )
    ):
        assert found(load(put(f"j/{number}.jsonl", _lines([line])))) == [("p", images[a], images[b], 1.0)]


def test_files_of_a_folder(load: Any, put: Any, rows: Any) -> None:
    put("j/train-0.jsonl", _lines(rows[:2]))
    put("j/train-1.jsonl", _lines(rows[2:]))
    folder = put("j/test.jsonl", _lines(rows[:1])).parent
    assert len(load(folder)) == 3
    assert len(load(folder, split="test")) == 1
    with pytest.raises(ValueError, match=r"data_format is 'webdataset', but there is no data of an accepted kind"):
        load(folder, data_format="webdataset")


def test_nothing_is_read_before_it_is_used(load: Any, put: Any, rows: Any, tmp_path: Path) -> None:
    path = put("j/pairs.jsonl", _lines(rows))
    (tmp_path / "j/images/1-0.png").unlink()
    pairs = load(path, check_images=False)
    assert len(pairs) == 3
    assert pairs.row(0).p0 == rows[0]["label_0"]
    with pytest.raises(ValueError, match=rf"pair {pairs.pair_ids[1]} \(row 1\): image is no such file: .*check_images"):
        pairs.row(1)
    checked = load(path)
    assert [(entry.row, entry.column, entry.kind) for entry in checked.rejected] == [(1, "jpg_0", "no such file")]


@pytest.mark.parametrize("check_images", [True, False])
@pytest.mark.reliability("S4")
def test_paths_that_lead_out_cost_their_rows(load: Any, put: Any, rows: Any, check_images: bool) -> None:
    put("secret.png", b"secret")
    names: list[Any] = [
        "/etc/passwd",
        "../secret.png",
        "images/../../secret.png",
        "https://example.org/x.png",
        "file:///etc/passwd",
        "C:/x",
        7,
    ]
    names += [None, ["a"]]
    objects = [rows[0], *(rows[1] | {"image_1": name} for name in names)]
    pairs = load(put("j/pairs.jsonl", _lines(objects)), check_images=check_images)
    assert len(pairs) == 1
    kinds = [entry.kind for entry in pairs.rejected]
    wanted = ["absolute path", "outside the data folder", "outside the data folder", "a URL", "a URL", "absolute path", "not a path"]
    assert kinds == [*wanted, "null", "not a path"]
    assert {entry.column for entry in pairs.rejected} == {"jpg_1"}


@pytest.mark.reliability("S4")
def test_links_and_empty_files_cost_their_rows(load: Any, put: Any, rows: Any, tmp_path: Path) -> None:
    (tmp_path / "j/images/link.png").symlink_to("/etc/hostname")
    put("j/images/empty.png", b"")
    objects = [rows[0], rows[1] | {"image_0": "images/link.png"}, rows[2] | {"image_1": "images/empty.png"}]
    pairs = load(put("j/pairs.jsonl", _lines(objects)))
    assert [(entry.row, entry.kind) for entry in pairs.rejected] == [(1, "outside the data folder"), (2, "empty")]


def test_damaged_lines_cost_their_rows(load: Any, put: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 120_000)
    lines = [json.dumps(row).encode() for row in rows]
    lines[1:1] = [b"{", b'"text"', b"[1]", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"label_0": ' + b"1" * 5000 + b"}", b"x" * 300_000, b""]
    pairs = load(put("j/pairs.jsonl", b"\n".join(lines)))
    assert pairs.prompts == [row["prompt"] for row in rows]
    kinds = [(entry.row, entry.kind) for entry in pairs.rejected]
    wanted = [(1, "not JSON"), (2, "not an object"), (3, "not an object"), (4, "not UTF-8"), (5, "not JSON"), (6, "not JSON")]
    assert kinds == [*wanted, (7, "too long")]


def test_values_of_the_wrong_type_cost_their_rows(load: Any, put: Any, rows: Any) -> None:
    wrong: list[dict[str, Any]] = [
        *({"label_0": label} for label in ("1", True, None, {"x": 1}, float("nan"), float("inf"), -0.5, 10**400)),
        {"prompt": ["a"]},
    ]
    pairs = load(put("j/pairs.jsonl", _lines([rows[0], *(rows[1] | change for change in wrong)])))
    assert len(pairs) == 1
    kinds = [entry.kind for entry in pairs.rejected]
    wanted = ["not a number", "not a number", "null", "not a number", "not finite", "not finite", "outside [0, 1]", "not finite"]
    assert kinds == [*wanted, "not a string"]


@pytest.mark.reliability("D8")
def test_absurd_captions_cost_their_rows(load: Any, put: Any, rows: Any) -> None:
    text = '{"prompt": "\\ud800", ' + json.dumps(rows[1])[1:].replace('"prompt"', '"x"')
    long = rows[2] | {"prompt": "x" * 10_001}
    pairs = load(put("j/pairs.jsonl", _lines([rows[0], long]) + text + "\n"))
    assert [(entry.row, entry.kind) for entry in pairs.rejected] == [(1, "too long"), (2, "not Unicode")]


def test_scores_and_votes_of_mixed_types_are_no_scores(load: Any, put: Any, rows: Any) -> None:
    changes = [{"a_0": 1, "a_1": 2, "b_0": 1, "b_1": 2}, {"a_0": 3.5, "a_1": None, "b_0": "x", "b_1": 1}, {"a_0": 0, "b_0": 1}]
    pairs = load(put("j/pairs.jsonl", _lines([row | change for row, change in zip(rows, changes, strict=True)])))
    assert pairs.scores.keys() == {"a"}
    assert pairs.scores["a"][0].tolist() == [1, 2]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1} {"b": 2}]', "[1, 2, ", "[" * 3000, '[{"a": }]'])
def test_damaged_arrays_are_an_error(load: Any, put: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"pairs\.json' is not readable JSON from character \d+ on"):
        load(put("j/pairs.json", text))


def test_files_without_rows(load: Any, put: Any, rows: Any) -> None:
    with pytest.raises(ValueError, match=r"fit no accepted form.*Found: none"):
        load(put("j/pairs.jsonl", "\n"))
    with pytest.raises(BadRowsError, match="none of 1 rows can be used"):
        load(put("j/pairs.jsonl", _lines([rows[0] | {"label_0": 3}])))


def test_late_columns_are_not_lost(load: Any, put: Any, rows: Any) -> None:
    pairs = load(put("j/pairs.jsonl", _lines([rows[0], rows[1] | {"user_id": "u"}, rows[2]])))
    assert pairs.user_ids == [None, "u", None]


def test_several_kinds_in_one_folder(load: Any, put: Any, rows: Any, write_parquet: Any, make_columns: Any, tmp_path: Path) -> None:
    put("j/train.jsonl", _lines(rows))
    write_parquet(make_columns(2), "j/train-0.parquet")
    with pytest.raises(ValueError, match=r"several kinds of data \(parquet: train-0\.parquet; jsonl: train\.jsonl\).*data_format"):
        load(tmp_path / "j")
    assert len(load(tmp_path / "j", data_format="jsonl")) == 3
    assert len(load(tmp_path / "j", split="other", data_format="jsonl")) == 3
    assert len(load(tmp_path / "j", data_format="parquet")) == 2
    with pytest.raises(ValueError, match=r"type '\.jsonl' and data_format is 'parquet'"):
        load(tmp_path / "j" / "train.jsonl", data_format="parquet")
    with pytest.raises(ValueError, match=r"dataset_config_name is 'x', but .* is local data"):
        load(tmp_path / "j" / "train.jsonl", dataset_config_name="x")
    with pytest.raises(ValueError, match="data_format is 'folder', which is for local data"):
        load("some/hub-id", data_format="folder")


def test_all_files_are_read_when_none_is_named_after_the_split(load: Any, put: Any, rows: Any, caplog: pytest.LogCaptureFixture) -> None:
    put("j/a.jsonl", _lines(rows[:1]))
    folder = put("j/b.jsonl", _lines(rows[1:])).parent
    with caplog.at_level(logging.WARNING):
        assert len(load(folder)) == 3
    assert "no file in" in caplog.text


def test_reports_beside_the_data_are_no_data(load: Any, put: Any, write_parquet: Any, make_columns: Any, tmp_path: Path) -> None:
    write_parquet(make_columns(2), "j/train-0.parquet")
    put("j/label_report.json", "{}")
    put("j/rejected_rows.jsonl", "{}")
    assert len(load(tmp_path / "j")) == 2
    with pytest.raises(ValueError, match="several kinds of data"):
        load(tmp_path / "j", split="test")
