"""What a row means: which form its columns have, and the labels that each form gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from diffpref.data.forms import choose, score_columns
from diffpref.data.scan import BadRowsError
from diffpref.data.schema import share_of_votes


def _without_labels(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in columns.items() if not name.startswith("label")}


@pytest.mark.parametrize(
    ("names", "form"),
    [
        ("caption jpg_0 jpg_1 label_0 label_1 are_different has_label ranking_id user_id model_0 model_1 image_0_uid image_1_uid", "pairs"),
        ("prompt image_0 image_1 label_0", "pairs"),
        ("__key__ original_prompt jpg_0 jpg_1 label_0 label_1", "pairs"),
        ("prompt chosen rejected category", "chosen_rejected"),
        ("prompt_id prompt classification img_better img_worse", "chosen_rejected"),
        ("prompt image1 image2 votes_image1 votes_image2 model1 model2 detailed_results", "votes"),
        ("prompt image1 image2 weighted_results_image1_preference weighted_results_image2_preference", "votes"),
        ("prompt image_path rank raw_annotations", "ranked"),
        ("prompt generations ranking", "ranked"),
        ("image_path prompt_id prompt image_amount_in_total rank overall_rating", "ranked"),
        ("prompt file_path human_preference", "hpd"),
    ],
)
def test_known_sets_are_recognised(names: str, form: str) -> None:
    assert choose(names.split(), "x", "auto", {}, None).form == form


def test_hpd_reads_both_of_its_files() -> None:
    assert choose(["prompt", "image_path", "rank"], "x", "hpd", {}, None).form == "ranked"


def test_what_fits_twice_or_not_at_all_is_an_error() -> None:
    both = ["caption", "jpg_0", "jpg_1", "label_0", "votes_0", "votes_1"]
    with pytest.raises(ValueError, match=r"more than one form: pairs, votes .*data_format"):
        choose(both, "x", "auto", {}, None)
    assert choose(both, "x", "votes", {}, None).form == "votes"
    assert choose(both, "x", "auto", {"label_column": "label_0"}, None).form == "pairs"
    with pytest.raises(ValueError, match=r"fit no accepted form.*Found: a, b\..*chosen_rejected.*votes.*ranked.*hpd"):
        choose(["a", "b"], "x", "auto", {}, None)
    with pytest.raises(ValueError, match=r"for votes it lacks 'votes_0' \(nearest: vote_0"):
        choose(["caption", "jpg_0", "jpg_1", "vote_0", "votes_1"], "x", "votes", {}, None)


def test_two_named_images_do_not_say_which_is_better() -> None:
    names, given = ["prompt", "path1", "path2"], {"image_0_column": "path1", "image_1_column": "path2"}
    with pytest.raises(ValueError, match="fit no accepted form"):
        choose(names, "x", "auto", given, None)
    assert choose(names, "x", "chosen_rejected", given, None).columns["jpg_0"] == "path1"


def test_a_setting_without_use_is_an_error() -> None:
    with pytest.raises(ValueError, match="no use for label_column"):
        choose(["caption", "chosen", "rejected", "x"], "x", "chosen_rejected", {"label_column": "x"}, None)
    with pytest.raises(ValueError, match="no use for image_1_column"):
        choose(["prompt", "images", "rank", "x"], "x", "ranked", {"image_1_column": "x"}, None)


def test_chosen_and_rejected(load: Any, make_columns: Any, found: Any, tmp_path: Path) -> None:
    columns = make_columns(3)
    table = {"prompt": columns["caption"], "chosen": columns["jpg_0"], "rejected": columns["jpg_1"]}
    images = Dataset.from_dict(table).cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())
    images.to_parquet(tmp_path / "train-0.parquet")
    images.save_to_disk(tmp_path / "saved")
    want = [(c, a, b, 1.0) for c, a, b in zip(columns["caption"], columns["jpg_0"], columns["jpg_1"], strict=True)]
    for source in (table, images, tmp_path / "train-0.parquet", tmp_path / "saved"):
        assert found(load(source)) == want


def test_named_columns_of_chosen_pairs(load: Any, make_columns: Any, found: Any) -> None:
    columns = _without_labels(make_columns(2))
    pairs = load(columns, data_format="chosen_rejected", image_0_column="jpg_1", image_1_column="jpg_0")
    assert pairs.row(0).image_0 == columns["jpg_1"][0]
    assert pairs.p0.tolist() == [1.0, 1.0]


def test_votes_become_shares(load: Any, make_columns: Any) -> None:
    columns = _without_labels(make_columns(4)) | {"votes_0": [3, 0, 5, 2], "votes_1": [1, 4, 5, 1]}
    pairs = load(columns, tie_policy="keep")
    assert pairs.p0.tolist() == [0.75, 0.0, 0.5, 2 / 3]
    assert pairs.ties == 1


def test_hostile_votes_cost_their_rows(load: Any, make_columns: Any) -> None:
    inf, nan = math.inf, math.nan
    votes_0, votes_1 = [1.0, -1.0, nan, inf, None, 0.0, 1e308, 2.0], [0.0, 2.0, 1.0, 1.0, 1.0, 0.0, 1e308, -inf]
    pairs = load(_without_labels(make_columns(8)) | {"votes_0": votes_0, "votes_1": votes_1}, tie_policy="keep")
    assert pairs.p0.tolist() == [1.0, 0.5]
    kinds = [(entry.row, entry.column, entry.kind) for entry in pairs.rejected]
    wanted = [(1, "votes_0", "negative"), (2, "votes_0", "not finite"), (3, "votes_0", "not finite"), (4, "votes_0", "null")]
    assert kinds == [*wanted, (5, "votes_0", "no votes"), (7, "votes_1", "not finite")]
    with pytest.raises(BadRowsError, match="not a number: str"):
        load(_without_labels(make_columns(1)) | {"votes_0": ["3"], "votes_1": ["1"]})
    assert share_of_votes(True, 1) == ("votes_0", "not a number: bool 'True'")
    assert share_of_votes(10**400, 1) == ("votes_0", "not finite: " + "1" + "0" * 39)


@pytest.fixture
def ranked(encode: Any) -> dict[str, list[Any]]:
    """Three lists of embedded images: ranks 2, 1, 2, then 1, 2, then 3, 1, 2."""
    images = [[encode(10 * row + place) for place in range(count)] for row, count in enumerate((3, 2, 3))]
    return {"prompt": ["a", "b", "c"], "images": images, "rank": [[2, 1, 2], [1, 2], [3, 1, 2]]}


def test_all_pairs_of_a_ranking(load: Any, ranked: dict[str, Any], found: Any) -> None:
    pairs = load(ranked, tie_policy="keep")
    a, b, c = ranked["images"]
    want = [("a", a[0], a[1], 0.0), ("a", a[0], a[2], 0.5), ("a", a[1], a[2], 1.0), ("b", b[0], b[1], 1.0)]
    want += [("c", c[0], c[1], 0.0), ("c", c[0], c[2], 0.0), ("c", c[1], c[2], 1.0)]
    assert found(pairs) == want
    assert [pairs.row(index).ranking_id for index in range(7)] == list("0001222")
    assert load(ranked).ties == 1
    assert len(load(ranked)) == 6


def test_best_and_worst_of_a_ranking(load: Any, ranked: dict[str, Any], found: Any) -> None:
    pairs = load(ranked | {"rank": [[2, 1, 2], [1, 1], [3, 1, 2]]}, ranked_pairs="best_worst", tie_policy="keep")
    a, b, c = ranked["images"]
    assert found(pairs) == [("a", a[1], a[2], 1.0), ("b", b[0], b[1], 0.5), ("c", c[0], c[1], 0.0)]


def test_hostile_rankings_cost_their_lists(load: Any, ranked: dict[str, Any], encode: Any) -> None:
    many = [encode(seed) for seed in range(2)] * 33
    table = {
        "prompt": ["ok", "short", "nan", "null", "one", "many", "no list", None],
        "images": [ranked["images"][0][:2]] * 5 + [many, None, ranked["images"][0][:2]],
        "rank": [[1.0, 2.0], [1.0], [1.0, math.nan], [1.0, None], [1.0], [1.0] * 66, [1.0, 2.0], [1.0, 2.0]],
    }
    table["images"][4] = table["images"][4][:1]
    pairs = load(table)
    assert pairs.prompts == ["ok"]
    kinds = [(entry.row, entry.kind) for entry in pairs.rejected]
    wanted = [(1, "lists of unequal lengths"), (2, "not finite"), (3, "null"), (4, "wrong number of images"), (5, "wrong number of images")]
    assert kinds == [*wanted, (6, "not a list"), (7, "null")]
    with pytest.raises(ValueError, match=r"ranked_pairs is 'middle', accepted: all, best_worst"):
        load(ranked, ranked_pairs="middle")


def test_one_ranked_image_per_row(load: Any, found: Any, encode: Any, put: Any, tmp_path: Path) -> None:
    """ImageRewardDB's metadata: paths relative to the parquet file, rows of a prompt not always side by side."""
    for name in "abcde":
        put(f"ir/images/train/{name}.png", encode(ord(name)))
    table = {
        "image_path": [f"images/train/{name}.png" for name in "abcde"],
        "prompt_id": ["1", "2", "1", "2", "3"],
        "prompt": ["one", "two", "one", "two", "three"],
        "rank": [1, 2, 3, 1, 1],
    }
    pq.write_table(pa.table(table), tmp_path / "ir" / "metadata-train.parquet")
    pq.write_table(pa.table(table).slice(0, 0), tmp_path / "ir" / "metadata-test.parquet")
    pairs = load(tmp_path / "ir")
    want = [("one", encode(ord("a")), encode(ord("c")), 1.0), ("two", encode(ord("b")), encode(ord("d")), 0.0)]
    assert found(pairs) == want
    assert pairs.row(1).ranking_id == "2"
    assert [(entry.row, entry.kind) for entry in pairs.rejected] == [(4, "wrong number of images")]
    with pytest.raises(ValueError, match="no column prompt_id or ranking_id"):
        load({name: values for name, values in table.items() if name != "prompt_id"})


@pytest.fixture
def hpd(put: Any, encode: Any, tmp_path: Path) -> Path:
    """HPDv2 as it is distributed: train.json beside train/, test.json beside test/."""
    for name in ("train/a.png", "train/b.png", "test/a.png", "test/b.png", "test/c.png"):
        put(f"hpd/{name}", encode(len(name) + ord(name[-5]) + (300 if name.startswith("test") else 0)))
    put("hpd/train.json", json.dumps([{"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]}]))
    marks = {"raw_annotations": [{"rank": [1, 2, 3], "user_hash": 5}]}
    put("hpd/test.json", json.dumps([{"prompt": "q", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 3, 1]} | marks]))
    return tmp_path / "hpd"


@pytest.mark.parametrize("data_format", ["auto", "hpd"])
def test_hpd(load: Any, hpd: Path, found: Any, data_format: str) -> None:
    train, test = load(hpd, data_format=data_format), load(hpd, split="test", data_format=data_format)
    images = {str(path.relative_to(hpd)): path.read_bytes() for path in hpd.glob("*/*.png")}
    assert found(train) == [("p", images["train/a.png"], images["train/b.png"], 0.0)]
    a, b, c = (images[f"test/{name}.png"] for name in "abc")
    assert found(test) == [("q", a, b, 1.0), ("q", a, c, 0.0), ("q", b, c, 0.0)]
    assert load(hpd / "train.json").pair_ids == train.pair_ids


def test_hostile_hpd_rows(load: Any, put: Any, encode: Any) -> None:
    put("h/a.png", encode(1))
    put("h/b.png", encode(2))
    rows: list[Any] = [
        ["a.png", "b.png"],
        "a.png",
        ["a.png", "b.png"],
        ["a.png", "b.png"],
        ["a.png"] * 3,
        ["a.png", "../b.png"],
        ["a.png", 5],
    ]
    marks: list[Any] = [[1, 0], [1, 0], [1, 1], [1], [1, 0, 0], [1, 0], [1, 0]]
    objects = [{"prompt": "x", "file_path": row, "human_preference": mark} for row, mark in zip(rows, marks, strict=True)]
    pairs = load(put("h/train.json", json.dumps(objects)))
    assert len(pairs) == 1
    kinds = [entry.kind for entry in pairs.rejected]
    wanted = ["not a list", "labels do not sum to 1", "lists of unequal lengths", "wrong number of images", "outside the data folder"]
    assert kinds == [*wanted, "not a path"]


def test_scores_are_found_and_follow_the_pairs(load: Any, make_columns: Any) -> None:
    columns = make_columns(4, aes_0=[5, 6, 7, 8], aes_1=[1, 2, 3, 4], ps_score_0=[[0.1], [0.2], [0.3], []], ps_score_1=[[1.0]] * 4)
    columns |= {
        "name_0": list("abcd"),
        "name_1": list("abcd"),
        "lonely_0": [1, 2, 3, 4],
        "image_0_url": ["u"] * 4,
        "caption": ["w", "x", "", "z"],
    }
    pairs = load(columns)
    assert pairs.scores.keys() == {"aes", "ps_score"}
    assert pairs.scores["aes"].dtype == np.float64
    assert pairs.scores["aes"].tolist() == [[5, 1], [6, 2], [8, 4]]
    assert pairs.select([2, 0]).scores["aes"].tolist() == [[8, 4], [5, 1]]
    assert np.isnan(pairs.scores["ps_score"][2, 0])
    assert score_columns(["a_uid_0", "a_uid_1", "x_label_0", "x_label_1", "model_0", "model_1", "label_0", "label_1"], set()) == {}


def test_a_scorer_decides_in_place_of_the_label(load: Any, make_columns: Any) -> None:
    nan = math.nan
    columns = make_columns(5, hps_0=[0.3, 0.1, 0.2, nan, 0.9], hps_1=[0.1, 0.3, 0.2, 0.1, 0.1], label_0=[0.0, 1.0, 1.0, 1.0, 0.5])
    pairs = load(columns, choice_model="hps", tie_policy="keep")
    assert pairs.p0.tolist() == [1.0, 0.0, 0.5, 1.0]  # an equal score is a tie, a human tie is none
    assert [(entry.row, entry.column, entry.kind) for entry in pairs.rejected] == [(3, "hps_0", "no finite score")]
    assert load(columns, choice_model="hps").ties == 1
    unlabelled = _without_labels(columns)
    assert load(unlabelled, choice_model="hps", tie_policy="keep").p0.tolist() == pairs.p0.tolist()


def test_names_of_scorers(load: Any, make_columns: Any) -> None:
    columns = make_columns(2, ps_score_0=[[0.3], [0.1]], ps_score_1=[[0.2], [0.2]], aes_score_0=[1.0, 2.0], aes_score_1=[2.0, 1.0])
    assert load(columns, choice_model="pickscore").p0.tolist() == [1.0, 0.0]
    assert load(columns, choice_model="aes").p0.tolist() == [0.0, 1.0]
    with pytest.raises(
        ValueError, match=r"choice_model is 'clip', which needs numbers in the columns clip_0, clip_1 or clip_score_0.*add the"
    ):
        load(columns, choice_model="clip")
    with pytest.raises(ValueError, match="only one can decide"):
        load(columns, choice_model="aes", label_column="label_0")
    with pytest.raises(ValueError, match="accepted with: pairs, chosen_rejected"):
        load(columns, choice_model="aes", data_format="votes")


def test_only_pairs_of_dreamlike_models(load: Any, make_columns: Any) -> None:
    models = {"model_0": ["dreamlike-art/x", "dream", "sdxl", None], "model_1": ["dream", "sdxl", "sdxl", "dream"]}
    pairs = load(make_columns(4, **models), dreamlike_pairs_only=True)
    assert (pairs.prompts, pairs.left_out, pairs.rejected) == (["prompt 0"], 3, [])
    with pytest.raises(ValueError, match="no columns model_0 and model_1"):
        load(make_columns(1), dreamlike_pairs_only=True)
    with pytest.raises(BadRowsError, match="dreamlike_pairs_only leaves none of 1 pairs"):
        load(make_columns(1, model_0=["a"], model_1=["b"]), dreamlike_pairs_only=True)


def test_best_and_worst_acts_on_lists_only(load: Any, make_columns: Any) -> None:
    with pytest.raises(ValueError, match=r"ranked_pairs is 'best_worst', but the data has the form pairs"):
        load(make_columns(1), ranked_pairs="best_worst")


def test_tables_out_of_webdataset_archives(load: Any, make_columns: Any, found: Any) -> None:
    """The hub's own reader of archives names columns after files, keeps text as text and JSON as one column."""
    columns = make_columns(3)
    files = {"original_prompt.txt": columns["caption"], "jpg_0.jpg": columns["jpg_0"], "jpg_1.jpg": columns["jpg_1"]}
    labels = {"label_0.txt": [str(x) for x in columns["label_0"]], "label_1.txt": [str(x) for x in columns["label_1"]]}
    assert found(load(files | labels)) == found(load(columns))
    members = [{"prompt": c, "label_0": x} for c, x in zip(columns["caption"], columns["label_0"], strict=True)]
    assert found(load({"jpg_0": columns["jpg_0"], "jpg_1": columns["jpg_1"], "json": members})) == found(load(columns))
    with pytest.raises(BadRowsError, match="not a number: str 'left'"):
        load(files | {"label_0.txt": ["left"] * 3, "label_1.txt": ["0"] * 3})


def test_parquet_files_keep_only_what_is_needed(load: Any, make_columns: Any, write_parquet: Any) -> None:
    path = write_parquet(make_columns(2, big=[b"x" * 1000] * 2, aes_0=[1.0, 2.0], aes_1=[2.0, 1.0]))
    pairs = load(path)
    assert set(pairs.table.rows.names) == {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "aes_0", "aes_1"}
    assert pairs.scores["aes"].tolist() == [[1, 2], [2, 1]]


def test_paths_in_parquet_are_relative_to_its_folder(load: Any, make_columns: Any, put: Any, write_parquet: Any, found: Any) -> None:
    columns = make_columns(2)
    for side in ("jpg_0", "jpg_1"):
        columns[side] = [str(put(f"p/{side}-{row}.png", data).name) for row, data in enumerate(columns[side])]
    columns["jpg_0"][1] = "/etc/passwd"
    pairs = load(write_parquet(columns, "p/train-0.parquet"))
    assert found(pairs) == found(load(make_columns(2)))[:1]
    assert [(entry.row, entry.column, entry.kind) for entry in pairs.rejected] == [(1, "jpg_0", "absolute path")]
    structs = columns | {side: [{"bytes": None, "path": name} for name in columns[side]] for side in ("jpg_0", "jpg_1")}
    again = load(write_parquet(structs, "p/train-0.parquet"))
    assert found(again) == found(pairs)
    assert [entry.kind for entry in again.rejected] == ["absolute path"]


def test_what_was_found_is_said(load: Any, make_columns: Any, write_parquet: Any) -> None:
    columns = make_columns(2)
    columns["prompt"] = columns.pop("caption")
    said: list[str] = []
    load(write_parquet(columns), say=said.append)
    assert len(said) == 1
    for part in ("parquet", "train-0.parquet", "2 rows of the form pairs (caption from prompt)"):
        assert part in said[0]
