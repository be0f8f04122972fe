"""What the UNet predicts, schedules that end in pure noise, Turbo's noise levels, and the refiner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from torch import Tensor

from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.models.backbone import as_backbone, load_backbone, load_pipeline
from diffpref.models.pipeline import needs_picture, with_schedule
from diffpref.paths.forward import ForwardNoising
from diffpref.scorers.implicit import ImplicitReward

Make = Callable[..., DiffusionPipeline]
Folder = Callable[[str], Path]
TURBO = {249: 0.654189007, 499: 0.242359167, 749: 0.033171483, 999: 0.0}
"""alpha squared of the schedule rescaled to zero terminal SNR, computed in float64."""


def noise(*shape: int) -> Tensor:
    """Reproducible normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def batch(groups: int) -> PreferenceBatch:
    """Latents of pairs."""
    ids = tuple(map(str, range(groups)))
    latents = noise(groups, 2, 1, 2, 2)
    return PreferenceBatch(latents, Conditioning(torch.zeros(groups, 2, 1, 1)), torch.ones(groups, 2), ids, (0,) * groups)


# Overrides


def test_settings_win_over_the_checkpoint_and_are_exported(folder_of: Folder, tmp_path: Path) -> None:
    loaded = load_pipeline(str(folder_of("sd2")), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    process = as_backbone(loaded, "model").process
    assert process.prediction_type == "v_prediction"
    assert process.has_zero_terminal_snr
    loaded.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (stored["prediction_type"], stored["rescale_betas_zero_snr"], stored["timestep_spacing"]) == ("v_prediction", True, "trailing")
    again = load_backbone(str(tmp_path))
    assert torch.equal(again.process.alphas_cumprod, process.alphas_cumprod)
    assert again.process.prediction_type == "v_prediction"


def test_settings_that_say_the_same_change_nothing(folder_of: Folder) -> None:
    scheduler = load_pipeline(str(folder_of("sd2"))).scheduler
    assert with_schedule(scheduler, "epsilon", False) is scheduler
    assert with_schedule(scheduler, None, None) is scheduler


def test_a_scheduler_that_cannot_be_rescaled_becomes_ddim(folder_of: Folder, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder_of("sd1"))
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    pipeline.save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path), prediction_type="v_prediction").scheduler) is PNDMScheduler
    made = load_pipeline(str(tmp_path), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    made.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    made.scheduler.set_timesteps(10)
    assert int(made.scheduler.timesteps[0]) == 999
    assert float(made.scheduler.alphas_cumprod[-1]) == 0
    images = made("a red circle", num_inference_steps=2, output_type="np", height=32, width=32).images
    assert torch.isfinite(torch.tensor(images)).all()


def test_rescaled_schedulers_and_our_own_formula_agree(folder_of: Folder) -> None:
    plain = load_backbone(str(folder_of("sd2"))).process
    made = as_backbone(load_pipeline(str(folder_of("sd2")), prediction_type="v_prediction", rescale_betas_zero_snr=True), "m").process
    torch.testing.assert_close(made.alphas_cumprod, plain.with_zero_terminal_snr().alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert float(made.alphas_cumprod[-1]) == 0
    x_0, eps, t = noise(1, 2, 4, 8, 8), noise(1, 2, 4, 8, 8), torch.full((1, 2), 999)
    assert torch.equal(made.add_noise(x_0, eps, t), eps)
    assert torch.equal(made.target(x_0, eps, t), -x_0)  # v at pure noise asks for the picture


def test_a_noise_predictor_cannot_start_from_pure_noise(folder_of: Folder) -> None:
    pipeline = load_pipeline(str(folder_of("sd2")), rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr is true .* predicts noise") as caught:
        as_backbone(pipeline, "model")
    for remedy in ("v_prediction", "is_turbo", "rescale_betas_zero_snr false"):
        assert remedy in str(caught.value)


# Turbo


def test_turbo_trains_at_its_levels_of_the_rescaled_schedule(folder_of: Folder) -> None:
    pipeline = load_pipeline(str(folder_of("sdxl")))
    before = dict(pipeline.scheduler.config)
    process = as_backbone(pipeline, "model", is_turbo=True).process
    for t, expected in TURBO.items():
        assert float(process.alphas_cumprod[t]) == pytest.approx(expected, abs=1e-6)  # diffusers' betas are float32
    assert process.timesteps.tolist() == [249, 499, 749]
    (step,) = ForwardNoising()(batch(400), process, batch(400).random(0))
    counts = torch.bincount(step.timesteps[:, 0])[[249, 499, 749]]
    assert int(counts.sum()) == 400
    assert counts.min() > 100
    assert dict(pipeline.scheduler.config) == before  # Turbo's sampler starts below pure noise


def test_turbo_at_the_end_would_show_two_equal_inputs(folder_of: Folder) -> None:
    process = as_backbone(load_pipeline(str(folder_of("sdxl"))), "model", is_turbo=True).process
    eps, end = noise(4, 1, 1, 2, 2).expand(4, 2, 1, 2, 2), torch.full((4, 2), 999)
    x_t = process.add_noise(batch(4).latents, eps, end)
    assert torch.equal(x_t[:, 0], x_t[:, 1])
    inside = process.add_noise(batch(4).latents, eps, torch.full((4, 2), 749))
    assert not torch.equal(inside[:, 0], inside[:, 1])


@pytest.mark.parametrize("kind", ["sd1", "refiner"])
def test_turbo_is_sdxl(kind: str, folder_of: Folder) -> None:
    with pytest.raises(ValueError, match=r"is_turbo is true, but .* Turbo is an SDXL model"):
        as_backbone(load_pipeline(str(folder_of(kind))), "model", is_turbo=True)


def test_a_scorer_stays_inside_the_trained_levels(folder_of: Folder) -> None:
    seen: list[int] = []

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        seen.extend(timesteps.flatten().tolist())
        return torch.zeros_like(x_t)

    process = as_backbone(load_pipeline(str(folder_of("sdxl"))), "model", is_turbo=True).process
    for draws in (1, 3, 10):
        seen.clear()
        assert ImplicitReward(predict, predict, process, num_draws=draws).gains(batch(30)).shape == (30, 2, draws)
        assert set(seen) == {249, 499, 749}
        assert seen[:60] == seen[60:120]  # policy and reference


# Refiner


def test_the_refiner_encodes_as_its_pipeline_does(folder_of: Folder) -> None:
    backbone = load_backbone(str(folder_of("refiner")))
    assert backbone.family == "sdxl_refiner"
    assert isinstance(backbone.pipeline, StableDiffusionXLImg2ImgPipeline)
    assert backbone.uses_time_ids
    assert needs_picture(backbone.pipeline)
    prompts = ["a red circle", "two large blue squares, next to a zebra"]
    cond = backbone.encode_prompts(prompts)
    embeds, empty, pooled, empty_pooled = backbone.pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=True)
    null = backbone.null_prompt()
    assert cond.pooled_prompt_embeds is not None
    assert null.pooled_prompt_embeds is not None
    torch.testing.assert_close(cond.prompt_embeds[:, 0], embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cond.pooled_prompt_embeds[:, 0], pooled, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(null.prompt_embeds[0], empty[:1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(null.pooled_prompt_embeds[0], empty_pooled[:1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_refiner_sees_size_crop_and_an_aesthetic_score(folder_of: Folder) -> None:
    backbone = load_backbone(str(folder_of("refiner")))
    width = backbone.denoiser.config.cross_attention_dim
    x_t, t = noise(2, 2, 4, 8, 8), torch.tensor([[0, 0], [150, 150]])
    six = torch.tensor([64.0, 48.0, 0.0, 8.0, 32.0, 32.0]).expand(2, 2, 6)
    cond = Conditioning(noise(2, 2, 5, width), noise(2, 2, 20), six)
    predict = backbone.predictor(backbone.denoiser)
    made = predict(x_t, t, cond)
    five = torch.tensor([[64.0, 48.0, 0.0, 8.0, 6.0]]).expand(2, -1)
    for g in range(2):
        assert cond.pooled_prompt_embeds is not None
        added = {"text_embeds": cond.pooled_prompt_embeds[g], "time_ids": five}
        alone = backbone.denoiser(x_t[g], t[g], encoder_hidden_states=cond.prompt_embeds[g], added_cond_kwargs=added).sample
        torch.testing.assert_close(made[g], alone, rtol=1e-5, atol=1e-5)
    already = Conditioning(cond.prompt_embeds, cond.pooled_prompt_embeds, five.expand(2, 2, 5))
    assert torch.equal(predict(x_t, t, already), made)
    times = backbone.pipeline._get_add_time_ids((64, 48), (0, 8), (32, 32), 6.0, 2.5, (64, 48), (0, 8), (32, 32), torch.float32, 20)
    assert torch.equal(times[0][0], five[0])


def test_the_refiner_trains_at_the_least_noisy_fifth(folder_of: Folder) -> None:
    process = load_backbone(str(folder_of("refiner"))).process
    (step,) = ForwardNoising()(batch(2000), process, batch(2000).random(0))
    assert (int(step.timesteps.min()), int(step.timesteps.max())) == (0, 199)
    assert float(process.alphas_cumprod[201]) == pytest.approx(0.7521434016, rel=1e-5)
    counts = torch.histc(step.timesteps[:, 0].float(), bins=5, min=0, max=200)
    assert counts.min() > 320
    assert isinstance(load_backbone(str(folder_of("refiner"))).denoiser, UNet2DConditionModel)
