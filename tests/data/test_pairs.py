"""Hostile tables: a damaged row costs that row, a damaged data set is an error that says what to do."""

from __future__ import annotations

import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from diffpref.data.pairs import split_held_out, write_rejected
from diffpref.data.scan import BadRowsError
from diffpref.data.schema import label_problem, probability


def _replaced(columns: dict[str, list[Any]], name: str, row: int, value: Any) -> dict[str, list[Any]]:
    values = list(columns[name])
    values[row] = value
    return columns | {name: values}


def test_rows_come_back_as_they_were(load: Any, make_columns: Any, write_parquet: Any) -> None:
    columns = make_columns(5, user_id=[1, 2, None, 4, 5], model_0=list("abcde"), unknown=[0] * 5)
    pairs = load(write_parquet(columns))
    assert len(pairs) == 5
    assert pairs.prompts == columns["caption"]
    assert pairs.p0.tolist() == columns["label_0"]
    assert pairs.user_ids == ["1", "2", None, "4", "5"]
    row = pairs.row(3)
    assert (row.prompt, row.image_0, row.image_1) == ("prompt 3", columns["jpg_0"][3], columns["jpg_1"][3])
    assert (row.p0, row.user_id, row.model_0, row.model_1, row.ranking_id) == (1.0, "4", "d", None, None)
    assert (pairs.rejected, pairs.ties) == ([], 0)
    with pytest.raises(IndexError, match="pair index is 5"):
        pairs.row(5)


def test_ids_are_stable_and_unique(load: Any, make_columns: Any) -> None:
    columns = make_columns(3)
    doubled = {name: values + values[:2] for name, values in columns.items()}
    pairs = load(doubled)
    assert len(set(pairs.pair_ids)) == 5
    assert pairs.pair_ids[3:] == [f"{pair_id}-2" for pair_id in pairs.pair_ids[:2]]
    assert load(columns).pair_ids == pairs.pair_ids[:3]
    assert load(columns, check_images=False).pair_ids == pairs.pair_ids[:3]


def test_uids_give_the_id_when_present(load: Any, make_columns: Any) -> None:
    uids = {"image_0_uid": ["a", "b", None], "image_1_uid": ["c", "d", "e"]}
    first = load(make_columns(3, **uids), check_images=False)
    other_images = make_columns(6)
    second = load({name: values[3:] for name, values in other_images.items()} | uids)
    assert first.pair_ids[:2] == second.pair_ids[:2]
    assert first.pair_ids[2] != second.pair_ids[2]
    same = load(make_columns(3, image_0_uid=["a", "b", "e"], image_1_uid=["c", "d", "e"]))
    assert [(entry.row, entry.kind) for entry in same.rejected] == [(2, "identical images")]


def test_fingerprint_follows_ids_and_labels(load: Any, make_columns: Any) -> None:
    columns = make_columns(4)
    pairs = load(columns)
    assert load(columns).fingerprint == pairs.fingerprint
    assert pairs.select([1, 0, 2, 3]).fingerprint != pairs.fingerprint
    turned = columns | {"label_0": columns["label_1"], "label_1": columns["label_0"]}
    assert load(turned).fingerprint != pairs.fingerprint


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.reliability("D1")
def test_truncated_image_costs_its_row(load: Any, make_columns: Any, encode: Any, kind: str, share: float) -> None:
    data = encode(77, kind)
    columns = _replaced(make_columns(4), "jpg_1", 1, data[: int(len(data) * share)])
    pairs = load(columns)
    assert pairs.prompts == ["prompt 0", "prompt 2", "prompt 3"]
    assert [(entry.row, entry.column) for entry in pairs.rejected] == [(1, "jpg_1")]
    assert pairs.row(1).image_1 == columns["jpg_1"][2]


@pytest.mark.reliability("D2")
def test_hostile_images_cost_their_rows(load: Any, make_columns: Any, encode: Any, tmp_path: Path) -> None:
    values = [None, b"", b"text", encode(1, "EPS"), encode(1, "GIF"), encode(1, "TIFF")]
    values.append(encode(Image.new("1", (8000, 8000))))
    pairs = load(make_columns(8, jpg_0=[*values, encode(5)]))
    assert pairs.prompts == ["prompt 7"]
    kinds = [entry.kind for entry in pairs.rejected]
    assert kinds == ["null", "empty", *["not a JPEG, PNG or WebP image"] * 4, "too many pixels"]
    write_rejected(pairs, tmp_path / "rejected.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines[0] == {"row": 0, "pair_id": None, "column": "jpg_0", "reason": "null"}
    assert len(lines) == 7


@pytest.mark.reliability("D7")
def test_identical_images_are_no_preference(load: Any, make_columns: Any) -> None:
    columns = make_columns(3)
    pairs = load(_replaced(columns, "jpg_1", 2, columns["jpg_0"][2]))
    assert [(entry.row, entry.kind) for entry in pairs.rejected] == [(2, "identical images")]


def test_unchecked_images_fail_when_used(load: Any, make_columns: Any) -> None:
    uids = {"image_0_uid": ["a", "b"], "image_1_uid": ["c", "d"]}
    pairs = load(_replaced(make_columns(2, **uids), "jpg_0", 1, None), check_images=False)
    assert len(pairs) == 2
    with pytest.raises(ValueError, match=rf"pair {pairs.pair_ids[1]}.*null.*set check_images to true"):
        pairs.row(1)


def test_dict_form_of_bytes_but_no_paths(load: Any, make_columns: Any, encode: Any, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(9))
    columns = make_columns(3)
    columns["jpg_0"] = [{"bytes": data, "path": None} for data in columns["jpg_0"]]
    columns["jpg_0"][1] = {"bytes": None, "path": str(tmp_path / "x.png")}
    pairs = load(columns)
    assert pairs.row(0).image_0 == encode(0)
    assert [entry.kind for entry in pairs.rejected] == ["only a path, no bytes"]


def test_image_feature_is_read_as_stored(load: Any, make_columns: Any, write_parquet: Any, tmp_path: Path) -> None:
    columns = make_columns(2)
    dataset = Dataset.from_dict(columns).cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    dataset.to_parquet(tmp_path / "train-0.parquet")
    for source in (dataset, tmp_path / "train-0.parquet"):
        assert load(source).row(1).image_1 == columns["jpg_1"][1]


@pytest.mark.reliability("D2")
def test_images_of_the_wrong_type(load: Any, make_columns: Any) -> None:
    with pytest.raises(BadRowsError, match="not bytes: str"):
        load(make_columns(2, jpg_0=["/etc/passwd", "b.png"]))


@pytest.mark.reliability("D7")
def test_invalid_labels_cost_their_rows(load: Any, make_columns: Any) -> None:
    label_0 = [1.0, None, float("nan"), 2.0, 1.0, float("inf"), -0.1, 0.3]
    label_1 = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.1, 0.7]
    pairs = load(make_columns(8, label_0=label_0, label_1=label_1))
    assert pairs.p0.tolist() == [1.0, 0.3]
    kinds = [entry.kind for entry in pairs.rejected]
    assert kinds == ["null", "not finite", "outside [0, 1]", "labels do not sum to 1", "not finite", "outside [0, 1]"]


@pytest.mark.parametrize("label", [True, False, "left", "1.0", None, float("nan"), 2, -1, [1.0]])
@pytest.mark.reliability("D7")
def test_labels_that_are_no_probability(label: object) -> None:
    assert label_problem(label)


def test_labels_may_be_integers_or_shares_of_votes() -> None:
    assert probability(1, 0) == 1
    assert probability(1 / 3, 2 / 3) == 1 / 3
    assert probability(0.5, 0.5 + 1e-5) == ("label_0", "labels do not sum to 1: 0.5 + 0.50001")
    assert probability(0.25, has_both=False) == 0.25


@pytest.mark.parametrize("labels", [["left", "right"], [True, False]])
def test_label_columns_of_the_wrong_type(load: Any, make_columns: Any, labels: list[Any]) -> None:
    with pytest.raises(BadRowsError, match="not a number"):
        load(make_columns(2, label_0=labels))


@pytest.mark.reliability("D7")
def test_ties(load: Any, make_columns: Any) -> None:
    columns = make_columns(4, label_0=[1.0, 0.5, 0.0, 0.5], label_1=[0.0, 0.5, 1.0, 0.5])
    dropped, kept = load(columns), load(columns, tie_policy="keep")
    assert (dropped.p0.tolist(), dropped.ties, dropped.rejected) == ([1.0, 0.0], 2, [])
    assert (kept.p0.tolist(), kept.ties) == ([1.0, 0.5, 0.0, 0.5], 2)
    with pytest.raises(ValueError, match="row 1 is a tie"):
        load(columns, tie_policy="error")
    with pytest.raises(ValueError, match=r"tie_policy is 'skip', accepted: drop, keep, error"):
        load(columns, tie_policy="skip")
    with pytest.raises(BadRowsError, match=r"all 1 rows are ties.*keep"):
        load({name: values[1:2] for name, values in columns.items()})


@pytest.mark.reliability("D8")
def test_captions(load: Any, make_columns: Any) -> None:
    captions = ["ok", None, "", "  \n", "x" * 10_000, "x" * 10_001, "<b>\x07 \N{CAT}"]
    pairs = load(make_columns(7, caption=captions))
    assert pairs.prompts == ["ok", "x" * 10_000, "<b>\x07 \N{CAT}"]
    assert [entry.kind for entry in pairs.rejected] == ["null", "empty", "empty", "too long"]
    with pytest.raises(BadRowsError, match="not a string: list"):
        load(make_columns(1, caption=[["a"]]))


@pytest.mark.reliability("D6")
def test_missing_columns_name_the_nearest(load: Any, make_columns: Any, write_parquet: Any) -> None:
    columns = make_columns(2)
    columns["captions"] = columns.pop("caption")
    columns["image_a"] = columns.pop("jpg_0")
    for source in (columns, write_parquet(columns)):
        with pytest.raises(
            ValueError, match=r"for pairs it lacks 'caption' \(nearest: captions\), 'jpg_0'.*Found: .*captions.*Accepted"
        ) as caught:
            load(source)
        for name in ("caption_column", "image_0_column", "label_column", "chosen_rejected (caption or prompt"):
            assert name in str(caught.value)
    mapped = load(columns, caption_column="captions", image_0_column="image_a")
    assert mapped.prompts == ["prompt 0", "prompt 1"]
    assert mapped.row(0).image_0 == columns["image_a"][0]


def test_columns_are_mapped_by_the_settings_of_a_run(load: Any, make_columns: Any, write_parquet: Any) -> None:
    columns = make_columns(3)
    renamed = dict(zip(("c", "a", "b", "better", "worse"), columns.values(), strict=True)) | {"who": [7, 8, 9]}
    flags = {"caption_column": "c", "image_0_column": "a", "image_1_column": "b", "label_column": "better", "user_column": "who"}
    for source in (renamed, write_parquet(renamed)):
        pairs = load(source, **flags)
        assert (pairs.prompts, pairs.p0.tolist(), pairs.user_ids) == (columns["caption"], columns["label_0"], ["7", "8", "9"])
        assert pairs.row(1).image_1 == columns["jpg_1"][1]
        assert pairs.pair_ids == load(columns).pair_ids


@pytest.mark.reliability("D6")
def test_wrong_column_settings(load: Any, make_columns: Any) -> None:
    with pytest.raises(ValueError, match=r"user_column is 'users', which is no column of the dataset"):
        load(make_columns(1), user_column="users")
    with pytest.raises(ValueError, match=r"caption_column is 'captoin'.*nearest: caption"):
        load(make_columns(1), caption_column="captoin")
    with pytest.raises(ValueError, match="image_0_column and image_1_column are both 'jpg_0'"):
        load(make_columns(1), image_0_column="jpg_0", image_1_column="jpg_0")
    with pytest.raises(ValueError, match=r"data_format is 'csv', accepted: auto, pairs, chosen_rejected"):
        load(make_columns(1), data_format="csv")


def test_one_label_column_is_enough(load: Any, make_columns: Any) -> None:
    columns = make_columns(3, label_0=[0.25, 1.5, 1.0])
    del columns["label_1"]
    pairs = load(columns)
    assert pairs.p0.tolist() == [0.25, 1.0]
    assert [(entry.row, entry.kind) for entry in pairs.rejected] == [(1, "outside [0, 1]")]


@pytest.mark.reliability("D9")
def test_zero_rows_and_one_row(load: Any, make_columns: Any, write_parquet: Any, tmp_path: Path) -> None:
    assert len(load(write_parquet(make_columns(1), "one.parquet"))) == 1
    empty = pa.table(make_columns(1)).slice(0, 0)
    with pytest.raises(BadRowsError, match="0 rows"):
        load(empty)
    pq.write_table(empty, tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet' has 0 rows"):
        load(tmp_path / "train-1.parquet")
    write_parquet(make_columns(2), "train-0.parquet")
    assert len(load(tmp_path, split="train")) == 2


@pytest.mark.reliability("D13")
def test_bad_share_limit(load: Any, make_columns: Any) -> None:
    columns = make_columns(12, jpg_0=[b"x"] * 10 + make_columns(12)["jpg_0"][10:])
    assert len(load(columns).rejected) == 10
    with pytest.raises(BadRowsError, match=r"11 of 12 rows \(91\.7 %\) are bad") as caught:
        load(_replaced(columns, "caption", 11, None))
    assert "10  jpg_0        not a JPEG, PNG or WebP image (first: row 0)" in str(caught.value)
    assert "1  caption      null (first: row 11)" in str(caught.value)
    assert len(caught.value.rejected) == 11
    many = {name: values * 100 for name, values in make_columns(11).items()}
    many["caption"][:11] = [""] * 11
    assert len(load(many, check_images=False).rejected) == 11


def test_all_rows_rejected(load: Any, make_columns: Any) -> None:
    with pytest.raises(BadRowsError, match=r"none of 2 rows can be used[^$]*caption +empty"):
        load(make_columns(2, caption=["", ""]))


def test_max_samples_counts_accepted_pairs(load: Any, make_columns: Any) -> None:
    columns = _replaced(make_columns(6), "jpg_0", 0, b"")
    assert load(columns, max_samples=2).prompts == ["prompt 1", "prompt 2"]
    with pytest.raises(ValueError, match="max_samples is 0"):
        load(columns, max_samples=0)


def test_long_tables_keep_their_order(load: Any, make_columns: Any) -> None:
    pairs = load(make_columns(150))
    assert pairs.prompts == [f"prompt {row}" for row in range(150)]
    assert pairs.row(149).prompt == "prompt 149"


def test_folders_choose_the_files_of_a_split(load: Any, make_columns: Any, write_parquet: Any, tmp_path: Path) -> None:
    for name in ("train-00000.parquet", "train-00001.parquet", "test-0.parquet", "test_unique-0.parquet"):
        write_parquet(make_columns(1, caption=[name]), f"pick/data/{name}")
    folder = tmp_path / "pick"
    assert load(folder).prompts == ["train-00000.parquet", "train-00001.parquet"]
    assert load(folder, split="test").prompts == ["test-0.parquet"]
    assert load(folder / "data", split="test_unique").prompts == ["test_unique-0.parquet"]
    assert len(load(folder, split="validation")) == 4
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"no data of an accepted kind in .*seen: nothing"):
        load(tmp_path / "void")


def test_save_to_disk_folders(load: Any, make_columns: Any, tmp_path: Path) -> None:
    dataset = Dataset.from_dict(make_columns(3))
    dataset.select([2, 0]).save_to_disk(tmp_path / "single")
    DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "dict")
    assert load(tmp_path / "single").prompts == ["prompt 2", "prompt 0"]
    assert len(load(tmp_path / "dict", split="validation")) == 3
    with pytest.raises(ValueError, match=r"split is 'train', accepted for .*: validation"):
        load(tmp_path / "dict")


def test_a_selected_dataset_keeps_its_selection(load: Any, make_columns: Any) -> None:
    columns = make_columns(4)
    pairs = load(Dataset.from_dict(columns).select([3, 1]))
    assert pairs.prompts == ["prompt 3", "prompt 1"]
    assert pairs.row(0).image_0 == columns["jpg_0"][3]


@pytest.mark.reliability("D10")
def test_damaged_parquet_is_named(load: Any, make_columns: Any, write_parquet: Any) -> None:
    write_parquet(make_columns(2), "p/train-0.parquet")
    path = write_parquet(make_columns(40), "p/train-1.parquet")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"train-1\.parquet' cannot be read"):
        load(path.parent)
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(ValueError, match=r"train-1\.parquet' cannot be read"):
        load(path.parent)


def test_sources_that_do_not_exist(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "pairs.csv").write_text("caption")
    with pytest.raises(ValueError, match=r"type '\.csv'; accepted are parquet .*jsonl.*webdataset.*folder"):
        load(tmp_path / "pairs.csv")
    asked: dict[str, Any] = {}

    def refuse(name: str, config: str | None, **options: Any) -> None:
        asked.update(options, name=name, config=config)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"'some/pairs'.*no network.*Pick-a-Pic v1 and v2.*train_data_dir"):
        load("some/pairs", split="test", dataset_config_name="small")
    assert (asked["name"], asked["config"]) == ("some/pairs", "small")
    assert asked["split"] == "test"
    assert "trust_remote_code" not in asked


def test_held_out_prompts_are_on_one_side(load: Any, make_columns: Any) -> None:
    captions = [f"Prompt {row % 7}" if row % 2 else f"prompt  {row % 7} " for row in range(30)]
    pairs = load(make_columns(30, caption=captions))
    train, held = split_held_out(pairs, 6, seed=1)
    assert len(train) + len(held) == 30
    assert 6 <= len(held) <= 10
    assert {p.lower().split()[1] for p in train.prompts}.isdisjoint(p.lower().split()[1] for p in held.prompts)
    assert split_held_out(pairs, 6, seed=1)[1].pair_ids == held.pair_ids
    assert any(split_held_out(pairs, 6, seed=seed)[1].pair_ids != held.pair_ids for seed in (2, 3, 4))
    assert len(split_held_out(pairs, 0, seed=1)[1]) == 0
    for num_pairs in (-1, 30):
        with pytest.raises(ValueError, match=f"num_pairs is {num_pairs}"):
            split_held_out(pairs, num_pairs, seed=1)


def test_datasets_travel_to_other_processes(load: Any, make_columns: Any, write_parquet: Any) -> None:
    pairs = load(write_parquet(make_columns(3))).select([2, 1])
    copy = ForkingPickler.loads(ForkingPickler.dumps(pairs))
    assert copy.row(0) == pairs.row(0)
    assert np.array_equal(copy.p0, pairs.p0)
