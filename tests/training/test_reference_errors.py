"""Errors of the reference from a file train as those that are computed on the way, without a reference in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from diffpref.training import models
from diffpref.training.config import TrainConfig
from diffpref.training.estimate import NoPictures
from diffpref.training.loop import learn
from diffpref.training.objective import build_objective
from diffpref.training.reference_errors import check_reference_errors
from diffpref.training.run import Run
from diffpref.training.run_costs import RunCosts

Settings = dict[str, Any]
Go = Callable[..., Path]
CASES: dict[str, Settings] = {
    "lora": {},
    "full": {"tune": "full"},
    "bf16, full, two micro-batches": {"tune": "full", "mixed_precision": "bf16", "gradient_accumulation_steps": 2, "max_train_steps": 3},
    "sdxl": {"family": "sdxl", "max_train_steps": 3, "cache_latents": True},
}


@pytest.mark.parametrize("case", CASES)
def test_errors_from_a_file_train_the_same(case: str, run_training: Go, sdxl_folder: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-3} | CASES[case]
    if settings.pop("family", None):
        settings["pretrained_model_name_or_path"] = str(sdxl_folder)
    stored = {**settings, "reference_errors": str(tmp_path / "errors.safetensors")}
    folders = [run_training("online", **settings), run_training("computes", **stored), run_training("reads", **stored)]
    step = settings.get("max_train_steps", 6)
    online, *others = (load_file(folder / f"checkpoint-{step}" / "weights.safetensors") for folder in folders)
    for other in others:
        assert [name for name in online if not torch.equal(online[name], other[name])] == []


def test_another_batch_shape_moves_logits_by_rounding_only(prepare: Callable[..., Run], tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        path = tmp_path / f"{size}.safetensors"
        prepare(f"of {size}", reference_errors=str(path), train_batch_size=size, gradient_accumulation_steps=2 // size)
        file = load_file(path)
        found.append({tuple(name): error for name, error in zip(file["key"].tolist(), file["error"], strict=True)})
    singles, pairs = found
    assert singles.keys() == pairs.keys()
    assert max(float((singles[name] - pairs[name]).abs().max()) for name in pairs) * 5000 / 2 < 1e-3


@pytest.mark.parametrize("damage", ["a bit", "the end"])
def test_a_damaged_file_is_refused(damage: str, prepare: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "errors.safetensors"
    prepare("computes", reference_errors=str(path))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data if damage == "a bit" else data[:-1])
    with pytest.raises(ValueError, match=r"errors\.safetensors' (is damaged|cannot be read)"):
        prepare("reads", reference_errors=str(path))


def test_a_run_that_reads_them_has_no_reference(prepare: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"reference_errors": str(tmp_path / "errors.safetensors"), "tune": "full"}
    assert prepare("computes", **stored).reference is None

    def fail(*_: object) -> None:
        raise AssertionError("a second network was made")

    monkeypatch.setattr(models, "copy", SimpleNamespace(deepcopy=fail))
    reads = prepare("reads", **stored, beta=7.0)
    costs = RunCosts(reads.config, reads.objective, reads.backbone, reads.wrapped, NoPictures(16), reads.accelerator, 10**12)
    assert "reference copy" not in costs.parts()
    assert costs.flops_per_pair * 2 == costs.step(reads.config).flops
    batch = next(reads.source)
    assert batch.reference_error is not None
    assert batch.reference_error.shape == (2, 2)
    assert reads.reference is None
    assert learn(reads, batch).per_group.isfinite().all()


def test_a_resumed_run_reads_them(run_training: Go, tmp_path: Path) -> None:
    settings = {"tune": "full", "checkpointing_steps": 3, "reference_errors": str(tmp_path / "errors.safetensors")}
    whole, parts = run_training("whole", **settings), run_training("parts", **settings, max_train_steps=3)
    run_training("parts", **settings, resume_from_checkpoint="latest")
    a, b = (load_file(folder / "checkpoint-6" / "weights.safetensors") for folder in (whole, parts))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_other_settings_are_refused_with_both_values(
    prepare: Callable[..., Run], sd_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    path, other_vae = str(tmp_path / "errors.safetensors"), tmp_path / "vae"
    vae = AutoencoderKL.from_pretrained(sd_folder, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(2)
    vae.save_pretrained(other_vae)
    prepare("first", reference_errors=path)
    for settings, message in (
        ({"seed": 1}, "seed is 0 in the file and 1 in this run"),
        ({"train_batch_size": 3}, "train_batch_size is 2 in the file and 3 in this run"),
        ({"label_noise_prob": 1.0}, r"data is \w+ in the file and \w+ in this run"),
        ({"pretrained_model_name_or_path": str(sdxl_folder)}, r"model is \w+ in the file and \w+ in this run"),
        ({"pretrained_vae_model_name_or_path": str(other_vae)}, r"autoencoder is \w+ in the file and \w+ in this run"),
        ({"attention": "native_math"}, "attention is sdpa in the file and native_math in this run"),
        ({"caption_column": "caption"}, "caption_column is None in the file and caption in this run"),
    ):
        with pytest.raises(ValueError, match=f"reference_errors .* was made with other settings: .*{message}"):
            prepare(str(message[:5]), reference_errors=path, **settings)
    longer = prepare("longer", reference_errors=path, max_train_steps=90)
    with pytest.raises(ValueError, match="made for fewer steps"):
        list(itertools.islice(longer.source, 90))


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("mapo", {}, "mapo has no reference"),
        ("dspo", {}, "dspo needs what the reference predicts"),
        ("inpo", {}, "x_t depends on the policy"),
        ("diffusion_dpo", {"reference_update_steps": 2}, "reference_update_steps is 2, which moves the reference"),
    ],
)
def test_where_errors_do_not_suffice_they_are_refused(recipe: str, settings: Settings, message: str) -> None:
    config = TrainConfig(method=recipe, reference_errors="errors.safetensors", **settings)
    with pytest.raises(ValueError, match=message):
        check_reference_errors(config, build_objective(recipe, {}))
