"""The cost model of docs/scale.md against sums done by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cost_model import CARDS, METHODS, Setup, seconds, table

from diffpref.paths.inversion import DdimInversion

ROOT = Path(__file__).resolve().parents[2]
MEASURED = {"decode_pair": 0.06, "read_cached_pair": 0.0002, "draw_noise": 0.0006}


def test_compute_is_the_counted_work_over_the_cards_rate() -> None:
    found = seconds("diffusion_dpo", "sdxl", CARDS["h100"], Setup(pairs=10), MEASURED)
    assert found["compute"] == pytest.approx(10 * 2 * (20.231 + 6.761) / (989 * 0.4))
    assert found["step"] == found["compute"]
    assert found["pairs_per_second"] == pytest.approx(10 / found["step"])


def test_gradients_travel_once_per_optimizer_step_and_split_weights_with_every_pass() -> None:
    plain = seconds("mapo", "sdxl", CARDS["h100"], Setup(gpus=8, pairs=8, micro_batch=4), MEASURED)["messages"]
    assert plain == pytest.approx(2 * 7 / 8 * 4 * 2_567_463_684 / (0.7 * 450e9))
    split = seconds("mapo", "sdxl", CARDS["h100"], Setup(gpus=8, pairs=8, micro_batch=4, shard="weights"), MEASURED)["messages"]
    assert split == pytest.approx(plain * 2 * 3 / 2)  # two micro-batches gather twice and scatter once; a sum over all is two of these
    far = seconds("mapo", "sdxl", CARDS["h100"], Setup(gpus=16, pairs=8), MEASURED)["messages"]
    assert far == pytest.approx(2 * 15 / 16 * 4 * 2_567_463_684 / (0.7 * 50e9))


def test_one_reader_without_a_cache_is_what_holds_lora_up() -> None:
    slow = seconds("mapo", "sd15", CARDS["h100"], Setup(tune="lora", cached=False, workers=1, pairs=1), MEASURED)
    assert slow["input"] == pytest.approx(0.25 * (0.06 + 0.0006))
    assert slow["step"] == max(slow["input"], slow["compute"])


@pytest.mark.parametrize("cheaper", ["mapo", "diffusion_dpo, stored errors"])
def test_what_asks_no_reference_is_faster(cheaper: str) -> None:
    speeds = {name: seconds(name, "sdxl", CARDS["a100"], Setup(), MEASURED)["pairs_per_second"] for name in METHODS}
    assert speeds[cheaper] > speeds["diffusion_dpo"] > speeds["inpo"] > speeds["smpo"] > speeds["inversion_dpo"]
    assert speeds["diffusion_dpo"] > speeds["spo_sdxl"] > speeds["inversion_dpo"]


def test_inversions_are_those_of_the_exact_grid() -> None:
    def moves(num_steps: int) -> float:
        return sum(len(DdimInversion(num_steps=num_steps).moves(t, 1000)) for t in range(1000)) / 1000

    assert METHODS["inpo"].inversion == pytest.approx(moves(10))
    assert METHODS["smpo"].inversion == pytest.approx(2 * moves(5))
    trajectory = METHODS["inversion_dpo"]  # the reference inverts and is compared, the policy is asked without a gradient first
    assert trajectory.reference + trajectory.inversion == 3 * trajectory.trained == 240


def test_sampling_costs_what_the_sampler_asks() -> None:
    """The counts of tests/sources/test_stepwise.py: 65 and 35 latents of a prompt, asked twice for guidance, in 16 pairs."""
    for name, latents, candidates, asked_twice in (("spo", 65, 16 * 4, 0), ("spo_sdxl", 35, 4 * 2, 3 / 4)):
        work = METHODS[name]
        assert work.inversion * 32 == 2 * latents
        assert work.judged * 32 == candidates
        assert work.trained == work.reference == 2 * (1 + asked_twice) / 2  # guided, once where the samples share their input
    cached, fresh = (seconds("spo_sdxl", "sdxl", CARDS["h100"], Setup(cached=x), MEASURED) for x in (True, False))
    assert cached == fresh  # nothing is read
    whole = 2 * (1.75 * (20.231 + 6.761) + 70 / 32 * 6.761 + 0.25 * 10.805)
    assert cached["compute"] == pytest.approx(64 * whole / (989 * 0.4))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'dall-e' is not known"):
        seconds("mapo", "dall-e", CARDS["h100"], Setup(), MEASURED)


def test_the_table_of_the_page_is_the_models() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "cost_model.json").read_text())["seconds"]
    assert table(measured) in (ROOT / "docs" / "scale.md").read_text()


def test_the_command_answers() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "cost_model.py"), "--method", "inpo", "--gpus", "64"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "pairs per second   178.8" in done.stdout
