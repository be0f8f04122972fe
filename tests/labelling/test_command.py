"""From prompts to pairs, from pairs to scores: what is written, and that interrupted work goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref import cli
from diffpref.data.pairs import load_pairs
from diffpref.labelling import pairs as making
from diffpref.labelling.command import LabelConfig, label
from diffpref.labelling.pairs import pair_up, picture_seed, score_shards

PROMPTS = [f"prompt {i}" for i in range(7)]


def draw(texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Pictures of one grey, which the seed decides."""
    return np.stack([np.full((8, 8, 3), seed % 251, np.uint8) for seed in seeds])


def brightness(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """A scorer."""
    return np.array([np.asarray(image).mean() for image in images])


def darkness(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """Its opposite."""
    return -brightness(images, prompts)


def scored(folder: Path, num_images: int = 3, **more: Any) -> None:
    """Shards of two prompts each."""
    folder.mkdir(exist_ok=True)
    score_shards(folder, PROMPTS, num_images, 2, 5, draw, {"bright": brightness}, "png", **more)


def test_new_pairs_are_in_the_schema_that_training_reads(tmp_path: Path) -> None:
    scored(tmp_path)
    report = pair_up(tmp_path, 4, ["bright"], "mean_z", "best_worst", 0.0, 5, "a-model")
    assert report["pairs"] == len(PROMPTS)
    table = pa.concat_tables([pq.read_table(p) for p in sorted(tmp_path.glob("train-*.parquet"))]).to_pylist()
    for i, row in enumerate(table):
        greys = [picture_seed(5, i, k) % 251 for k in range(3)]
        assert row["caption"] == PROMPTS[i]
        assert {row["bright_0"], row["bright_1"]} == {max(greys), min(greys)}
        assert row["label_0"] == float(row["bright_0"] > row["bright_1"]) == 1 - row["label_1"]
        assert row["model_0"] == "a-model"
    assert 0 < sum(row["label_0"] for row in table) < len(table)  # left and right are mixed
    loaded = load_pairs(tmp_path, split="train", cache_dir=tmp_path / "cache")
    assert len(loaded) == len(PROMPTS)


def test_ranked_lists_keep_all_pictures(tmp_path: Path) -> None:
    scored(tmp_path)
    pair_up(tmp_path, 4, ["bright"], "mean_z", "ranked", 0.0, 5, "a-model")
    rows = pa.concat_tables([pq.read_table(p) for p in sorted(tmp_path.glob("train-*.parquet"))]).to_pylist()
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        assert len(row["images"]) == 3
        assert [row["bright"][k] for k in np.argsort(row["rank"])] == sorted(row["bright"], reverse=True)
    assert len(load_pairs(tmp_path, tie_policy="keep", cache_dir=tmp_path / "cache")) == 3 * len(PROMPTS)


def test_two_ranks_and_an_interruption_give_the_same_files(tmp_path: Path) -> None:
    scored(tmp_path / "whole")
    calls: list[int] = []

    def failing(texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(texts, seeds)

    parts = tmp_path / "parts"
    parts.mkdir()
    with pytest.raises(KeyboardInterrupt):
        score_shards(parts, PROMPTS, 3, 2, 5, failing, {"bright": brightness}, "png", rank=0, world=2)
    assert sorted(p.name for p in parts.iterdir()) == [".drawn-00002", "scored-00000.parquet"]
    before = (parts / "scored-00000.parquet").stat().st_mtime_ns
    for rank in (1, 0):
        scored(parts, rank=rank, world=2)
    assert (parts / "scored-00000.parquet").stat().st_mtime_ns == before
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in parts.iterdir()) == names
    assert all(pq.read_table(parts / n).equals(pq.read_table(tmp_path / "whole" / n)) for n in names)


def test_jpeg_pictures_are_scored_as_they_are_stored(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)

    def noisy(texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return np.concatenate([noise] * len(texts))

    seen: list[np.ndarray] = []

    def watching(images: Any, prompts: Sequence[str]) -> np.ndarray:
        seen.append(np.asarray(images))
        return np.arange(len(images))

    score_shards(tmp_path, ["a"], 2, 1, 0, noisy, {"watching": watching}, "jpeg")
    stored = pq.read_table(tmp_path / "scored-00000.parquet").to_pylist()[0]["images"][0]
    assert stored[:2] == b"\xff\xd8"
    assert not np.array_equal(seen[0][0], noise[0])


@pytest.fixture
def existing(pair_columns: dict[str, list[object]], tmp_path: Path) -> Path:
    """Six pairs, one of them with a picture that is none, one a tie."""
    columns = {name: list(values[:6]) for name, values in pair_columns.items()}
    columns["jpg_1"][2] = b"no picture"
    columns["label_0"][4] = columns["label_1"][4] = 0.5
    path = tmp_path / "existing.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def settings(existing: Path, tmp_path: Path, **more: Any) -> LabelConfig:
    """Scoring existing pairs."""
    given = {"train_data_dir": str(existing), "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "shard_size": 4}
    return LabelConfig(scorers=("bright",), **given | more)


def test_existing_pairs_get_scores_beside_their_label(existing: Path, tmp_path: Path) -> None:
    assert label(settings(existing, tmp_path), {"bright": brightness}) == 0
    rows = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "out").glob("train-*.parquet"))]).to_pylist()
    assert len(rows) == 5
    assert [row["label_0"] for row in rows] == [0.0, 1.0, 1.0, 0.5, 1.0]
    for row in rows:
        assert row["bright_0"] == np.asarray(Image.open(BytesIO(row["jpg_0"]))).mean()
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rejected] == [2]
    assert rejected[0]["reason"].startswith("jpg_1: not a JPEG")
    report = json.loads((tmp_path / "out" / "label_report.json").read_text())
    assert (report["pairs"], report["rejected"], report["ties"]) == (5, 1, 1)
    values = [row[f"bright_{k}"] for row in rows for k in (0, 1)]
    assert report["score_range"] == {"bright": [min(values), max(values)]}


def test_every_row_that_is_set_aside_is_listed_with_its_reason(
    pair_columns: dict[str, list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {name: list(values[:8]) for name, values in pair_columns.items()}
    narrow = BytesIO()
    Image.new("RGB", (1, 9000)).save(narrow, "PNG")
    columns["jpg_0"][1], columns["caption"][3] = narrow.getvalue(), "  "
    columns["jpg_0"][5] = None
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")

    def square(images: Any, prompts: Sequence[str]) -> np.ndarray:
        for n, image in enumerate(images):
            if image.height > 1000:
                raise ValueError(f"image {n} is too long and narrow")
        return brightness(images, prompts)

    assert label(settings(tmp_path / "pairs.parquet", tmp_path), {"bright": square}) == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected_rows.jsonl").read_text().splitlines()]
    assert {row["row"]: row["reason"] for row in rejected} == {
        1: "jpg_0: bright: image 0 is too long and narrow",
        3: "caption: empty",
        5: "image: null",
    }
    report = json.loads((tmp_path / "out" / "label_report.json").read_text())
    assert (report["pairs"], report["rejected"]) == (5, 3)
    assert "3 rows were set aside; the reasons are in" in capsys.readouterr().err


def test_a_prompt_with_a_refused_picture_is_set_aside(tmp_path: Path) -> None:
    def choosy(images: Any, prompts: Sequence[str]) -> np.ndarray:
        if "prompt 3" in prompts:
            raise ValueError("no threes")
        return brightness(images, prompts)

    score_shards(tmp_path, PROMPTS, 3, 2, 5, draw, {"bright": choosy}, "png")
    for which in ("best_worst", "ranked", "all"):
        report = pair_up(tmp_path, 4, ["bright"], "mean_z", which, 0.0, 5, "a-model")
        assert (report["prompts"], report["rejected"], report["undecided"]) == (7, 1, 0)
        rows = pa.concat_tables([pq.read_table(p) for p in sorted(tmp_path.glob("train-*.parquet"))])
        assert "prompt 3" not in rows.column(0).to_pylist()
        assert len(set(rows.column(0).to_pylist())) == 6
    (line,) = (tmp_path / "rejected_rows.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row": 3, "of": "prompt 3", "reason": "bright: no threes"}


def test_the_form_of_existing_pairs_may_be_named(existing: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for votes it lacks 'votes_0'"):
        label(settings(existing, tmp_path, data_format="votes"), {"bright": brightness})


def test_scorers_may_decide_and_the_human_label_is_kept(existing: Path, tmp_path: Path) -> None:
    label(settings(existing, tmp_path, rule="mean_z"), {"bright": brightness})
    rows = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "out").glob("train-*.parquet"))]).to_pylist()
    for row in rows:
        assert row["label_0"] == float(row["bright_0"] > row["bright_1"])
    assert [row["human_label_0"] for row in rows] == [0.0, 1.0, 1.0, 0.5, 1.0]
    report = json.loads((tmp_path / "out" / "label_report.json").read_text())
    assert report["accuracy"]["bright"]["pairs"] == 4
    assert report["labels_changed"] == sum(row["label_0"] != row["human_label_0"] for row in rows)
    opposite = tmp_path / "opposite"
    label(settings(existing, tmp_path, rule="mean_z", output_dir=str(opposite)), {"bright": darkness})
    other = json.loads((opposite / "label_report.json").read_text())["accuracy"]["bright"]["value"]
    assert report["accuracy"]["bright"]["value"] + other == pytest.approx(1.0)


def test_a_started_folder_is_continued_or_refused(existing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label(settings(existing, tmp_path), {"bright": brightness})

    def never(images: Any, prompts: Sequence[str]) -> np.ndarray:
        raise AssertionError("scored again")

    label(settings(existing, tmp_path), {"bright": never})
    with pytest.raises(ValueError, match=r"other settings \(min_margin: 0.0 -> 0.5\)"):
        label(settings(existing, tmp_path, min_margin=0.5), {"bright": brightness})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        label(settings(existing, tmp_path, output_dir=str(tmp_path / "foreign")), {"bright": brightness})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scorers", "testbed"], "give prompts"),
        (["--prompts", "a", "--train_data_dir", "b", "--scorers", "testbed"], "give prompts"),
        (["--prompts", "a"], "scorers is empty"),
        (["--prompts", "a", "--scorers", "testbed", "--num_images_per_prompt", "1"], "needs at least 2"),
        (["--prompts", "a", "--scorers", "testbed", "--rule", "median"], "accepted: mean_z"),
        (["--prompts", "a", "--scorers", "testbed", "--pairs", "some"], "best_worst, all, ranked"),
        (["--prompts", "a", "--scorers", "testbed", "--min_margin", "-1"], "min_margin is -1"),
        (["--prompts", "a", "--scorers", "testbed", "--split", "own"], "split is own, which has no meaning for making pairs"),
        (["--train_data_dir", "a", "--scorers", "testbed", "--pairs", "all"], "pairs is all, which has no meaning for scoring"),
        (["--prompts", "a lighthouse", "--scorers", "testbed", "--output_dir", "unused"], "scorer 'testbed' refuses a grey picture"),
    ],
)
def test_bad_settings_end_with_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label", *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.strip().splitlines()) == 1


def test_undecided_prompts_are_an_error_when_nothing_is_left(tmp_path: Path) -> None:
    score_shards(tmp_path, PROMPTS, 2, 8, 5, draw, {"bright": brightness, "dark": darkness}, "png")
    with pytest.raises(ValueError, match="rule 'majority'"):
        pair_up(tmp_path, 1, ["bright", "dark"], "majority", "best_worst", 0.0, 5, "a-model")
    assert callable(making.agreement)
    assert making.agreement({"a": np.array([[1.0, 2.0]]), "b": np.array([[2.0, 1.0]])}) == {"a and b": 0.0}


def test_the_testbed_journey_from_prompts_to_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle on a gray background\n")
    words = ["--prompt_file", str(prompts), "--scorers", "testbed", "--num_images_per_prompt", "2", "--num_inference_steps", "2"]
    assert cli.main(["label", *words, "--output_dir", str(tmp_path / "pairs")]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 1
    assert len(load_pairs(tmp_path / "pairs", split="train", cache_dir=tmp_path / "cache")) == 1
