"""Activations that are kept or computed again: the same numbers, less memory, no costly product twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffpref.models.execution import NARROW, Recompute, set_recompute
from diffpref.models.lora import add_lora
from diffpref.training.step_cost import Counter


def answer(unet: UNet2DConditionModel, size: int = 8) -> tuple[Tensor, dict[str, Tensor], Counter]:
    """Prediction for fixed inputs, gradients of what is trained, and the counter of the forward pass."""
    maker = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, 4, size, size, generator=maker), torch.randn(2, 7, 16, generator=maker)
    with Counter(unet) as counter:
        out = unet(x_t, torch.tensor([10, 900]), text).sample
    kept = counter.live
    with counter:
        out.pow(2).mean().backward()
    counter.live = kept
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    return out.detach(), gradients, counter


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_is_computed_again_is_the_same(tune: str, sd_unet: UNet2DConditionModel) -> None:
    if tune == "lora":
        add_lora(sd_unet, 2, 2.0, "all", seed=0)
        for name, p in sd_unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    else:
        sd_unet.requires_grad_(True)
    found: dict[Recompute, Any] = {}
    for how in ("off", "selective", "full"):
        set_recompute(sd_unet, how)
        found[how] = answer(sd_unet, 32)
    expected, slopes, _ = found["off"]
    for out, gradients, _ in found.values():
        assert torch.equal(out, expected)
        assert gradients.keys() == slopes.keys()
        assert all(torch.equal(x, slopes[name]) for name, x in gradients.items())
    kept = {how: counter.live for how, (_, _, counter) in found.items()}
    assert kept["full"] < kept["selective"] < 0.8 * kept["off"]


def test_costly_products_are_not_computed_again_and_narrow_ones_are() -> None:
    wide = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        cross_attention_dim=128,
    ).requires_grad_(False)
    flops = {}
    for adapter in (False, True):
        if adapter:
            add_lora(wide, 2, 2.0, "attention", seed=0)
        else:
            wide.requires_grad_(True)
        for how in ("off", "selective", "full"):
            set_recompute(wide, how)
            x_t, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, NARROW)
            with Counter() as counter:
                wide(x_t, torch.tensor([10]), text).sample.sum().backward()
            flops[adapter, how] = counter.flops
        wide.requires_grad_(False)
    assert flops[False, "selective"] == flops[False, "off"] < flops[False, "full"]
    extra = flops[True, "selective"] - flops[True, "off"]  # the products with B, of rank 2
    assert 0 < extra < 0.01 * flops[True, "off"]
