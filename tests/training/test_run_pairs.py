"""The pairs of a run: label noise, ties, held-out prompts, and errors that name the setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffpref.data.loader import PairPixels
from diffpref.training.config import TrainConfig
from diffpref.training.pairs import load_run_pairs

Load = Callable[..., Any]


@pytest.fixture
def load(base_settings: dict[str, Any]) -> Load:
    """load(**settings) -> (training pairs, held-out pairs)"""

    def run(**settings: Any) -> Any:
        return load_run_pairs(TrainConfig(**(base_settings | settings)), True)

    return run


def test_label_noise_of_one_swaps_chosen_and_rejected(load: Load) -> None:
    (plain, _), (turned, _) = load(), load(label_noise_prob=1.0)
    assert turned.pair_ids == plain.pair_ids
    assert (turned.p0 == 1 - plain.p0).all()
    for index in range(4):
        a, b = PairPixels(plain, 32)[index, 0], PairPixels(turned, 32)[index, 0]
        assert torch.equal(a["pixels"], b["pixels"].flip(0))
        assert a["chosen_first"] != b["chosen_first"]
        assert a["relevance"].tolist() == b["relevance"].tolist() == [1, 0]


def test_label_noise_is_fixed_per_pair_and_about_as_frequent_as_asked(load: Load) -> None:
    (plain, _), (noisy, _), (again, _) = load(), load(label_noise_prob=0.5), load(label_noise_prob=0.5, max_train_samples=10)
    flipped = noisy.p0 != plain.p0
    assert 4 < flipped.sum() < 20
    assert (again.p0 == noisy.p0[:10]).all()
    assert (load(label_noise_prob=0.5, seed=1)[0].p0 != noisy.p0).any()


def test_held_out_prompts_are_not_trained_on(load: Load) -> None:
    train, held = load(held_out_pairs=5)
    assert len(held) >= 5
    assert len(train) + len(held) == 24
    assert not set(train.prompts) & set(held.prompts)
    assert load()[1] is None


def test_held_out_labels_are_never_flipped(load: Load) -> None:
    (_, plain), (_, noisy) = load(held_out_pairs=6), load(held_out_pairs=6, label_noise_prob=1.0)
    assert (plain.p0 == noisy.p0).all()


@pytest.mark.parametrize(("policy", "pairs"), [("drop", 23), ("keep", 24)])
def test_ties(
    policy: str, pairs: int, load: Load, pair_columns: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = pair_columns | {name: [0.5, *pair_columns[name][1:]] for name in ("label_0", "label_1")}
    pq.write_table(pa.table(tied), tmp_path / "pairs.parquet")
    train, _ = load(train_data_dir=str(tmp_path / "pairs.parquet"), tie_policy=policy)
    assert len(train) == pairs
    assert f"{pairs} pairs, 1 ties" in capsys.readouterr().err


def test_errors_name_the_setting_in_one_line(load: Load, pair_columns: dict[str, list[Any]], tmp_path: Path) -> None:
    pq.write_table(pa.table(pair_columns | {"label_0": [1.0] * 24, "label_1": [1.0] * 24}), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"train_data_dir .*none of 24 rows can be used") as caught:
        load(train_data_dir=str(tmp_path / "pairs.parquet"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"train_data_dir '\./nowhere'"):
        load(train_data_dir="./nowhere")


def test_column_settings_reach_the_reader(load: Load, pair_columns: dict[str, list[Any]], tmp_path: Path) -> None:
    names = {"caption": "c", "jpg_0": "a", "jpg_1": "b", "label_0": "l"}
    table = {names.get(name, name): values for name, values in pair_columns.items()} | {"who": list(range(24))}
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    flags = {"caption_column": "c", "image_0_column": "a", "image_1_column": "b", "label_column": "l", "user_column": "who"}
    pairs, _ = load(train_data_dir=str(tmp_path / "pairs.parquet"), **flags)
    assert pairs.prompts == pair_columns["caption"]
    assert pairs.user_ids == [str(row) for row in range(24)]
    with pytest.raises(ValueError, match=r"train_data_dir .*caption_column is 'd', which is no column"):
        load(train_data_dir=str(tmp_path / "pairs.parquet"), **(flags | {"caption_column": "d"}))


def test_the_other_settings_reach_the_reader(load: Load, pair_columns: dict[str, list[Any]], tmp_path: Path, capsys: Any) -> None:
    plain = {name: values for name, values in pair_columns.items() if not name.startswith("label")}
    scores = {"hps_0": [1.0] * 24, "hps_1": [0.0] * 24, "model_0": ["dream"] * 24, "model_1": ["dream", "other"] * 12}
    path = str(tmp_path / "pairs.parquet")
    pq.write_table(pa.table(plain | scores), path)
    pairs, _ = load(train_data_dir=path, choice_model="hps", dreamlike_pairs_only=True)
    assert pairs.p0.tolist() == [1.0] * 12
    told = capsys.readouterr().err
    assert "24 rows of the form pairs" in told
    assert "12 pairs of other models left out" in told
    pq.write_table(pa.table(plain | {"votes_0": [3] * 24, "votes_1": [1] * 24}), path)
    assert load(train_data_dir=path, data_format="votes")[0].p0.tolist() == [0.75] * 24
    lists = {"prompt": ["a"], "images": [pair_columns["jpg_0"][:3]], "rank": [[1, 2, 3]]}
    pq.write_table(pa.table(lists), path)
    assert [len(load(train_data_dir=path, ranked_pairs=which)[0]) for which in ("all", "best_worst")] == [3, 1]
    with pytest.raises(ValueError, match=r"train_data_dir .*data_format is 'csv', accepted: auto, pairs"):
        load(train_data_dir=path, data_format="csv")


def test_a_hub_data_set_is_asked_for_with_its_configuration(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options["split"])) or 1 / 0)
    with pytest.raises(ValueError, match=r"dataset_name 'some/pairs': 'some/pairs' is no local file or folder.*ZeroDivisionError"):
        load(train_data_dir=None, dataset_name="some/pairs", dataset_config_name="8k", split="test")
    assert asked == [(("some/pairs", "8k"), "test")]
    with pytest.raises(ValueError, match=r"dataset_config_name is '8k', but dataset_name is not given"):
        load(dataset_config_name="8k")


@pytest.mark.parametrize(("name", "value"), [("held_out_pairs", 2), ("label_noise_prob", 0.5), ("cache_latents", True)])
def test_streaming_refuses_what_needs_all_pairs(load: Load, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value} together with streaming"):
        load(streaming=True, max_train_samples=8, **{name: value})
    with pytest.raises(ValueError, match="streaming is true without max_train_samples"):
        load(streaming=True)


def test_a_streamed_run_goes_on_as_if_it_had_not_stopped(
    run_training: Callable[..., Path], read_metrics: Any, read_state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"streaming": True, "max_train_samples": 24, "cache_dir": str(tmp_path / "cache")}
    whole = run_training("whole", max_train_steps=6, **settings)
    assert "kept in" in capsys.readouterr().err
    run_training("parts", max_train_steps=2, **settings)
    parts = run_training("parts", max_train_steps=6, resume_from_checkpoint="latest", **settings)
    a, b = read_state(whole, 6), read_state(parts, 6)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(parts) == read_metrics(whole)
    fresh = run_training("fresh", max_train_steps=6, **(settings | {"cache_dir": str(tmp_path / "another")}))
    assert read_metrics(fresh) == read_metrics(whole)
