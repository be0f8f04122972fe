"""UNet and text encoders trained together: one forward, the same function, and files that plain diffusers reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from diffpref.core.policy import adapters_off
from diffpref.core.types import Conditioning
from diffpref.models.backbone import FAMILIES, Backbone, load_backbone, on_token_ids, with_text_encoders
from diffpref.models.joint import TextAndUNet
from diffpref.models.lora import LORA_FILE, adapted_parts, add_lora, add_text_lora, merged_copy, save_lora, trainable_state

PROMPTS = [["a red circle", "a blue square"], ["a blue square", "a red circle"], ["a red circle", "a red circle"]]
TIMES = torch.tensor([[10, 10], [500, 500], [900, 900]])


def joint(folder: Path, recompute: bool = False, **variant: bool) -> tuple[Backbone, TextAndUNet]:
    """A backbone with adapters on UNet and text encoders."""
    backbone = load_backbone(str(folder))
    add_lora(backbone.denoiser, rank=2, alpha=3, targets="attention", seed=0, **variant)
    return with_text_encoders(backbone, recompute, rank=2, alpha=3, seed=0, use_rslora=variant.get("use_rslora", False))


def batch(backbone: Backbone) -> tuple[Tensor, Tensor, Conditioning]:
    """x_t, t and conditioning of three pairs, two of them with a caption per image."""
    rows = [backbone.encode_prompts(pair).map(lambda x: x[:, 0]) for pair in PROMPTS]
    fields = {n: torch.stack([getattr(row, n) for row in rows]) for n, x in vars(rows[0]).items() if x is not None}
    cond = Conditioning(**fields)
    if backbone.uses_time_ids:
        cond = replace(cond, time_ids=torch.full((3, 2, 6), 32.0))
    return torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), TIMES, cond


def perturb(module: torch.nn.Module) -> None:
    """As if the adapters had been trained."""
    maker = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainable_state(module).values():
            p.add_(0.2 * torch.randn(p.shape, generator=maker))


@pytest.fixture(params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A saved pipeline of each family."""
    return request.getfixturevalue(f"{request.param}_folder")


@torch.no_grad()
def test_it_computes_what_encoders_and_unet_compute_one_after_the_other(folder: Path) -> None:
    plain, (backbone, module) = load_backbone(str(folder)), joint(folder)
    x_t, t, cond = batch(backbone)
    assert cond.token_ids is not None
    assert cond.token_ids.dtype == torch.int64
    assert cond.token_ids.shape[:3] == (3, 2, len(module.text))
    assert cond.prompt_embeds is None
    expected = plain.predictor(plain.denoiser)(*batch(plain))
    policy = backbone.predictor(module)
    made = policy(x_t, t, cond)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    with adapters_off(module):
        assert torch.equal(policy(x_t, t, cond), made)
    perturb(module.text)
    assert not torch.allclose(policy(x_t, t, cond), made, atol=1e-3)
    with adapters_off(module):
        assert torch.equal(policy(x_t, t, cond), made)


@pytest.mark.parametrize("zeros", [False, True])
@torch.no_grad()
def test_the_empty_prompt_is_the_pipelines(zeros: bool, folder: Path) -> None:
    plain, (backbone, module) = load_backbone(str(folder)), joint(folder)
    for pipeline in (plain.pipeline, backbone.pipeline):
        if plain.family == "sdxl":
            pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    ids = backbone.null_prompt().token_ids
    assert ids is not None
    found, expected = module.encode(ids[:, 0]), plain.null_prompt()
    assert expected.prompt_embeds is not None
    torch.testing.assert_close(found.prompt_embeds, expected.prompt_embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.pooled_prompt_embeds, expected.pooled_prompt_embeds, rtol=1e-6, atol=1e-6)
    assert bool((expected.prompt_embeds == 0).all()) is (zeros and plain.family == "sdxl")


def test_every_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, module = joint(folder)
    sizes: list[int] = []
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda ids: (sizes.append(len(ids)), encode(ids))[1])
    backbone.predictor(module)(*batch(backbone))
    assert sizes == [2]


def test_every_trained_parameter_gets_a_gradient_in_one_forward(folder: Path) -> None:
    gradients: list[dict[str, Any]] = []
    for recompute in (False, True):
        backbone, module = joint(folder, recompute)
        perturb(module)
        backbone.predictor(module)(*batch(backbone)).square().mean().backward()
        gradients.append({name: p.grad for name, p in trainable_state(module).items()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert any(name.startswith("text.text_encoder.") for name in gradients[0])
    assert any(name.startswith("text.text_encoder_2.") for name in gradients[0]) is (backbone.family == "sdxl")
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_adapters_that_came_with_layers_out_of_reach_are_not_trained_there(sdxl_folder: Path) -> None:
    backbone = load_backbone(str(sdxl_folder))
    encoders = [backbone.pipeline.text_encoder, backbone.pipeline.text_encoder_2]
    add_text_lora(encoders, [2, 3], rank=2, alpha=2, seed=0)  # all layers, as in most published files
    tokens, module = on_token_ids(backbone)
    tokens.predictor(module)(*batch(tokens)).square().mean().backward()
    trained = trainable_state(module)
    assert all(p.grad is not None for p in trained.values())
    assert {name.split(".layers.")[1][0] for name in trained if "text_encoder." in name} == {"0"}


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@torch.no_grad()
def test_plain_diffusers_reads_the_file_with_difference_zero(variant: dict[str, bool], folder: Path, tmp_path: Path) -> None:
    backbone, module = joint(folder, **variant)
    perturb(module)
    save_lora(backbone.pipeline, tmp_path)
    names = set(load_file(tmp_path / LORA_FILE))
    assert len(names) == len(trainable_state(module))
    assert all(".text_model." in name for name in names if name.startswith("text_encoder"))
    fresh = load_backbone(str(folder))
    untrained = batch(fresh)[2].prompt_embeds
    fresh.pipeline.load_lora_weights(tmp_path)
    trained = replace(load_backbone(str(folder)), pipeline=backbone.pipeline)  # the same steps on the trained parts
    trained_cond = batch(replace(fresh, encode_prompts=lambda p: _encode(trained, p)))[2]
    cond = batch(fresh)[2]
    assert untrained is not None
    assert cond.prompt_embeds is not None
    assert not torch.allclose(cond.prompt_embeds, untrained, atol=1e-3)
    assert torch.equal(cond.prompt_embeds, trained_cond.prompt_embeds)
    x_t = batch(fresh)[0]
    assert torch.equal(fresh.predictor(fresh.denoiser)(x_t, TIMES, cond), fresh.predictor(backbone.denoiser)(x_t, TIMES, trained_cond))


def _encode(backbone: Backbone, prompts: Any) -> Conditioning:
    return FAMILIES[backbone.family].encode_prompts(backbone.pipeline, prompts)


@torch.no_grad()
def test_merged_text_encoders_are_saved_as_plain_ones(folder: Path, tmp_path: Path) -> None:
    backbone, module = joint(folder)
    perturb(module)
    expected = _encode(backbone, ["a red circle"])
    parts = {name: merged_copy(part) for name, part in adapted_parts(backbone.pipeline).items()}
    assert set(parts) == {"unet", *module.text}
    type(backbone.pipeline)(**{**backbone.pipeline.components, **parts}).save_pretrained(tmp_path)
    extra = {"safety_checker": None, "requires_safety_checker": False} if backbone.family == "sd" else {}
    loaded = replace(backbone, pipeline=DiffusionPipeline.from_pretrained(tmp_path, **extra))
    torch.testing.assert_close(_encode(loaded, ["a red circle"]).prompt_embeds, expected.prompt_embeds, rtol=1e-4, atol=1e-4)
