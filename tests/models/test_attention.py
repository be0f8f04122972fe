"""Attention by name: equal to diffusers' own processor, tried at the shapes of the run, and replaced with a reason where it fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffpref.models import attention
from diffpref.models.attention import KERNELS, DispatchedAttention, attention_shapes, check_attention, use_attention
from diffpref.models.lora import add_lora
from diffpref.models.user_attention import UserAttention, UserStates, add_user_attention, user_layers

SDXL: dict[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 24 + 16,
}


@pytest.fixture(params=["sd", "sdxl"])
def unet(request: pytest.FixtureRequest, sd_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A small UNet of either family with a LoRA whose B is not zero."""
    found = sd_unet
    if request.param == "sdxl":
        torch.manual_seed(3)
        found = UNet2DConditionModel.from_config(dict(sd_unet.config), **SDXL).requires_grad_(False)
    add_lora(found, 2, 2.0, "attention", seed=0)
    for name, p in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return found


def answer(unet: UNet2DConditionModel, user: UserStates | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Prediction for fixed inputs, and the gradients of what is trained."""
    maker = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, 4, 8, 8, generator=maker), torch.randn(2, 77, 16, generator=maker)
    told = {"text_embeds": torch.randn(2, 16, generator=maker), "time_ids": torch.zeros(2, 6)}
    given = {} if user is None else {"cross_attention_kwargs": {"user": user}}
    out = unet(x_t, torch.tensor([10, 900]), text, added_cond_kwargs=told, **given).sample
    out.pow(2).mean().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    return out.detach(), gradients


@pytest.mark.parametrize("recompute", [False, True])
def test_the_dispatched_attention_is_that_of_diffusers_bit_for_bit(unet: UNet2DConditionModel, recompute: bool) -> None:
    expected, slopes = answer(unet)
    unet.set_attn_processor(DispatchedAttention())
    if recompute:
        unet.enable_gradient_checkpointing()
    found, gradients = answer(unet)
    assert torch.equal(found, expected)
    assert gradients.keys() == slopes.keys()
    assert any("attn1" in name for name in gradients)
    assert any("attn2" in name for name in gradients)
    assert all(torch.equal(x, slopes[name]) for name, x in gradients.items())


@pytest.mark.parametrize("name", ["native_math", "native_flash"])
@pytest.mark.parametrize("recompute", [False, True])
def test_other_kernels_agree_to_rounding(unet: UNet2DConditionModel, name: str, recompute: bool) -> None:
    expected, slopes = answer(unet)
    assert use_attention(unet, name, [(8, 8)], 2, torch.float32, is_training=True) is None
    assert {x._attention_backend for x in unet.attn_processors.values()} == {KERNELS[name]}
    if recompute:
        unet.enable_gradient_checkpointing()
    found, gradients = answer(unet)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for parameter, x in gradients.items():
        torch.testing.assert_close(x, slopes[parameter], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_user_branch_takes_the_same_kernel(sd_unet: UNet2DConditionModel, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = copy.deepcopy(sd_unet)
    user = UserStates(torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(1)))
    if order == "before":
        use_attention(sd_unet, "native_math", [(8, 8)], 2, torch.float32, is_training=True)
    for model in (plain, sd_unet):
        add_user_attention(model, 16, seed=0)
        for branch in user_layers(model).values():
            torch.nn.init.normal_(branch.user_v.weight, generator=torch.Generator().manual_seed(2))
    if order == "after":
        use_attention(sd_unet, "native_math", [(8, 8)], 2, torch.float32, is_training=True)
    kinds = {type(x) for x in sd_unet.attn_processors.values()}
    assert kinds == {DispatchedAttention, UserAttention}
    expected, slopes = answer(plain, user)
    asked = []
    own = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *x, **given: asked.append(given["backend"]) or own(*x, **given))
    found, gradients = answer(sd_unet, user)
    assert len(asked) > len(sd_unet.attn_processors)
    assert set(asked) == {KERNELS["native_math"]}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == slopes.keys() != set()
    for name, x in gradients.items():
        torch.testing.assert_close(x, slopes[name], rtol=1e-3, atol=1e-6)


def test_the_shapes_that_are_tried_are_those_of_the_model(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    unet.set_attn_processor(DispatchedAttention())
    seen = set()
    own = attention.dispatch_attention_fn

    def look(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.add((query.shape[1], key.shape[1], query.shape[2], query.shape[3]))
        return own(query, key, *rest, **options)

    monkeypatch.setattr(attention, "dispatch_attention_fn", look)
    answer(unet)
    assert set(attention_shapes(unet, [(8, 8)])) == seen
    assert len(seen) == 2
    wide = torch.randn(1, 4, 4, 16)
    told = {"text_embeds": torch.randn(1, 16), "time_ids": torch.zeros(1, 6)}
    unet(wide, torch.tensor([10]), torch.randn(1, 77, 16), added_cond_kwargs=told)
    unet(wide.mT[..., :12, :], torch.tensor([10]), torch.randn(1, 77, 16), added_cond_kwargs=told)
    assert set(attention_shapes(unet, [(8, 8), (4, 16), (12, 4)])) == seen
    seen.clear()
    unet(torch.randn(1, 4, 7, 5), torch.tensor([10]), torch.randn(1, 77, 16), added_cond_kwargs=told)
    assert set(attention_shapes(unet, [(7, 5)])) == seen


@pytest.mark.parametrize(
    ("name", "is_training", "reason"),
    [
        ("xformers", True, "xformers"),
        ("flash_3", True, "not usable because of missing package"),
        ("native_cudnn", True, "."),
        ("flex", True, "."),
        ("sage", False, "sageattention"),
    ],
)
def test_a_kernel_that_does_not_work_here_is_replaced_with_its_reason(
    name: str, is_training: bool, reason: str, sd_unet: UNet2DConditionModel
) -> None:
    before = dict(sd_unet.attn_processors)
    note = use_attention(sd_unet, name, [(8, 8)], 2, torch.float32, is_training)
    assert note is not None
    assert note.startswith(f"attention {name} cannot be used here (")
    assert reason in note
    assert "\n" not in note
    assert dict(sd_unet.attn_processors) == before


@pytest.mark.parametrize("part", ["output", "gradient"])
def test_a_kernel_that_computes_something_else_is_replaced(
    part: str, sd_unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = attention.dispatch_attention_fn

    def wrong(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = own(query, *rest, **options)
        if options["backend"] is KERNELS["sdpa"]:
            return out
        return 1.1 * out if part == "output" else out.detach() + 1.1 * (out - out.detach())

    monkeypatch.setattr(attention, "dispatch_attention_fn", wrong)
    note = use_attention(sd_unet, "native_math", [(8, 8)], 2, torch.float32, is_training=True)
    assert note is not None
    assert f"its {part} is" in note


def test_unknown_kernels_code_from_the_hub_and_training_in_8_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention 'fast' is unknown; accepted: sdpa, flash, .*xformers"):
        check_attention("fast", is_training=False)
    with pytest.raises(ValueError, match="attention 'flash_hub' is code from the hub, which is never downloaded"):
        check_attention("flash_hub", is_training=True)
    for name in ("sage", "sage_varlen"):
        check_attention(name, is_training=False)
        with pytest.raises(ValueError, match=f"attention is {name}, which rounds to 8 bits and has no backward pass"):
            check_attention(name, is_training=True)
    assert {"sdpa", "native_cudnn", "native_flash", "xformers", "flash_3", "flex", "sage"} <= set(KERNELS)
    assert not any("hub" in name for name in KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native_cudnn", "native_flash", "native_efficient", "xformers", "flash", "flash_3", "flex"])
def test_kernels_of_gpus_agree(name: str, unet: UNet2DConditionModel) -> None:
    note = use_attention(unet.cuda(), name, [(64, 64)], 2, torch.bfloat16, is_training=True)
    if note is not None:
        pytest.skip(note)
