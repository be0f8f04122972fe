"""What is refused before the first step, with which remedy, and that looking changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.types import LossOutput, PreferenceBatch
from diffpref.methods.inversion_dpo import InversionDPO
from diffpref.models.backbone import Backbone
from diffpref.paths.trajectory import InversionTrajectory
from diffpref.training import machine, preflight, probe, run_costs
from diffpref.training.loop import train
from diffpref.training.objective import Objective
from diffpref.training.preflight import Preflight
from diffpref.training.run import Run
from diffpref.training.step_cost import StepCost

GB = 10**9
Start = Callable[..., Run]
Go = Callable[..., Path]
Metrics = Callable[[Path], list[dict[str, Any]]]
State = Callable[[Path, int], dict[str, Tensor]]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """memory(bytes) -> runs of this test find so much memory; a pair takes 1 GB of it, 0.6 or 0.25 with checkpointing."""

    def cost(backbone: Backbone, module: Any, groups: tuple[int, int], side: int, recompute: str, **_: Any) -> StepCost:
        share = {"off": 1, "selective": 0.6, "full": 0.25}[recompute]
        return StepCost(int(groups[0] * share * GB), forward_flops=1, flops=3, kept=1, forward_kernels=1, kernels=3)

    def give(size: float) -> None:
        monkeypatch.setattr(machine, "device_memory", lambda device: int(size))
        monkeypatch.setattr(run_costs, "step_cost", cost)
        monkeypatch.setattr(run_costs, "PLENTY", math.inf)
        monkeypatch.setattr(run_costs, "HEAP_ALLOWANCE", 1)

    return give


@pytest.fixture
def probing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test probe, as they do on a GPU."""
    begin = Preflight.__init__

    def and_probe(self: Preflight, *args: Any) -> None:
        begin(self, *args)
        self.probes = self.on

    monkeypatch.setattr(Preflight, "__init__", and_probe)


def manifest(folder: Path) -> dict[str, Any]:
    """What the preflight left in the run's manifest."""
    found: dict[str, Any] = json.loads((folder / "run_manifest.json").read_text())["preflight"]
    return found


def test_a_small_run_is_not_counted_and_says_so(prepare: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare("run")
    errors = capsys.readouterr().err
    assert "memory: less than" in errors
    assert "disk: 1 checkpoint of" in errors
    found = manifest(run.folder)
    assert found["memory"]["is_upper_bound"] is True
    assert 0 < found["memory"]["bytes"] < found["memory"]["available"]
    assert set(found) == {"memory", "disk"}


def test_what_is_counted_is_in_the_manifest(prepare: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_costs, "PLENTY", math.inf)
    run = prepare("run", tune="full", mixed_precision="bf16", no_hflip=True, cache_latents=True)
    found = manifest(run.folder)["memory"]
    parts = {name: size for name, size in found.items() if name not in ("bytes", "available", "is_upper_bound")}
    numbers = sum(p.numel() for p in run.trainable.values())
    assert found["bytes"] == sum(parts.values())
    assert parts["gradients"] == parts["reference copy"] == 4 * numbers
    assert parts["optimizer"] == 8 * numbers
    assert parts["latent cache"] == 24 * 2 * 2 * 4 * 8 * 8 * 4
    assert 10**5 < parts["activations"] < 10**7
    assert manifest(run.folder)["tflop_per_pair_and_step"] > 0
    assert "TFLOP per pair and step" in capsys.readouterr().err


def test_pictures_for_validation_count(prepare: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_costs, "PLENTY", math.inf)
    small = {"train_batch_size": 1, "resolution": 8, "num_validation_images": 4, "validation_prompts": ("a",)}
    plain, drawn = (manifest(prepare(f"run-{every}", **small, validation_steps=every).folder) for every in (None, 3))
    assert drawn["memory"]["activations"] > plain["memory"]["activations"]


def test_too_little_memory_is_refused_with_settings_that_fit(
    prepare: Start, memory: Callable[[float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory(3 * GB)
    wide = {"train_batch_size": 6, "resolution": 64}
    with pytest.raises(ValueError, match=r"takes about 6.0 GB of memory \(activations 6.0 GB, .*there are 3.0 GB") as refused:
        prepare("run", **wide)
    assert "use --gradient_checkpointing full (1.5 GB). To start all the same, add --preflight warn" in str(refused.value)
    assert not (tmp_path / "run").exists()
    prepare("run", **wide, gradient_checkpointing=True)
    capsys.readouterr()
    prepare("warned", **wide, preflight="warn")
    assert "warning: training takes about 6.0 GB" in capsys.readouterr().err
    prepare("unchecked", **wide, preflight="off")
    assert "memory" not in capsys.readouterr().err
    assert manifest(tmp_path / "unchecked") == {}


def test_smaller_micro_batches_with_as_many_pairs_per_update_are_advised(prepare: Start, memory: Callable[[float], None]) -> None:
    memory(0.6 * GB)
    with pytest.raises(ValueError, match=r"use --train_batch_size 2 --gradient_accumulation_steps 3 \("):
        prepare("run", gradient_checkpointing=True, train_batch_size=6)


@pytest.mark.parametrize(("size", "said"), [(2, None), (5, (4, 3)), (7, (6, 2)), (20, (12, 1))])
def test_larger_micro_batches_that_fit_are_named(
    size: float, said: tuple[int, int] | None, prepare: Start, memory: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    memory(size * GB)
    prepare("run", train_batch_size=1, gradient_accumulation_steps=12)
    line = said and f"pairs per update in fewer passes: --train_batch_size {said[0]} --gradient_accumulation_steps {said[1]} ({said[0]}."
    errors = capsys.readouterr().err
    assert (line in errors) if line else ("in fewer passes" not in errors)


def test_memory_that_no_setting_finds_is_said(prepare: Start, memory: Callable[[float], None]) -> None:
    memory(1000)
    with pytest.raises(ValueError, match="lower resolution, or use a device with more memory"):
        prepare("run")


def test_a_trajectory_that_does_not_fit_is_refused(prepare: Start, memory: Callable[[float], None]) -> None:
    memory(3 * GB)
    long = Objective(InversionDPO(), InversionTrajectory(num_steps=8, steps_at_once=4, guidance_scale=1))
    with pytest.raises(ValueError, match=r"takes about 4\.0 GB of memory .* use --gradient_checkpointing selective \(2\.4 GB\)"):
        prepare("run", long, method="inversion_dpo", train_batch_size=1)
    memory(1000)
    with pytest.raises(ValueError, match=r"trajectory \d+ kB.* lower resolution, steps_at_once \(4\) or num_steps \(8\), or use a device"):
        prepare("run", long, method="inversion_dpo", train_batch_size=1)


def test_a_full_disk_is_refused_before_training(prepare: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read_state: State) -> None:
    size = sum(x.nbytes for x in read_state(_finished(prepare("other", max_train_steps=1)), 1).values())
    monkeypatch.setattr(machine, "free_disk", lambda folder: 4 * size)
    every = {"checkpointing_steps": 1, "max_train_steps": 20}
    with pytest.raises(ValueError, match=r"20 checkpoints of .* do not fit into .*add --checkpoints_total_limit 2, or choose") as refused:
        prepare("run", **every)
    assert str(tmp_path / "run") in str(refused.value)
    assert not (tmp_path / "run").exists()
    found = manifest(prepare("run", **every, checkpoints_total_limit=2).folder)["disk"]
    assert found["checkpoints"] == 3
    assert found["checkpoint"] == pytest.approx(size, rel=0.02)
    assert found["export"] == pytest.approx(size / 3, rel=0.02)


def _finished(run: Run) -> Path:
    train(run)
    return run.folder


def test_a_resumed_run_counts_the_checkpoints_that_are_ahead(prepare: Start) -> None:
    _finished(prepare("run", max_train_steps=4, checkpointing_steps=1))
    run = prepare("run", max_train_steps=6, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert manifest(run.folder)["disk"]["checkpoints"] == 2


def test_an_output_folder_that_cannot_be_written_is_refused_first(prepare: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*run' cannot be written \(Not a directory\); choose another output_dir"):
        prepare("run", output_dir=str(tmp_path / "file" / "run"), train_data_dir="never looked at")


def test_problems_of_another_rank_stop_this_one(
    prepare: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare("run")
    monkeypatch.setattr(preflight, "gather_object", lambda problems: [*problems, "no disk", "no disk"])
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    check = Preflight(run.config, run.accelerator)
    with pytest.raises(ValueError, match=r"^no memory; no disk\. To start"):
        check.settle(["no memory"])


def test_weights_that_do_not_fit_onto_the_card_are_explained(prepare: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("diffpref.training.run.load_models", overflow)
    with pytest.raises(ValueError, match=r"weights do not fit onto cpu \(CUDA out of memory\); use base_dtype bf16"):
        prepare("run")
    with pytest.raises(ValueError, match="use tune lora"):
        prepare("run", tune="full")


PROBED = {
    "lora": {},
    "full": {"tune": "full", "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    "kept latents": {"cache_latents": True},
    "sft": {"method": "sft", "train_batch_size": 1},
}


@pytest.mark.parametrize("case", PROBED)
def test_a_probe_changes_nothing(
    case: str, run_training: Go, read_metrics: Metrics, read_state: State, probing: None, prepare: Start
) -> None:
    settings = {**PROBED[case], "max_train_steps": 2}
    torch.manual_seed(5)
    probed = run_training("probed", **settings)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    plain = run_training("plain", **settings, preflight="off")
    assert torch.equal(drawn, torch.rand(3))
    assert read_metrics(probed) == read_metrics(plain)
    a, b = read_state(probed, 2), read_state(plain, 2)
    assert [name for name, x in a.items() if not torch.equal(x, b[name])] == []
    found = manifest(probed)["probe"]
    assert found["seconds"] > 0
    micro_batches = 2 * PROBED[case].get("gradient_accumulation_steps", 1)
    reading = 0 if case == "kept latents" else found["seconds_reading"]
    assert found["hours"] == pytest.approx(micro_batches * (found["seconds"] + reading) / 3600)


def test_a_probe_leaves_no_gradients(prepare: Start, probing: None) -> None:
    assert all(p.grad is None for p in prepare("run").trainable.values())


def test_a_probe_sees_the_first_micro_batch(prepare: Start, probing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PreferenceBatch] = []
    learn = probe.learn
    monkeypatch.setattr(probe, "learn", lambda run, batch: seen.append(batch) or learn(run, batch))
    run = prepare("run", cache_latents=True)
    first, second = next(run.source), next(run.source)
    assert [batch.pair_ids for batch in seen] == [first.pair_ids, second.pair_ids]
    assert torch.equal(seen[0].latents, first.latents)


def failing(error: BaseException) -> Callable[..., None]:
    """A micro-batch that raises."""

    def learn(run: Run, batch: PreferenceBatch) -> None:
        raise error

    return learn


def test_a_micro_batch_that_does_not_fit_is_refused_with_the_remedy(
    prepare: Start, probing: None, memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory(9 * GB)
    monkeypatch.setattr(probe, "learn", failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")))
    with pytest.raises(ValueError, match=r"8 does not fit onto cpu \(CUDA out of memory\); use --gradient_checkpointing \w+ \("):
        prepare("run", train_batch_size=8)
    assert not (tmp_path / "run").exists()


def test_an_attention_kernel_that_fails_is_refused(prepare: Start, probing: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "learn", failing(NotImplementedError("No operator found for `memory_efficient_attention_forward`")))
    with pytest.raises(NotImplementedError):
        prepare("run")
    with pytest.raises(ValueError, match=r"attention native_math failed .*\(No operator found.*use --attention sdpa"):
        prepare("run", attention="native_math")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_first_loss_that_is_not_finite_is_refused(
    fault: str, prepare: Start, probing: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learn = probe.learn

    def spoilt(run: Run, batch: PreferenceBatch) -> LossOutput:
        out = learn(run, batch)
        if fault == "loss":
            return LossOutput(out.per_group * math.nan, out.metrics)
        next(iter(run.trainable.values())).grad.fill_(math.inf)  # type: ignore[union-attr]
        return out

    monkeypatch.setattr(probe, "learn", spoilt)
    with pytest.raises(ValueError, match=r"the loss is .* or its gradients are not finite; the model's weights are not sound"):
        prepare("run")
    assert not (tmp_path / "run").exists()
