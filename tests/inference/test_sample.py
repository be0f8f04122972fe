"""`diffpref generate`: the same pictures whatever the batch size and the number of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpref.cli import main
from diffpref.models import attention

PROMPTS = ("a large red circle on a gray background", "a small blue ring on a white background", "a medium green cross on black")


def pictures(folder: Path, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")).astype(int) for i in range(count)])


def flags(folder: Path, **more: object) -> list[str]:
    words = ["--prompts", *PROMPTS, "--num_inference_steps", "3", "--output_dir", str(folder)]
    return words + [w for name, value in more.items() for w in (f"--{name}", str(value))]


def test_pictures_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    assert main(["generate", *flags(tmp_path / "a", batch_size=3)]) == 0
    assert main(["generate", *flags(tmp_path / "b", batch_size=1)]) == 0
    assert np.abs(pictures(tmp_path / "a", 3) - pictures(tmp_path / "b", 3)).max() <= 1
    rows = [json.loads(line) for line in (tmp_path / "a" / "pictures.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert Image.open(tmp_path / "a" / "grid.png").width > 2 * 128


def test_two_processes_draw_the_same_pictures(tmp_path: Path) -> None:
    assert main(["generate", *flags(tmp_path / "one")]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "scripts/generate.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags(tmp_path / "two")], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(pictures(tmp_path / "one", 3) - pictures(tmp_path / "two", 3)).max() <= 1


def test_sampler_and_guidance_change_the_pictures(tmp_path: Path) -> None:
    assert main(["generate", *flags(tmp_path / "a")]) == 0
    for name, more in {"sampler": {"sampler": "euler_a"}, "guidance": {"guidance_scale": 1.0}}.items():
        assert main(["generate", *flags(tmp_path / name, **more)]) == 0
        assert np.abs(pictures(tmp_path / "a", 3) - pictures(tmp_path / name, 3)).mean() > 0.5, name


def test_noise_of_ancestral_samplers_belongs_to_the_seed(tmp_path: Path) -> None:
    for name, batch_size in (("a", 3), ("b", 1)):
        assert main(["generate", *flags(tmp_path / name, sampler="euler_a", batch_size=batch_size)]) == 0
    assert np.abs(pictures(tmp_path / "a", 3) - pictures(tmp_path / "b", 3)).max() <= 1


def test_attention_is_that_of_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: set[str] = set()
    own = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *x, **given: asked.add(str(given["backend"])) or own(*x, **given))
    assert main(["generate", *flags(tmp_path / "plain")]) == 0
    assert not asked
    assert main(["generate", *flags(tmp_path / "math", attention="native_math")]) == 0
    assert str(attention.KERNELS["native_math"]) in asked  # another one was asked to compare it with
    assert np.abs(pictures(tmp_path / "plain", 3) - pictures(tmp_path / "math", 3)).max() <= 1
    capsys.readouterr()
    assert main(["generate", *flags(tmp_path / "sage", attention="sage")]) == 0
    assert capsys.readouterr().err.count("attention sage cannot be used here (") == 1
    assert np.array_equal(pictures(tmp_path / "plain", 3), pictures(tmp_path / "sage", 3))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give prompts"),
        (["--prompts", "a", "--prompt_file", "b"], "one of the two"),
        (["--prompt_file", "missing.txt"], "prompt_file 'missing.txt' cannot be read"),
        (["--prompts", "a", "--lora_scale", "0.5"], "no lora is given"),
        (["--prompts", "a", "--sampler", "heun9"], "sampler is 'heun9'; accepted: checkpoint"),
        (["--prompts", "a", "--precision", "fp16"], "needs a GPU"),
        (["--prompts", "a", "--height", "60", "--width", "60"], "not divisible by the VAE factor 8"),
        (["--prompts", "a", "--num_inferense_steps", "5"], "did you mean num_inference_steps"),
    ],
)
def test_mistakes_are_named(words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words, "--output_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: "), line
    assert expected in line
    assert not list(tmp_path.rglob("*.png"))
