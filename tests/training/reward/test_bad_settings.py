"""What a user can get wrong when fitting a reward model: one line, exit code 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref import cli

Settings = dict[str, Any]


def broken_row(base: Settings, folder: Path) -> Settings:
    """One picture is no picture, and nothing is checked at the start."""
    table = pq.read_table(base["train_data_dir"]).to_pydict()
    table["jpg_1"][5] = b"no picture"
    pq.write_table(pa.table(table), folder / "broken.parquet")
    return {"train_data_dir": str(folder / "broken.parquet"), "held_out_pairs": 0, "max_train_steps": 20}


def only_ties(base: Settings, folder: Path) -> Settings:
    """No pair has a winner."""
    table = pq.read_table(base["train_data_dir"]).to_pydict()
    pq.write_table(pa.table(table | {"label_0": [0.5] * 36, "label_1": [0.5] * 36}), folder / "ties.parquet")
    return {"train_data_dir": str(folder / "ties.parquet")}


def pipeline_config(base: Settings, folder: Path) -> Settings:
    """A configuration of another model."""
    (folder / "unet.json").write_text('{"sample_size": 8}')
    return {"clip_config": str(folder / "unet.json")}


BAD: dict[str, tuple[Settings | Callable[[Settings, Path], Settings], list[str]]] = {
    "no model": ({"clip_config": None, "tokenizer_name": None}, ["pretrained_model_name_or_path is None", "give one of them"]),
    "two models": ({"pretrained_model_name_or_path": "x"}, ["clip_config", "give one of them"]),
    "no tokenizer": ({"tokenizer_name": None}, ["tokenizer_name is None", "needs both"]),
    "no data": ({"train_data_dir": None}, ["train_data_dir and dataset_name are both missing"]),
    "missing model": (
        {"clip_config": None, "tokenizer_name": None, "pretrained_model_name_or_path": "./nowhere"},
        ["pretrained_model_name_or_path", "./nowhere"],
    ),
    "missing config": ({"clip_config": "./nowhere.json"}, ["clip_config 'nowhere.json' is not a file"]),
    "another model's config": (pipeline_config, ["unet.json", "has no vision_config"]),
    "broken picture": (broken_row, ["pair ", "check_images"]),
    "only ties": (only_ties, ["held_out_pairs is 6", "ties"]),
    "too many held out": ({"held_out_pairs": 36}, ["held_out_pairs is 36"]),
    "unknown flag": ({"learning_rat": 1}, ["did you mean learning_rate?"]),
    "steps": ({"max_train_steps": 0}, ["max_train_steps is 0", "at least 1"]),
    "validation steps": ({"validation_steps": 0}, ["validation_steps is 0", "at least 1"]),
    "threads": ({"dataloader_num_workers": 0}, ["dataloader_num_workers is 0", "at least 1"]),
    "momentum": ({"adam_beta2": 1.0}, ["adam_beta2 is 1.0", "below 1"]),
    "dtype": ({"export_dtype": "int8"}, ["export_dtype is 'int8'", "float32, float16"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, base: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = BAD[case]
    settings = base | {"output_dir": tmp_path / "run"} | (change(base, tmp_path) if callable(change) else change)
    words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value).lower())]
    assert cli.main(["train-reward-model", *words]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
    assert line.startswith("error: ")
    for text in expected:
        assert text in line
    assert case == "broken picture" or not (tmp_path / "run").exists()


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train-reward-model", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--held_out_pairs" in text
    assert "held_out_pairs  (int, default 500)\n      Pairs kept out" in text
