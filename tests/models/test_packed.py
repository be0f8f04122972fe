"""Packed frozen layers: the numbers of plain ones in every shape, with their own gradients, and copies that know their own weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffpref.models import packed
from diffpref.models.lora import add_lora, merged_copy
from diffpref.models.packed import PackedConv2d, PackedLinear, pack, packable_bytes

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a build of torch without MKL")


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's matrices are far smaller than those that are worth it."""
    monkeypatch.setattr(packed, "LEAST", 0)


def plain(**settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 10, **settings).requires_grad_(False)


def num_packed(network: nn.Module) -> int:
    return sum(isinstance(layer, PackedConv2d | PackedLinear) for layer in network.modules())


def with_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a weighted sum of it with respect to x."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 0, "bias": False},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 5, "padding": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [5, 8])
def test_a_packed_convolution_is_the_plain_one_in_every_shape(settings: dict[str, Any], side: int) -> None:
    layer = plain(**settings)
    own = copy.deepcopy(layer)
    pack(own, 2)
    assert isinstance(own, PackedConv2d)
    for batch, height in ((2, side), (2, side), (3, side), (1, side + 4), (4, 40)):  # kept after the first call, and used for others
        x = torch.randn(batch, 6, height, side)
        y, slope = with_gradient(layer, x)
        found, gradient = with_gradient(own, x)
        torch.testing.assert_close(found, y, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-5)
        in_other_order, _ = with_gradient(own, x.to(memory_format=torch.channels_last))
        assert torch.equal(in_other_order, found)
        fresh = copy.deepcopy(own)
        assert not fresh.layouts
        assert all(torch.equal(a, b) for a, b in zip(with_gradient(fresh, x), (found, gradient), strict=True))  # whatever came before


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_matrix_is_the_plain_one_for_any_number_of_rows(bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    own = copy.deepcopy(layer)
    pack(own, 2)
    assert isinstance(own, PackedLinear)
    for shape in ((2, 16, 12), (2, 16, 12), (2, 3, 4, 12), (2, 12), (5, 12), (12,)):
        x = torch.randn(shape)
        y, slope = with_gradient(layer, x)
        found, gradient = with_gradient(own, x)
        torch.testing.assert_close(found, y, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-6)
        fresh = copy.deepcopy(own)
        assert all(torch.equal(a, b) for a, b in zip(with_gradient(fresh, x), (found, gradient), strict=True))  # whatever came before
    assert sorted(own.layouts) == [(rows, way) for rows in (2, 24, 32) for way in (False, True)]  # other batches have none


def test_small_matrices_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST", 12 * 20)
    network = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 11)).requires_grad_(False)
    pack(network, 2)
    assert num_packed(network) == 1
    assert packable_bytes(network) == 4 * 12 * 20


def test_what_is_trained_or_of_another_kind_stays_as_it_is() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        plain(kernel_size=1),
        plain(kernel_size=3, groups=2),
        plain(kernel_size=3, padding="same"),
        plain(kernel_size=3, padding=3),
        plain(kernel_size=3, dilation=2),
        plain(kernel_size=3, padding=1, padding_mode="circular"),
        nn.Linear(3, 3).bfloat16().requires_grad_(False),
        nn.Linear(3, 3),
    )
    assert packable_bytes(network) == 0
    pack(network, 2)
    assert num_packed(network) == 0


@pytest.mark.parametrize("what", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_elsewhere_and_in_other_types_a_packed_layer_computes_as_ever(what: Any) -> None:
    layers = nn.Sequential(plain(kernel_size=3), nn.Flatten(), nn.Linear(10, 2).requires_grad_(False))
    x = torch.randn(1, 6, 3, 3)
    pack(layers, 1)
    layers(x)
    moved = layers.to(what)
    assert moved(x.to(what)).device.type == ("meta" if what == "meta" else "cpu")


def answer(unet: UNet2DConditionModel) -> tuple[Tensor, dict[str, Tensor]]:
    maker = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, 4, 8, 8, generator=maker), torch.randn(2, 77, 16, generator=maker)
    out = unet(x_t, torch.tensor([10, 900]), text).sample
    out.pow(2).mean().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    return out.detach(), gradients


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_packed_unet_predicts_and_learns_the_same_under_the_same_names(sd_unet: UNet2DConditionModel, targets: str) -> None:
    add_lora(sd_unet, 2, 2.0, targets, seed=0)
    for name, p in sd_unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    names, weights = list(sd_unet.state_dict()), packable_bytes(sd_unet)
    expected, slopes = answer(sd_unet)
    pack(sd_unet, 2)
    assert num_packed(sd_unet) > 20
    found, gradients = answer(sd_unet)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert slopes.keys() == gradients.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(gradients[name], slope, atol=1e-6, rtol=1e-4)
    assert list(sd_unet.state_dict()) == names
    assert packable_bytes(sd_unet) == weights > 0
    again, kept = answer(sd_unet)  # with the layouts of the first call
    assert torch.equal(again, found)
    assert all(torch.equal(kept[name], x) for name, x in gradients.items())
    with torch.no_grad():  # as a reference
        maker = torch.Generator().manual_seed(0)
        x_t, text = torch.randn(2, 4, 8, 8, generator=maker), torch.randn(2, 77, 16, generator=maker)
        assert torch.equal(sd_unet(x_t, torch.tensor([10, 900]), text).sample, found)
    sd_unet.enable_gradient_checkpointing()
    recomputed, of_it = answer(sd_unet)
    assert torch.equal(recomputed, found)
    assert all(torch.equal(of_it[name], x) for name, x in gradients.items())


def test_a_merged_copy_of_a_packed_unet_computes_with_its_own_weights(sd_unet: UNet2DConditionModel) -> None:
    add_lora(sd_unet, 2, 2.0, "all", seed=0)
    for name, p in sd_unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    pack(sd_unet, 2)
    expected, _ = answer(sd_unet)
    sd_unet.disable_adapters()
    with torch.no_grad():
        maker = torch.Generator().manual_seed(0)
        x_t, text = torch.randn(2, 4, 8, 8, generator=maker), torch.randn(2, 77, 16, generator=maker)
        untuned = sd_unet(x_t, torch.tensor([10, 900]), text).sample
        sd_unet.enable_adapters()
        merged = merged_copy(sd_unet)(x_t, torch.tensor([10, 900]), text).sample
    assert (expected - untuned).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
