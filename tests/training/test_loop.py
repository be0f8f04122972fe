"""Runs in this process: what the first step must be, exact resume, and updates that are not finite."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.data.sampler import PairSampler
from diffpref.methods import Method
from diffpref.training.loop import train
from diffpref.training.pairs import load_run_pairs
from diffpref.training.run import Run
from diffpref.training.run_log import RunLog
from diffpref.training.stopping import NotFinite, Stopped

Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[dict[str, Any]]]
State = Callable[[Path, int], dict[str, Tensor]]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, f"{len(differing)} of {len(a)} tensors differ, first {differing[0]}"


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd_v", "sdxl"])
@pytest.mark.reliability("N5")
def test_the_first_loss_is_log_two(
    tune: str, family: str, request: pytest.FixtureRequest, run_training: Go, read_metrics: Metrics, read_state: State
) -> None:
    model = str(request.getfixturevalue(f"{family}_folder"))
    folder = run_training("run", tune=tune, pretrained_model_name_or_path=model, max_train_steps=2, beta=5000.0)
    first, second = read_metrics(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/margins"], first["rewards/accuracies"], first["implicit_acc"]) == (0, 0.5, 0.5)
    assert first["error/policy_chosen"] == first["error/reference_chosen"] > 0
    assert first["raw_model_loss"] == first["ref_loss"]
    assert first["grad_norm"] > 0
    assert second["rewards/margins"] != 0
    weights = {name for name in read_state(folder, 2) if name.startswith("weights/")}
    assert all("lora_" in name for name in weights) is (tune == "lora")


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Signal this process when the metrics of `step` are written."""
    write = RunLog.write

    def and_signal(self: RunLog, at: int, values: dict[str, float]) -> None:
        write(self, at, values)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "write", and_signal)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    tune: str, run_training: Go, read_metrics: Metrics, read_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tune": tune, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "gradient_accumulation_steps": 2}
    whole = run_training("whole", **settings)
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        with pytest.raises(Stopped, match="after step 3") as stopped:
            run_training("parts", **settings)
    assert stopped.value.code == 143
    parts = whole.with_name("parts")
    assert sorted(p.name for p in parts.glob("checkpoint-*")) == ["checkpoint-3"]
    assert len(read_metrics(parts)) == 3
    run_training("parts", **settings, resume_from_checkpoint="latest")
    assert_same(read_state(parts, 6), read_state(whole, 6))
    assert read_metrics(parts) == read_metrics(whole)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_continued_under_a_constant_schedule_is_the_longer_run(
    tune: str, run_training: Go, read_metrics: Metrics, read_state: State
) -> None:
    settings = {"tune": tune, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}
    whole = run_training("whole", **settings)
    run_training("parts", **settings, max_train_steps=3)
    parts = run_training("parts", **settings, resume_from_checkpoint="checkpoint-3")
    assert_same(read_state(parts, 6), read_state(whole, 6))
    assert read_metrics(parts) == read_metrics(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_other_signals_save_too(
    number: signal.Signals, code: int, run_training: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    signal_at(monkeypatch, 1, number)
    with pytest.raises(Stopped) as stopped:
        run_training("run")
    assert stopped.value.code == code
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_ends_the_run_as_finished(run_training: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(monkeypatch, 2)
    assert (run_training("run", max_train_steps=2) / "checkpoint-2").is_dir()


def test_two_runs_are_the_same_run(run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    first = run_training("first")
    torch.manual_seed(77)  # the global generator takes no part
    second = run_training("second", dataloader_num_workers=2)
    assert_same(read_state(first, 6), read_state(second, 6))
    assert read_metrics(first) == read_metrics(second)
    other = run_training("other", seed=1)
    assert read_metrics(other) != read_metrics(first)


def test_supervised_fine_tuning_has_no_reference(prepare: Start, read_metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare("run", method="sft", tune="full", max_train_steps=3)
    assert run.reference is None
    train(run)
    lines = read_metrics(run.folder)
    assert [line["loss"] for line in lines] == [line["error/policy_chosen"] for line in lines]
    assert not any("reference" in name or name.startswith("rewards/") for name in lines[0])
    assert "skipped, no reference" in capsys.readouterr().err


def test_gradient_accumulation_is_a_larger_batch(run_training: Go, read_metrics: Metrics) -> None:
    settings = {"tune": "full", "max_train_steps": 1, "proportion_empty_prompts": 0.0}
    (joined,) = read_metrics(run_training("joined", **settings, train_batch_size=4))
    (split,) = read_metrics(run_training("split", **settings, train_batch_size=2, gradient_accumulation_steps=2))
    assert split.keys() == joined.keys()
    for name in ("grad_norm", "loss", "error/policy_chosen", "error/reference_rejected", "rewards/accuracies"):
        assert split[name] == pytest.approx(joined[name], rel=1e-5), name


def test_the_schedule_counts_optimizer_steps(run_training: Go, read_metrics: Metrics) -> None:
    settings = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "learning_rate": 1e-3}
    lines = read_metrics(run_training("run", **settings, train_batch_size=1, gradient_accumulation_steps=2))
    assert [line["lr"] for line in lines] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_kept_latents_train_the_same(run_training: Go, read_metrics: Metrics) -> None:
    fresh, kept = (read_metrics(run_training(f"run-{flag}", cache_latents=flag)) for flag in (False, True))
    for a, b in zip(fresh, kept, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["error/reference_chosen"] == pytest.approx(a["error/reference_chosen"], rel=1e-4)


def test_recomputed_activations_train_the_same(run_training: Go, read_metrics: Metrics) -> None:
    plain, again = (read_metrics(run_training(f"run-{flag}", gradient_checkpointing=flag, max_train_steps=3)) for flag in (False, True))
    for a, b in zip(plain, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_half_precision_forward_starts_at_log_two(run_training: Go, read_metrics: Metrics, read_state: State) -> None:
    folder = run_training("run", mixed_precision="bf16", max_train_steps=2)
    assert read_metrics(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {x.dtype for x in read_state(folder, 2).values()} == {torch.float32}


def test_supervised_training_lowers_the_denoising_error(run_training: Go, read_metrics: Metrics) -> None:
    settings = {
        "method": "sft",
        "tune": "full",
        "max_train_steps": 30,
        "max_train_samples": 4,
        "train_batch_size": 4,
        "learning_rate": 3e-3,
    }
    losses = [line["loss"] for line in read_metrics(run_training("run", **settings))]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@dataclass
class Faulty:
    """A method whose loss or gradient is not finite at some of its calls."""

    inner: Method
    bad_calls: set[int]
    fault: str
    calls: int = 0

    needs_reference: ClassVar[bool] = True
    images_per_group: ClassVar[int] = 2

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """The inner loss, spoilt."""
        out = self.inner.loss(batch, evals)
        self.calls += 1
        if self.calls not in self.bad_calls:
            return out
        spoilt = {
            "nan loss": out.per_group * math.nan,
            "infinite loss": out.per_group + math.inf * evals[0].policy.mean() ** 2,
            "nan gradient": out.per_group + (0 * evals[0].policy.sum()).sqrt(),  # the slope of a root at 0
        }
        return LossOutput(spoilt[self.fault], out.metrics)


@pytest.mark.parametrize("fault", ["nan loss", "infinite loss", "nan gradient"])
@pytest.mark.reliability("N1")
def test_a_bad_update_is_skipped_and_reported(
    fault: str, prepare: Start, read_metrics: Metrics, read_state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare("run", max_train_steps=5, checkpointing_steps=1)
    run.objective = replace(run.objective, method=Faulty(run.objective.method, {3, 4}, fault))  # two in a row are borne
    train(run)
    states = [read_state(run.folder, step) for step in range(2, 6)]
    assert_same(states[0], states[1])
    assert_same(states[1], states[2])
    assert any(not torch.equal(states[2][name], x) for name, x in states[3].items())
    assert all(torch.isfinite(x).all() for state in states for x in state.values())
    lines = read_metrics(run.folder)
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, True, False]
    assert [line["loss"] is None for line in lines] == [False, False, fault != "nan gradient", fault != "nan gradient", False]
    told = [line for line in capsys.readouterr().err.splitlines() if "update skipped" in line]
    assert len(told) == 2
    assert "step 3:" in told[0]
    pairs, _ = load_run_pairs(run.config, False)
    for index, _ in PairSampler(len(pairs), 0).micro_batch(2, 0, 0, batch_size=2, accumulation=1, world_size=1):
        assert pairs.pair_ids[index] in told[0]


@pytest.mark.reliability("N2")
def test_three_bad_updates_in_a_row_end_the_run(prepare: Start, read_state: State) -> None:
    run = prepare("run", checkpointing_steps=1)
    run.objective = replace(run.objective, method=Faulty(run.objective.method, {2, 4, 5, 6}, "nan loss"))
    with pytest.raises(NotFinite, match="last at step 6") as caught:
        train(run)
    assert "learning_rate (0.01)" in str(caught.value)
    assert (run.folder / "checkpoint-5").is_dir()
    assert not (run.folder / "checkpoint-6").exists()
    assert_same(read_state(run.folder, 3), read_state(run.folder, 5))


@pytest.mark.reliability("N5")
@pytest.mark.parametrize("method", ["diffusion_dpo", "diffusion_kto", "rank_dpo"])
def test_a_policy_that_differs_from_its_reference_is_refused(method: str, prepare: Start) -> None:
    run = prepare("run", tune="full", method=method)
    with torch.no_grad():
        run.trainable["conv_in.weight"].add_(0.1)
    with pytest.raises(ValueError, match="policy and reference compute differently"):
        train(run)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_method_without_reference_is_measured_against_the_model_without_its_adapters(
    tune: str, run_training: Go, read_metrics: Metrics
) -> None:
    settings = {
        "method": "mapo",
        "tune": tune,
        "max_train_steps": 3,
        "validation_steps": 3,
        "held_out_pairs": 4,
        "num_validation_images": 1,
    }
    lines = [line for line in read_metrics(run_training("run", **settings)) if "eval/implicit_accuracy" in line]
    assert len(lines) == (1 if tune == "lora" else 0)
    assert all(line["eval/gain_chosen"] != 0 for line in lines)


def test_validation_measures_held_out_pairs_and_draws_pictures(run_training: Go, read_metrics: Metrics) -> None:
    settings = {"max_train_steps": 2, "validation_steps": 1, "held_out_pairs": 4, "num_validation_images": 1}
    folder = run_training("run", **settings)
    lines = [line for line in read_metrics(folder) if "eval/implicit_accuracy" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["eval/num_pairs"] >= 4
    assert len(lines[0]["eval/implicit_accuracy_by_noise"]) == 10
    assert {p.name for p in (folder / "validation").iterdir()} == {"step_1.png", "step_2.png"}
    plain = read_metrics(run_training("plain", **{**settings, "validation_steps": None}))
    assert [line["loss"] for line in plain] == [line["loss"] for line in read_metrics(folder) if "loss" in line]
