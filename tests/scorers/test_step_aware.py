"""The step-aware model equals PickScore before training, knows the released layout, and says what is wrong with a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref.core.preference import label_divergence, loss_share
from diffpref.scorers.pickscore import load_pickscore
from diffpref.scorers.step_aware import StepAwareClip, load_step_aware, released_state, timestep_features
from diffpref.training.step_aware import StepAwareModel, verdict

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def pickscore(released: Callable[[str], Path]) -> Path:
    """A small PickScore with random weights."""
    return released("pickscore")


@pytest.fixture
def step_aware(pickscore: Path, tmp_path: Path) -> Path:
    """The same as a step-aware model at the start of training, in the released layout."""
    folder = tmp_path / "spm"
    shutil.copytree(pickscore, folder)
    model = StepAwareClip(load_pickscore_clip(pickscore)).start(0)
    for old in folder.glob("*.bin"):
        old.unlink()
    save_file({name: x.contiguous() for name, x in released_state(model).items()}, folder / "model.safetensors")
    return folder


def load_pickscore_clip(folder: Path) -> object:
    """Its towers."""
    from diffpref.scorers.clip_towers import TRANSFORMERS_FILES, VIT_H, load_clip_model
    from diffpref.scorers.weights import WeightSource

    source = WeightSource("pickscore", str(folder), None)
    return load_clip_model(source, source.weights(TRANSFORMERS_FILES), VIT_H)


def pixels() -> Tensor:
    """Two pictures wider than high."""
    return torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def test_before_training_it_is_pickscore_at_every_timestep(pickscore: Path, step_aware: Path) -> None:
    scorer = load_step_aware(f"spm={step_aware}")
    expected = load_pickscore(str(pickscore)).score_pixels(pixels(), PROMPTS)
    for t in (0, 1, 251, 501, 951, 999):
        assert torch.equal(scorer(pixels(), PROMPTS, t), expected), t
    assert float(expected.std()) > 0


def test_the_timestep_embedding_has_the_authors_numbers() -> None:
    found = timestep_features(torch.tensor([751]))[0]
    expected = torch.tensor([-0.98732971, 0.14425760, 0.99674528, -0.15868219, 0.98954017, 0.08061547])
    torch.testing.assert_close(found[[0, 1, 127, 128, 129, 255]], expected, rtol=0, atol=1e-6)


def test_gradients_reach_the_modulation_and_then_the_timestep(pickscore: Path) -> None:
    from diffpref.scorers.clip_towers import load_towers
    from diffpref.scorers.weights import WeightSource

    towers = load_towers(WeightSource("pickscore", str(pickscore), None), load_pickscore_clip(pickscore), "", "cpu")
    towers.model.requires_grad_(True)
    plain, again = (StepAwareModel(towers, 0, recompute) for recompute in (False, True))
    seen, t = torch.randn(2, 2, 3, towers.image_size, towers.image_size), torch.tensor([900, 100])
    scores = plain(seen, t, PROMPTS)
    scores[:, 0].sum().backward()
    modulation = plain.model.blocks[0].weight.grad
    assert modulation is not None
    assert float(modulation.abs().max()) > 0
    assert float(plain.model.final.weight.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert float(plain.model.time_in.weight.grad.abs().max()) == 0  # type: ignore[union-attr]
    towers.model.zero_grad()
    again(seen, t, PROMPTS)[:, 0].sum().backward()
    torch.testing.assert_close(again.model.blocks[0].weight.grad, modulation, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        plain.model.final.weight.normal_(0, 0.1)
    assert not torch.equal(plain(seen, t, PROMPTS)[0], plain(seen, torch.tensor([100, 900]), PROMPTS)[0])


def test_the_released_file_is_read_by_its_names(step_aware: Path, tmp_path: Path) -> None:
    state = load_file(step_aware / "model.safetensors")
    layers = json.loads((step_aware / "config.json").read_text())["vision_config"]["num_hidden_layers"]
    for i in range(layers):
        assert f"model.vision_model.encoder.layers.{i}.adaLN_modulation.1.weight" in state
    assert {"model.t_embedder.mlp.0.weight", "model.t_embedder.mlp.2.bias", "model.vision_model.adaLN_modulation.1.bias"} <= state.keys()
    gates = state["model.vision_model.encoder.layers.0.adaLN_modulation.1.bias"].view(6, -1)
    assert gates.mean(1).tolist() == [0, 0, 1, 0, 0, 1]
    state["model.vision_model.adaLN_modulation.1.bias"] = 0.3 * torch.randn(len(state["model.vision_model.adaLN_modulation.1.bias"]))
    positions = state["model.vision_model.embeddings.position_embedding.weight"].shape[0]
    state["model.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
    folder = tmp_path / "release"
    shutil.copytree(step_aware, folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "sd-v1-5_step-aware_preference_model.bin")
    found = load_step_aware(f"spm_sd15={folder}")
    assert found.version == "released"
    assert not torch.equal(found(pixels(), PROMPTS, 3), load_step_aware(f"spm={step_aware}")(pixels(), PROMPTS, 3))


def broken(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """The message about a changed file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="spm") as caught:
        load_step_aware(f"spm={folder}")
    return str(caught.value)


def test_files_that_do_not_fit_are_refused(step_aware: Path, pickscore: Path) -> None:
    with pytest.raises(ValueError, match="no modulation by the timestep"):
        load_step_aware(f"spm={pickscore}")
    with pytest.raises(ValueError, match="accepted: spm_sd15, spm_sdxl, or spm=FOLDER"):
        load_step_aware("spm")
    intact = (step_aware / "model.safetensors").read_bytes()
    changes: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "missing, as clip.logit_scale": lambda s: s.pop("model.logit_scale"),
        "unexpected, as model.extra": lambda s: s.update({"model.extra": torch.zeros(1)}),
        "of another shape, as final.bias": lambda s: s.update({"model.vision_model.adaLN_modulation.1.bias": torch.zeros(3)}),
        "is not 0, 1, 2": lambda s: s.update({"model.text_model.embeddings.position_ids": torch.tensor([[0, 2, 1]])}),
    }
    for message, change in changes.items():
        (step_aware / "model.safetensors").write_bytes(intact)
        assert message in broken(step_aware, change)  # type: ignore[arg-type]


def test_the_criterion_has_the_authors_numbers() -> None:
    def unit(*rows: tuple[float, float, float]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=1)

    text = unit((1, 0.2, 0), (0.1, 1, 0.3))
    images = torch.stack([unit((0.9, 0.3, 0.1), (0.2, 0.8, 0.5)), unit((0.8, 0.5, 0.1), (0.1, 0.9, 0.2))], 1)
    scores = 10 * (images * text[:, None]).sum(-1)
    expected = torch.tensor([[9.868107394, 9.302605094], [9.590338083, 9.973007969]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)
    for p0, counts, loss in (
        ([1.0, 0.0], [1, 1], 0.484927371),
        ([1.0, 0.5], [1, 4], 0.363517649),
        ([0.5, 0.5], [1, 1], 0.028823235),
    ):
        labels, weight = torch.tensor(p0, dtype=torch.float64), 1 / torch.tensor(counts, dtype=torch.float64)
        found = float(loss_share(label_divergence(scores, labels), weight, float(weight.sum())))
        assert found == pytest.approx(loss, abs=1e-8)
        assert float(loss_share(label_divergence(scores, labels), 7 * weight, 7 * float(weight.sum()))) == pytest.approx(found)
    tie = torch.tensor([0.5], dtype=torch.float64)
    assert float(label_divergence(torch.zeros(1, 2, dtype=torch.float64), tie)) == pytest.approx(0, abs=1e-15)


def test_labels_by_a_scorer() -> None:
    gap = 2 * torch.atanh(torch.tensor(0.1))
    scores = torch.tensor([[20.0, 20.0 - 1.01 * gap], [20.0, 20.0 - 0.99 * gap], [20.0, 20.0 + 1.01 * gap], [3.0, 3.0]])
    assert verdict(scores, 0.1).tolist() == [1.0, 0.5, 0.0, 0.5]
