"""`diffpref export`: settings that cannot work, outputs that are left alone, weights that do not fit a dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from diffpref import cli


def run(**settings: Any) -> int:
    """The command with these settings."""
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in settings.items()]
    return cli.main(["export", *(word for pair in words for word in pair)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the user sees last."""
    return capsys.readouterr().err.strip().splitlines()[-1]


@contextmanager
def nothing_new(folder: Path) -> Iterator[None]:
    """What lies in the folder stays as it was."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_only_what_is_ours_is_replaced(sd_folder: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with nothing_new(tmp_path):
        assert run(aligned=sd_folder, format="pipeline", output=output) == 2
        assert "--overwrite" in error_of(capsys)
        assert run(aligned=sd_folder, format="pipeline", output=output, overwrite=True) == 2
        assert "is not a pipeline folder" in error_of(capsys)
    (output / "model_index.json").write_text("{}")
    assert run(aligned=sd_folder, format="pipeline", output=output, overwrite=True) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert not (output / "thesis.txt").exists()
    assert "unet" in json.loads((output / "model_index.json").read_text())


def test_a_folder_that_cannot_be_written(sd_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert run(aligned=sd_folder, format="pipeline", output=tmp_path / "file" / "model") == 2
    assert "could not be written" in error_of(capsys)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({"format": "kohya", "output": "k.safetensors"}, ["lora is None and aligned None"]),
    "both": ({"lora": "a", "aligned": "b", "format": "kohya", "output": "k.safetensors"}, ["give one of the two"]),
    "no format": ({"lora": "a", "output": "k.safetensors"}, ["format is not given", "single_file"]),
    "unknown format": ({"lora": "a", "format": "ckpt", "output": "k.ckpt"}, ["format is 'ckpt'", "kohya"]),
    "no output": ({"lora": "a", "format": "kohya"}, ["output is not given"]),
    "no safetensors": ({"lora": "a", "format": "kohya", "output": "k.pt"}, ["output is 'k.pt'", ".safetensors"]),
    "file for a folder": ({"lora": "a", "format": "pipeline", "output": "k.safetensors"}, ["format pipeline writes a folder"]),
    "kohya of a model": ({"aligned": "a", "format": "kohya", "output": "k.safetensors"}, ["format is kohya", "use format pipeline"]),
    "base of a model": (
        {"aligned": "a", "format": "pipeline", "output": "k", "pretrained_model_name_or_path": "b"},
        ["pretrained_model_name_or_path is 'b'", "leave it out"],
    ),
    "strength of a model": ({"aligned": "a", "format": "pipeline", "output": "k", "lora_scale": 0.5}, ["lora_scale is 0.5"]),
    "revision without a base": (
        {"lora": "a", "format": "kohya", "output": "k.safetensors", "revision": "x"},
        ["revision is 'x'", "run's own"],
    ),
    "missing model": ({"aligned": "./nowhere", "format": "pipeline", "output": "k"}, ["./nowhere"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    settings, expected = BAD[case]
    assert run(**settings) == 2
    line = error_of(capsys)
    for text in expected:
        assert text in line
    assert not list(tmp_path.iterdir())


def test_weights_that_overflow_are_refused(sd_folder: Path, tmp_path: Path, capsys: Any) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    pipeline.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = 1e5
    pipeline.save_pretrained(tmp_path / "large")
    assert run(aligned=tmp_path / "large", format="single_file", output=tmp_path / "x.safetensors", dtype="fp16") == 2
    assert "vae.decoder.conv_in.weight is not finite in dtype fp16; use --dtype bf16" in error_of(capsys)
