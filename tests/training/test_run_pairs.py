"""The pairs of a run: label noise, ties, held-out prompts, and errors that name the setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        assert a["label"] == b["label"] == 1


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
