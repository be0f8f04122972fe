"""The program for whoever has a card: what it would run is accepted, whatever ends it is survived, and numbers that do not count say so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_gpu
import fixture
import gpu_cases
import gpu_pack
import large_testbed
import parts
import pytest
import torch
import untouched
from gpu_cases import CASES, NUMERICS

from diffpref.cli import _train_settings
from diffpref.methods.recipes import RECIPES
from diffpref.training.config import TrainConfig
from diffpref.training.settings import build, names_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def real_runs(place: Path) -> dict[str, dict[str, Any]]:
    """Every run of ours on a real card, by name."""
    found = {f"numerics: {name}": gpu_cases.our_flags(place, 1024, flags) for name, flags in NUMERICS.items()}
    found |= {f"overfit: {name}": gpu_pack.overfit_flags(name, place, 1024, tiny=False) for name in gpu_pack.methods()}
    for name, case in CASES.items():
        ours = {who: entry for who, entry in case.entries.items() if entry.who == "ours"}
        found |= {
            f"{name}: {who}": gpu_cases.our_flags(place, case.side, {"train_batch_size": e.pairs} | e.flags) for who, e in ours.items()
        }
    return found


RUNS = real_runs(Path("place"))


def config_of(flags: dict[str, Any]) -> TrainConfig:
    """The settings as a run reads them."""
    found = _train_settings(gpu_cases.words(flags))
    assert found is not None
    return build(TrainConfig, {name: value for name, value in found[0].items() if name in names_of(TrainConfig)})


@pytest.mark.parametrize("name", RUNS)
def test_the_flags_of_every_part_are_accepted(name: str) -> None:
    config = config_of(RUNS[name])
    assert config.resolution in (512, 1024)
    assert (config.latent_cache or "").endswith(config.base_dtype) or config.latent_cache is None


def test_a_case_is_timed_on_the_path_that_its_numerics_try() -> None:
    for case in CASES.values():
        ours, path = (config_of(RUNS[name]) for name in (f"{case_name(case)}: ours", f"numerics: {case.path}"))
        for name in ("tune", "base_dtype", "mixed_precision", "compile", "allow_tf32", "channels_last"):
            assert getattr(ours, name) == getattr(path, name), (case_name(case), name)


def case_name(case: gpu_cases.Case) -> str:
    """The key of a case."""
    return next(name for name, other in CASES.items() if other is case)


def test_every_recipe_is_in_the_pack_or_has_a_reason() -> None:
    assert set(gpu_pack.methods()) | set(gpu_pack.NOT_TRIED) == set(RECIPES)
    assert not set(gpu_pack.methods()) & set(gpu_pack.NOT_TRIED)
    kinds = [name.split(":")[0] for name in gpu_pack.wanted_parts(Path(), {}, tiny=False)]
    assert [*dict.fromkeys(kinds)] == ["numerics", "overfit", "testbed", "calibration", "timing", "profile"]


def test_pairs_are_seen_twice() -> None:
    for name in gpu_pack.methods():
        flags = RUNS[f"overfit: {name}"]
        assert flags["max_train_steps"] * flags["train_batch_size"] == 2 * 64, name
        assert flags["max_train_samples"] == (3 * 64 if name in gpu_pack.EXTRA and gpu_pack.EXTRA[name] == gpu_pack.LISTS else 64), name
    rows = [{"loss": loss, "rewards/accuracies": loss < 0.5, "time/pairs_per_second": 1.0} for loss in (0.7, 0.7, 0.6, 0.2)]
    found = gpu_pack.learned(rows)
    assert found["first_pass"] == {"loss": pytest.approx(0.7), "accuracy": 0}
    assert found["last_pass"] == {"loss": pytest.approx(0.4), "accuracy": 0.5}
    assert not gpu_pack.learned([*rows[:3], rows[3] | {"loss": None}])["finite"]


def test_what_an_interrupted_preparation_has_left_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "pickapic", "better", "scored", "lists", "latents-64-fp32"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickapic" / "train-00000-of-00001.parquet").write_bytes(b"half")
    (tmp_path / "scored" / "half").write_bytes(b"half")
    (tmp_path / "latents-64-fp32" / "manifest.json").write_text("{}")
    fixture.make(tmp_path, "tiny", pairs=4, side=64)
    gpu_pack.write_variants(tmp_path)
    assert (tmp_path / "scored" / "train.parquet").exists()
    assert (tmp_path / "model" / "model_index.json").exists()
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu_cases, "run_program", lambda command, seconds: commands.append(command))
    gpu_cases.build_cache(gpu_cases.our_flags(tmp_path, 64, {"base_dtype": "fp32"}))
    assert "cache" in commands[0]
    (tmp_path / "latents-64-fp32" / "index.safetensors").touch()
    gpu_cases.build_cache(gpu_cases.our_flags(tmp_path, 64, {"base_dtype": "fp32"}))
    assert len(commands) == 1
    gpu_cases.build_cache(gpu_cases.our_flags(tmp_path, 64, gpu_cases.LORA))
    assert commands[1][-4:] == ["--base_dtype", "bf16", "--mixed_precision", "bf16"]


def test_an_error_is_kept_and_the_next_part_is_done(tmp_path: Path) -> None:
    path, calls = tmp_path / "results" / "found.json", []

    def broken() -> dict[str, Any]:
        calls.append("broken")
        raise KeyError("no such thing")

    wanted = {"a": broken, "b": lambda: {"x": 1}}
    parts.carry_out(path, wanted, minutes=1)
    stored = parts.carry_out(path, wanted, minutes=1)
    assert calls == ["broken"]
    assert stored["a"]["failed"] == "KeyError: 'no such thing'"
    assert stored["b"]["x"] == 1
    assert json.loads(path.read_text()) == stored
    assert parts.summary(stored, wanted, ()) == ("2 of 2 parts are there; 1 failed, 0 void or not passed", 1)
    parts.carry_out(path, wanted, minutes=1, again=True)
    assert calls == ["broken", "broken"]


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    stored = parts.carry_out(tmp_path / "found.json", {"a": dict}, minutes=-1)
    assert parts.summary(stored, ["a"], ()) == ("0 of 1 parts are there; 0 failed, 0 void or not passed; next: a", 1)


def test_a_part_without_its_peer_is_done_again_when_the_peer_comes(tmp_path: Path) -> None:
    found = {"a": {"without": ["diffusers"], "entrants": {"ours": {}}}}
    assert not parts.is_missing(found["a"], given=())
    assert parts.summary(found, ["a"], ())[1] == 0
    assert parts.is_missing(found["a"], given=("diffusers",))
    assert "next: a" in parts.summary(found, ["a"], ("diffusers",))[0]


def test_an_unfinished_part_goes_on_before_the_next_begins(tmp_path: Path) -> None:
    answers = iter([{"unfinished": "1 of 2"}, {"x": 2}])
    order: list[str] = []
    wanted = {"a": lambda: order.append("a") or next(answers), "b": lambda: order.append("b") or {}}
    stored = parts.carry_out(tmp_path / "found.json", wanted, minutes=1)
    assert order == ["a", "a", "b"]
    assert stored["a"]["x"] == 2
    assert parts.is_missing({"unfinished": "1 of 2"}, ())


def test_the_error_of_one_contestant_counts() -> None:
    found = {"a": {"entrants": {"ours": {}, "diffusers": {"failed": "out of memory"}}}}
    assert not parts.is_missing(found["a"], ())
    assert parts.is_missing(found["a"], (), again=True)
    assert parts.summary(found, ["a"], ()) == ("1 of 1 parts are there; 1 failed, 0 void or not passed", 1)


def test_a_program_that_fails_or_hangs_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        parts.run_program([sys.executable, "-c", "raise SystemExit('no such model')"], 60)
    with pytest.raises(RuntimeError, match="ended after 1 s"):
        parts.run_program([sys.executable, "-c", "import time; time.sleep(60)"], 1)


def test_signs_do_not_cancel() -> None:
    z = torch.tensor([0.5, -0.5, 0.0])
    found = untouched.judged(-torch.nn.functional.logsigmoid(z))
    assert found["largest_logit"] == pytest.approx(0.5, abs=1e-6)
    assert found["rms_logit"] == pytest.approx((0.5 / 3) ** 0.5, abs=1e-6)
    assert not found["passed"]
    assert untouched.judged(torch.full((4,), 2.0).log())["passed"]
    assert not untouched.judged(torch.tensor([0.69, float("nan")]))["passed"]


NAME = "SDXL 1024, DPO, LoRA, diffusers with 4 pairs"


def timed(**more: Any) -> dict[str, Any]:
    """Results of a case: ours at 10 pairs per second, the peer at 4."""
    seen = {"seconds_to_first_step": 60, "rounds": [0.1, 0.1]}
    entrants = {
        "ours": seen | {"seconds_per_item": 0.1, "peak_bytes": 40e9},
        "diffusers": seen | {"seconds_per_item": 0.25, "peak_bytes": 50e9},
        "diffusers, recomputing": {"failed": "Traceback\nout of memory"},
    }
    return {"entrants": entrants, "ratios": {"diffusers": {"ratio": 2.5, "least": 2.4, "largest": 2.6}}} | more


def test_times_are_void_until_their_numerics_have_passed() -> None:
    stored: dict[str, Any] = {f"timing: {NAME}": timed(), "numerics: all weights": {"passed": True}}
    bench_gpu.judge(stored)
    assert stored[f"timing: {NAME}"]["void"] == "the numerics of 'LoRA, compiled' have not been measured"
    stored["numerics: LoRA, compiled"] = {"passed": False, "largest_logit": 0.25}
    bench_gpu.judge(stored)
    assert "gave a logit of 0.25" in bench_gpu.table(stored)
    assert parts.summary(stored, [f"timing: {NAME}"], ())[0].endswith("1 failed, 1 void or not passed")
    stored["numerics: LoRA, compiled"] = {"passed": True, "largest_logit": 0.0}
    bench_gpu.judge(stored)
    assert "void" not in bench_gpu.table(stored)


def test_targets_stand_beside_what_was_measured() -> None:
    stored = {f"timing: {NAME}": timed(), "calibration": {"bf16_product_tflops": 700.0}}
    lines = bench_gpu.table(stored).splitlines()
    tflop = 2 * (14.126 + 6.761)
    assert f"| {NAME} | ours | 10.00 | 40.0 | 60 | 2.8 | {10 * tflop:.0f} | {1000 * tflop / 700:.0f} % |" in lines
    assert f"| {NAME}: diffusers | 2.50 | 2.40 to 2.60 | 1.6 | 0.80 |" in lines
    assert f"| {NAME} | failed: out of memory | | | | | | |" in lines


def test_contestants_run_forwards_and_then_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def seen(who: str, *_: Any) -> dict[str, Any]:
        order.append(who)
        seconds = 0.1 * (1 + len(who) + len(order))
        return {"seconds_per_item": seconds, "rounds": [seconds], "seconds_to_first_step": 1.0, "peak_bytes": 1}

    monkeypatch.setattr(bench_gpu, "taken", seen)
    monkeypatch.setattr(bench_gpu, "fixtures", lambda *_: tmp_path)
    found = bench_gpu.timing(NAME, tmp_path, {"diffusers": Path("script.py")}, tiny=False)
    assert order == ["ours", "diffusers", "diffusers, recomputing", "diffusers, recomputing", "diffusers", "ours"]
    assert set(found["ratios"]) == {"diffusers", "diffusers, recomputing"}
    assert [len(x["rounds"]) for x in found["entrants"].values()] == [2, 2, 2]
    assert found["without"] == []
    assert bench_gpu.timing(NAME, tmp_path, {}, tiny=False)["without"] == ["diffusers"]


def test_a_case_that_was_cut_off_goes_on_with_the_next_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def seen(who: str, *_: Any) -> dict[str, Any]:
        if len(order) == 3:
            order.append("cut off")
            raise KeyboardInterrupt
        order.append(who)
        return {"seconds_per_item": 1.0, "rounds": [1.0], "seconds_to_first_step": 1.0, "peak_bytes": len(order)}

    monkeypatch.setattr(bench_gpu, "taken", seen)
    monkeypatch.setattr(bench_gpu, "fixtures", lambda *_: tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.timing("SDXL 1024, DPO, LoRA", tmp_path, {}, tiny=False)
    found = bench_gpu.timing("SDXL 1024, DPO, LoRA", tmp_path, {}, tiny=False)
    assert order == ["ours", "bare", "usual", "cut off", "usual", "bare", "ours"]
    assert found["entrants"]["ours"]["peak_bytes"] == 7
    assert not any((tmp_path / "turns").iterdir())


def test_the_base_model_s_training_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    budget = large_testbed.TINY
    vocabulary = [large_testbed.write_tokenizer(tmp_path / name, pad) for name, pad in (("one", "<|endoftext|>"), ("two", "!"))]
    ids = [large_testbed.train_base.tokenize(tokenizer, ["a red circle"] * 6) for tokenizer in vocabulary]
    data = large_testbed.train_base.TrainingSet(torch.randn(6, 8, 16, 16), *ids)

    def fitted(name: str, *ends: float) -> tuple[list[list[float]], torch.Tensor]:
        losses = []
        for seed, end in enumerate(ends):
            torch.manual_seed(seed if seed else 1)
            networks = large_testbed.train_base.new_networks(len(vocabulary[0]))
            networks.unet = large_testbed.new_unet(budget)
            losses.append(large_testbed.fit(networks, data, budget, torch.device("cpu"), tmp_path / f"{name}.pt", end))
        return losses, torch.cat([p.flatten() for p in networks.module().parameters()])

    never = float("inf")
    whole, weights = fitted("whole", never)
    pieces, same = fitted("pieces", 0.0, 0.0, never)
    assert [len(x) for x in pieces] == [1, 2, budget.steps]
    assert pieces[-1] == whole[0]
    assert torch.equal(weights, same)


@pytest.mark.slow
def test_the_pack_works_from_end_to_end(tmp_path: Path) -> None:
    program, results = str(BENCHMARKS / "gpu_pack.py"), tmp_path / "found.json"
    words = [sys.executable, program, "--tiny", "--folder", str(tmp_path), "--results", str(results)]
    first = subprocess.run([*words, "--minutes", "0.01"], capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr  # it stopped in time, with something kept
    before = json.loads(results.read_text())
    done = subprocess.run([*words, "--minutes", "60"], capture_output=True, text=True, check=False)
    found = json.loads(results.read_text())
    assert {name: bad for name, part in found.items() if name != "machine" and (bad := parts.failures(part))} == {}
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    kept = next(name for name in before if name != "machine")
    assert found[kept] == before[kept]
    assert not any((place / "runs").exists() for place in tmp_path.glob("tiny-*"))
    assert large_testbed.NAMES[-1] in "".join(found)
