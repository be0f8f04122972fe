"""Loading, encoding and predicting agree with diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffpref.core.types import Conditioning
from diffpref.models.backbone import Backbone, load_backbone, load_pipeline

PROMPTS = ["a red circle", "two large blue squares, next to a zebra with 17 stripes"]


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> Backbone:
    return load_backbone(str(sd_folder))


@pytest.fixture(scope="module")
def sdxl(sdxl_folder: Path) -> Backbone:
    return load_backbone(str(sdxl_folder))


def noise(*shape: int) -> Tensor:
    """Reproducible normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_families_and_numbers_come_from_the_configs(sd: Backbone, sdxl: Backbone) -> None:
    assert (sd.family, sd.uses_time_ids) == ("sd", False)
    assert (sdxl.family, sdxl.uses_time_ids) == ("sdxl", True)
    for backbone in (sd, sdxl):
        assert backbone.default_resolution == 32
        assert backbone.pixel_factor == 8  # 4 of the VAE, 2 of the UNet
        assert backbone.process.prediction_type == "epsilon"
        assert backbone.process.num_timesteps == 1000
        assert float(backbone.process.alphas_cumprod[999]) == pytest.approx(0.0046600985, rel=1e-5)


def test_v_prediction_is_read_from_the_scheduler(sd_v_folder: Path) -> None:
    assert load_backbone(str(sd_v_folder)).process.prediction_type == "v_prediction"


def test_everything_is_frozen_float32_and_in_evaluation_mode(sd: Backbone, sdxl: Backbone) -> None:
    for backbone in (sd, sdxl):
        for part in backbone.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                assert not part.training
                assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())


def test_half_precision_weights_are_loaded_in_float32(sd_folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DiffusionPipeline.from_pretrained(sd_folder).to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    pipeline = load_pipeline(str(tmp_path / "half"), variant="fp16")
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


def test_sd_prompts_are_encoded_as_by_the_pipeline(sd: Backbone) -> None:
    cond = sd.encode_prompts(PROMPTS)
    expected, empty = sd.pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(cond.prompt_embeds[:, 0], expected, rtol=1e-6, atol=1e-6)
    assert cond.pooled_prompt_embeds is None
    assert cond.time_ids is None
    torch.testing.assert_close(sd.null_prompt().prompt_embeds[0], empty[:1], rtol=1e-6, atol=1e-6)


def test_sdxl_prompts_are_encoded_as_by_the_pipeline(sdxl: Backbone) -> None:
    cond = sdxl.encode_prompts(PROMPTS)
    embeds, _, pooled, _ = sdxl.pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    assert cond.pooled_prompt_embeds is not None
    torch.testing.assert_close(cond.prompt_embeds[:, 0], embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cond.pooled_prompt_embeds[:, 0], pooled, rtol=1e-6, atol=1e-6)
    assert not torch.equal(cond.pooled_prompt_embeds[0], cond.pooled_prompt_embeds[1])


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_null_prompt_is_what_guidance_uses(zeros: bool, sdxl_folder: Path) -> None:
    backbone = load_backbone(str(sdxl_folder))
    backbone.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    null = backbone.null_prompt()
    _, embeds, _, pooled = backbone.pipeline.encode_prompt("a", device="cpu", do_classifier_free_guidance=True)
    assert null.pooled_prompt_embeds is not None
    torch.testing.assert_close(null.prompt_embeds[0], embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(null.pooled_prompt_embeds[0], pooled, rtol=1e-6, atol=1e-6)
    assert bool((null.prompt_embeds == 0).all()) is zeros


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_moments_are_those_of_the_vae_scaled(family: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(family)
    pixels = noise(3, 3, 32, 32).clamp(-1, 1)
    moments = backbone.encode_moments(pixels)
    with torch.no_grad():
        posterior = backbone.pipeline.vae.encode(pixels).latent_dist
    assert moments.shape == (3, 2, 4, 8, 8)
    assert not moments.requires_grad
    assert torch.equal(moments[:, 0], posterior.mean * 0.7)
    assert torch.equal(moments[:, 1], posterior.std * 0.7)
    assert (moments[:, 1] > 0).all()
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(300)]) * 0.7
    torch.testing.assert_close(draws.mean(0), moments[:, 0], rtol=0, atol=float(0.4 * moments[:, 1].max()))
    torch.testing.assert_close((draws.std(0) / moments[:, 1]).mean(), torch.tensor(1.0), rtol=0.02, atol=0)


def test_sd_predictor_is_the_unet(sd: Backbone) -> None:
    x_t, t, embeds = noise(3, 2, 4, 8, 8), torch.tensor([[0, 0], [500, 500], [999, 999]]), noise(3, 2, 24, 16)
    with torch.no_grad():
        made = sd.predictor(sd.denoiser)(x_t, t, Conditioning(embeds))
        for g in range(3):
            alone = sd.denoiser(x_t[g], t[g], encoder_hidden_states=embeds[g]).sample
            torch.testing.assert_close(made[g], alone, rtol=1e-5, atol=1e-5)


def test_sdxl_predictor_is_the_unet(sdxl: Backbone) -> None:
    x_t, t = noise(3, 2, 4, 8, 8), torch.tensor([[0, 0], [500, 500], [999, 999]])
    times = torch.tensor([64.0, 48.0, 0.0, 8.0, 32.0, 32.0]) * torch.arange(1, 7).reshape(3, 2, 1)
    cond = Conditioning(noise(3, 2, 24, 32), noise(3, 2, 16), times)
    with torch.no_grad():
        made = sdxl.predictor(sdxl.denoiser)(x_t, t, cond)
        for g in range(3):
            assert cond.pooled_prompt_embeds is not None
            added = {"text_embeds": cond.pooled_prompt_embeds[g], "time_ids": times[g]}
            alone = sdxl.denoiser(x_t[g], t[g], encoder_hidden_states=cond.prompt_embeds[g], added_cond_kwargs=added).sample
            torch.testing.assert_close(made[g], alone, rtol=1e-5, atol=1e-5)
        moved = sdxl.predictor(sdxl.denoiser)(x_t, t, Conditioning(cond.prompt_embeds, cond.pooled_prompt_embeds, times + 1))
    assert not torch.allclose(moved, made)


def only_pickles(folder: Path) -> None:
    """Turn every safetensors file into a .bin of the old name."""
    for path in list(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.parent.name.startswith("text_encoder") else "diffusion_pytorch_model.bin"
        torch.save({"weight": torch.zeros(1)}, path.with_name(name))
        path.unlink()


def one_pickle(folder: Path) -> None:
    """Leave the UNet as a pickle only."""
    torch.save({"weight": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def no_weights(folder: Path) -> None:
    """Configs only."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def no_index(folder: Path) -> None:
    """A folder that is no pipeline."""
    (folder / "model_index.json").unlink()


def broken_index(folder: Path) -> None:
    """JSON cut short."""
    (folder / "model_index.json").write_text('{"_class_name": "Stable')


def truncated_weights(folder: Path) -> None:
    """A download that broke off."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = [only_pickles, one_pickle, no_weights, no_index, broken_index, truncated_weights]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_unusable_folders_are_the_users_error(damage: Callable[[Path], None], sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    damage(folder)
    with pytest.raises(ValueError, match="pretrained_model_name_or_path") as caught:
        load_backbone(str(folder))
    assert str(folder) in str(caught.value)
    assert "safetensors" in str(caught.value)


@pytest.mark.parametrize("source", ["no/such-model", "not a path at all?", "./nowhere"])
def test_nonsense_paths_are_the_users_error(source: str) -> None:
    with pytest.raises(ValueError, match="pretrained_model_name_or_path") as caught:
        load_backbone(source)
    assert repr(source) in str(caught.value)


def test_other_families_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        load_backbone(str(folder))
