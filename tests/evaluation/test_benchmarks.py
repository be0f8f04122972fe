"""Layouts as the official scorers read them, and their results read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpref.evaluation.benchmarks import BENCHMARKS


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Pictures of one grey each: grey 10 i + k."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i in range(3):
        for k in range(10):
            Image.new("RGB", (8, 6), (10 * i + k,) * 3).save(folder / f"{i}-{k}.png")
    return folder


def grey(path: Path) -> int:
    """The value of a picture."""
    return int(np.asarray(Image.open(path).convert("L")).mean().round())


def test_geneval(drawn: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"tag": "counting", "prompt": f"{n} cats", "include": [{"class": "cat", "count": n}]}) for n in (2, 3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    benchmark = BENCHMARKS["geneval"]
    entries = benchmark.read(tmp_path / "metadata.jsonl")
    assert [e.prompt for e in entries] == ["2 cats", "3 cats"]
    for _ in range(2):  # a second time changes nothing
        benchmark.lay_out(entries, lambda i, k: drawn / f"{i}-{k}.png", 4, tmp_path / "out")
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == [f"{n}/{name}" for n in ("00000", "00001") for name in ("metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4)))]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == json.loads(lines[1])
    assert grey(tmp_path / "out/00001/samples/0003.png") == 13


def test_geneval_results_are_means_over_pictures_of_each_task(tmp_path: Path) -> None:
    shares = {"single_object": 1.0, "two_object": 0.8, "counting": 0.4, "colors": 0.85, "position": 0.1, "color_attr": 0.25}
    rows = [{"tag": tag, "correct": k < 20 * share, "metadata": "x"} for tag, share in shares.items() for k in range(20)]
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = BENCHMARKS["geneval"].results(tmp_path / "results.jsonl")
    assert found == pytest.approx(shares | {"overall": 0.5666666666666667})


def test_dpg(drawn: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("stanford12", "partiprompts7"):
        (prompts / f"{name}.txt").write_text(f"prompt of {name}\n")
    benchmark = BENCHMARKS["dpg"]
    entries = benchmark.read(prompts)
    assert [(e.key, e.prompt) for e in entries][1] == ("stanford12", "prompt of stanford12")
    benchmark.lay_out(entries, lambda i, k: drawn / f"{i}-{k}.png", 4, tmp_path / "out")
    grid = np.asarray(Image.open(tmp_path / "out" / "stanford12.png").convert("L"))
    assert grid.shape == (12, 16)
    assert [grid[0, 0], grid[0, 8], grid[6, 0], grid[6, 8]] == [10, 11, 12, 13]


def test_dpg_results(tmp_path: Path) -> None:
    text = "a/b.png, 1.0, 0.5, 0.75\na/c.png, 0.25, 0.25, 0.25\nModel: m\nL1 category scores:\n\tentity: 81.25\nDPG-Bench score: 50.0\n"
    (tmp_path / "results.txt").write_text(text)
    assert BENCHMARKS["dpg"].results(tmp_path / "results.txt") == {"overall": 50.0, "entity": 81.25}


def test_t2i_compbench(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\tnote\na red cup\n\n")
    benchmark = BENCHMARKS["t2i_compbench"]
    entries = benchmark.read(tmp_path / "color_val.txt")
    benchmark.lay_out(entries, lambda i, k: drawn / f"{i}-{k}.png", 10, tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out" / "samples").iterdir())
    assert len(names) == 20
    assert names[0] == "a green bench and a blue bowl_000000.png"
    assert grey(tmp_path / "out" / "samples" / "a red cup_000013.png") == 13
    (tmp_path / "vqa_result.json").write_text(json.dumps([{"question_id": 0, "answer": "0.25"}, {"question_id": 1, "answer": "0.75"}]))
    assert benchmark.results(tmp_path / "vqa_result.json") == {"overall": 0.5}


def test_hpdv2(drawn: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "anime.json").write_text(json.dumps(["a", "b"]))
    (prompts / "photo.json").write_text(json.dumps(["c"]))
    benchmark = BENCHMARKS["hpdv2"]
    entries = benchmark.read(prompts)
    benchmark.lay_out(entries, lambda i, k: drawn / f"{i}-{k}.png", 1, tmp_path / "out")
    assert grey(tmp_path / "out" / "anime" / "00001.jpg") == pytest.approx(10, abs=1)
    assert grey(tmp_path / "out" / "photo" / "00000.jpg") == pytest.approx(20, abs=1)
    (tmp_path / "scores.json").write_text(json.dumps({"anime": [0.2, 0.4], "photo": 0.1}))
    assert benchmark.results(tmp_path / "scores.json") == pytest.approx({"anime": 0.3, "photo": 0.1, "overall": 0.2})


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("what", ["read", "results"])
def test_what_cannot_be_read_is_named(name: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (None, "not what it should be"):
        if content:
            path.write_text(content)
        if (name, what, content) == ("t2i_compbench", "read", content) and content:
            continue  # any line is a prompt
        with pytest.raises(ValueError, match="file"):
            getattr(BENCHMARKS[name], what)(path)


def test_prompts_that_are_no_file_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a cup and/or a bowl\n")
    with pytest.raises(ValueError, match="cannot be a file name"):
        BENCHMARKS["t2i_compbench"].read(tmp_path / "x.txt")
