"""The user's first command, shortened: it trains, exports, compares and reports on the shipped testbed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from diffpref.cli import main
from diffpref.data.pairs import load_pairs
from diffpref.locations import asset
from diffpref.testbed.measure import Ruler, fingerprint, measure, seeds_for, shares
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.sampling import Sampler

KEYS = (
    "win_rate", "win_rate_low", "win_rate_high", "num_prompts", "score_base", "score_aligned", "best_of_n_equivalent",
    "prompt_following_base", "prompt_following_aligned", "controls",
)  # fmt: skip
SHORT = ["--max_train_steps", "4", "--num_eval_prompts", "16", "--max_train_samples", "120", "--held_out_pairs", "20"]


def test_first_command_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", *SHORT, "--validation_steps", "2", "--output_dir", str(folder)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("No model and no data given: using the embedded testbed")
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert lines[-4].startswith("win rate")
    report = json.loads((folder / "report.json").read_text())
    assert set(KEYS) <= set(report)
    assert report["num_prompts"] == 16
    assert report["best_of_n_equivalent"] is not None
    assert {c["name"].split(":")[0] for c in report["controls"]} >= {"pixel filter", "sampling"}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 32
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert (folder / "validation" / "step_4.png").exists()


def test_evaluate_a_lora_against_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    model, pairs = str(asset("testbed", "pipeline")), str(asset("testbed", "pairs"))
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", pairs, "--split", "own", "--max_train_samples", "40"]
    more = ["--max_train_steps", "3", "--train_batch_size", "4", "--learning_rate", "1e-3", "--lr_scheduler", "constant"]
    assert main(["train", *words, *more, "--output_dir", str(folder)]) == 0
    assert not (folder / "report.json").exists()
    out = tmp_path / "report"
    assert main(["testbed", "compare", "--aligned", str(folder), "--num_eval_prompts", "8", "--output_dir", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["num_prompts"] == 8


def test_shipped_files_belong_together() -> None:
    model = asset("testbed", "pipeline")
    stored = Ruler.load(asset("testbed", "ruler.json"))
    assert stored.model == fingerprint(model)
    assert stored.scores.shape[0] >= 500
    results = json.loads(asset("testbed", "results.json").read_text())
    assert results["model"] == fingerprint(model)
    pairs = load_pairs(str(asset("testbed", "pairs")), split="own")
    assert len(pairs) >= 1200
    assert not pairs.rejected
    total = sum(p.stat().st_size for p in model.rglob("*") if p.is_file())
    assert total <= 15e6
    assert sum(p.stat().st_size for p in asset("testbed", "pairs").iterdir()) <= 8e6


def test_base_model_follows_its_prompts() -> None:
    texts = draw_prompts("validation", 48).texts
    found = shares(measure(Sampler(str(asset("testbed", "pipeline")))(texts, seeds_for(len(texts))), texts))
    assert min(found["colour"], found["background"], found["size"]) >= 0.8, found
    assert found["shape"] >= 0.65, found


def test_evaluation_seeds_never_repeat() -> None:
    drawn = [seed for sample in range(17) for seed in seeds_for(500, sample)]
    assert len(set(drawn)) == len(drawn)
    assert np.min(drawn) > 5_000_000
