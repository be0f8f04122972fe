"""Updates whose strength follows the user: what they leave alone, what gets a gradient, how users mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffpref.models.lora import add_lora
from diffpref.models.user_attention import UserStates, add_user_attention, user_kwargs
from diffpref.models.user_lora import add_user_lora, user_shown, user_updates
from tests.models.test_user_attention import WIDTH, inputs, tokens


@pytest.fixture
def unet(sd_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """With a branch and updates that start from nothing."""
    add_user_attention(sd_unet, WIDTH, 0)
    add_user_lora(sd_unet, WIDTH, 3, 0)
    return sd_unet


def filled(unet: nn.Module) -> None:
    """Give the updates numbers, as training does; the branch stays zero."""
    for i, update in enumerate(user_updates(unet).values()):
        nn.init.normal_(update.up.weight, std=0.3, generator=torch.Generator().manual_seed(i))


def drawn(unet: Any, states: UserStates | None) -> Tensor:
    """A prediction for a user."""
    given = {} if states is None else {"cross_attention_kwargs": {"user": states}}
    return unet(*inputs(), **given).sample.detach()


def test_the_base_model_is_left_alone_bit_for_bit(sd_unet: UNet2DConditionModel) -> None:
    before = drawn(sd_unet, None)
    add_user_attention(sd_unet, WIDTH, 0)
    add_user_lora(sd_unet, WIDTH, 3, 0)
    told = UserStates(tokens()[:, None])
    assert torch.equal(drawn(sd_unet, told), before)  # nothing learned yet
    filled(sd_unet)
    assert (drawn(sd_unet, told) - before).abs().max() > 0.01
    assert torch.equal(drawn(sd_unet, None), before)
    assert torch.equal(drawn(sd_unet, UserStates(0 * tokens()[:, None])), before)
    assert torch.equal(drawn(sd_unet, UserStates(tokens()[:, None], scale=0.0)), before)


def test_convolutions_attention_and_feed_forward_have_an_update(unet: UNet2DConditionModel) -> None:
    names = list(user_updates(unet))
    for ending in ("conv1", "conv2", "attn1.to_q", "attn2.to_v", "attn2.to_out.0", "ff.net.2", "proj_in"):
        assert any(name.endswith(ending) for name in names), ending
    assert not any("user_k" in name or "user_v" in name for name in names)


def test_an_update_is_what_the_equation_says(unet: UNet2DConditionModel) -> None:
    filled(unet)
    update = next(u for name, u in user_updates(unet).items() if name.endswith("ff.net.2"))
    layer = unet.get_submodule(update.name)
    x, told, share = torch.randn(4, 5, layer.in_features), torch.stack([tokens(2), tokens(2, seed=5)], 1), torch.tensor([0.25, -1.0])
    with user_shown(unet, UserStates(told, share, scale=0.5)), torch.no_grad():
        out = layer(x)
        gate = torch.stack([sum(w * update.gate(u.sum(0) / 3**0.5) for w, u in zip(share, person, strict=True)) for person in told])
        wanted = layer.weight @ x.mT + layer.bias[:, None]
        for i in range(4):  # both pictures of a user in turn
            wanted[i] += 0.5 * (update.up.weight * gate[i // 2]) @ update.down.weight @ x[i].T
    torch.testing.assert_close(out, wanted.mT, atol=1e-5, rtol=1e-5)


def test_an_update_of_a_convolution_is_one_of_its_kernel(unet: UNet2DConditionModel) -> None:
    filled(unet)
    update = next(u for name, u in user_updates(unet).items() if name.endswith("resnets.0.conv1"))
    layer = unet.get_submodule(update.name)
    x, told = torch.randn(2, layer.in_channels, 6, 5), tokens(1)
    with user_shown(unet, UserStates(told[:, None], scale=0.5)), torch.no_grad():
        gate = update.gate(told[0].sum(0) / 3**0.5)
        kernel = layer.weight + 0.5 * torch.einsum("or,r,rixy->oixy", update.up.weight[:, :, 0, 0], gate, update.down.weight)
        wanted = nn.functional.conv2d(x, kernel, layer.bias, layer.stride, layer.padding)
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), wanted, atol=1e-5, rtol=1e-5)


def test_mixing_users_and_the_order_of_tokens(unet: UNet2DConditionModel) -> None:
    filled(unet)
    two, share = torch.stack([tokens(1)[0], tokens(1, seed=5)[0]])[None], torch.tensor([0.3, 0.7])
    mixed = (share[:, None, None] * two[0]).sum(0)[None, None]
    torch.testing.assert_close(drawn(unet, UserStates(two, share)), drawn(unet, UserStates(mixed)))  # linear in the tokens
    torch.testing.assert_close(drawn(unet, UserStates(two[:, :1, [2, 0, 1]])), drawn(unet, UserStates(two[:, :1])))
    halves = torch.cat([0 * two[:, :1], two[:, :1]])
    assert torch.equal(drawn(unet, UserStates(halves))[0], drawn(unet, None)[0])  # the unconditional half knows nobody
    torch.testing.assert_close(drawn(unet, UserStates(halves))[1], drawn(unet, UserStates(two[:, :1]))[1])


def test_factors_are_computed_once_per_run(unet: UNet2DConditionModel) -> None:
    filled(unet)
    calls: list[int] = []
    for update in user_updates(unet).values():
        update.gate.register_forward_hook(lambda *_: calls.append(0))
    states = UserStates(tokens(1)[:, None], kept={})
    assert torch.equal(drawn(unet, states), drawn(unet, states))
    assert len(calls) == len(user_updates(unet))


def test_gradients_do_not_depend_on_recomputing(unet: UNet2DConditionModel) -> None:
    filled(unet)
    unet.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        told = tokens().requires_grad_()
        out = unet(*inputs(), **user_kwargs(told)).sample
        with torch.no_grad():
            unet(*inputs())  # a reference that knows no user, before the backward pass
        out.pow(2).sum().backward()
        found.append({n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None} | {"tokens": told.grad})
    assert sum("user_lora" in name for name in found[0]) == 3 * len(user_updates(unet))
    assert all("user_" in name or name == "tokens" for name in found[0])
    assert all(x is not None and x.any() for x in (found[0]["tokens"], *(g for n, g in found[0].items() if "user_lora" in n)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_adapters_may_be_there_before(sd_unet: UNet2DConditionModel) -> None:
    """Names say nothing of them, so that weights of either order fit the other."""
    before = drawn(sd_unet, None)
    add_lora(sd_unet, 2, 2, "all", 0)
    add_user_attention(sd_unet, WIDTH, 0)
    add_user_lora(sd_unet, WIDTH, 3, 0)
    names = set(user_updates(sd_unet))
    assert not any("base_layer" in name or "lora_A" in name for name in names)
    assert any(name.endswith("conv1") for name in names)
    filled(sd_unet)
    with_lora = drawn(sd_unet, UserStates(tokens()[:, None]))
    sd_unet.disable_adapters()
    assert torch.equal(drawn(sd_unet, UserStates(tokens()[:, None])), with_lora)  # a fresh LoRA adds nothing; the update stays
    assert torch.equal(drawn(sd_unet, None), before)


def test_refusals(sd_unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="user_rank is 0"):
        add_user_lora(sd_unet, WIDTH, 0, 0)
