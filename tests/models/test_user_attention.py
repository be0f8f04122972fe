"""The user branch: golden numbers, what it must leave alone, and what gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from diffpref.core.policy import adapter_off, without_user
from diffpref.core.types import Conditioning
from diffpref.models import sd
from diffpref.models.backbone import FAMILIES, load_backbone
from diffpref.models.lora import add_lora
from diffpref.models.user_attention import UserAttention, UserStates, UserUNet, add_user_attention, project, user_kwargs, user_layers
from tests.conftest import TEXT_WIDTH, new_unet

WIDTH = 12


def filled(unet: nn.Module) -> None:
    """Give value projections numbers, as training does."""
    for i, layer in enumerate(user_layers(unet).values()):
        nn.init.normal_(layer.user_v.weight, std=0.5, generator=torch.Generator().manual_seed(i))


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, timesteps and text of the SD UNet of the tests."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, 8, 8, generator=draw),
        torch.tensor([3, 500] * (batch // 2)),
        torch.randn(batch, 7, TEXT_WIDTH, generator=draw),
    )


def tokens(batch: int = 2, number: int = 3, seed: int = 1) -> Tensor:
    """Random user tokens."""
    return torch.randn(batch, number, WIDTH, generator=torch.Generator().manual_seed(seed))


def golden(user: UserStates | None) -> Tensor:
    """A layer whose queries, keys and values are those of the specification: d = 2, one head, q = K_text = I."""
    layer = Attention(query_dim=2, cross_attention_dim=2, heads=1, dim_head=2, bias=False, out_bias=False).double()
    branch = UserAttention("x", 2, 2, 0).double()
    with torch.no_grad():
        for linear in (layer.to_q, layer.to_k, layer.to_out[0]):
            linear.weight.copy_(torch.eye(2))
        layer.to_v.weight.copy_(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))  # V = I W^T
        branch.user_k.weight.copy_(torch.eye(2))
        branch.user_v.weight.copy_(torch.tensor([[-0.05, -0.25], [0.0, 0.4]]) if user is None else VALUES[user.tokens.shape[2]])
    eye = torch.eye(2, dtype=torch.float64)[None]
    return branch(layer, eye, eye, user=user)[0].detach()


KEYS = torch.tensor([[0.5, 0.5], [1.0, -1.0]], dtype=torch.float64)
VALUES = {  # W with K W^T = V for one and for two tokens
    1: torch.tensor([[0.2, 0.0], [0.0, -0.4]]),
    2: torch.linalg.solve(KEYS, torch.tensor([[0.1, -0.2], [-0.3, 0.4]], dtype=torch.float64)).T,
}


@pytest.mark.parametrize(
    ("number", "scale", "wanted"),
    [
        (0, 1.0, [[1.660476901, 2.660476901], [2.339523099, 3.339523099]]),
        (1, 1.0, [[1.760476901, 2.460476901], [2.439523099, 3.139523099]]),
        (1, 0.5, [[1.710476901, 2.560476901], [2.389523099, 3.239523099]]),
        (2, 1.0, [[1.525485301, 2.812964302], [2.336649773, 3.293833088]]),
    ],
)
def test_golden_numbers(number: int, scale: float, wanted: list[list[float]]) -> None:
    user = UserStates(KEYS[None, None, :number], None, scale) if number else None
    torch.testing.assert_close(golden(user), torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_base_model_is_left_alone_bit_for_bit(sd_unet: UNet2DConditionModel) -> None:
    x = inputs()
    before = sd_unet(*x).sample
    add_user_attention(sd_unet, WIDTH, 0)
    assert len(user_layers(sd_unet)) == sum(name.endswith("attn2.processor") for name in sd_unet.attn_processors) > 2
    assert torch.equal(sd_unet(*x).sample, before)  # no tokens
    assert torch.equal(sd_unet(*x, **user_kwargs(tokens())).sample, before)  # value projections of zero
    filled(sd_unet)
    assert not torch.allclose(sd_unet(*x, **user_kwargs(tokens())).sample, before, atol=1e-3)
    assert torch.equal(sd_unet(*x, **user_kwargs(0 * tokens())).sample, before)
    off = {"cross_attention_kwargs": {"user": UserStates(tokens()[:, None], None, 0.0)}}
    assert torch.equal(sd_unet(*x, **off).sample, before)
    with pytest.raises(ValueError, match="user weights already"):
        add_user_attention(sd_unet, WIDTH, 0)


def test_order_of_tokens_and_the_single_token(sd_unet: UNet2DConditionModel) -> None:
    add_user_attention(sd_unet, WIDTH, 0)
    filled(sd_unet)
    x, many = inputs(), tokens()
    torch.testing.assert_close(sd_unet(*x, **user_kwargs(many[:, [2, 0, 1]])).sample, sd_unet(*x, **user_kwargs(many)).sample)
    layer, one = next(iter(user_layers(sd_unet).values())), tokens(number=1)[:, None]
    queries = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    out = layer._branch(queries, UserStates(one), 4)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))  # the same at every place, whatever the query
    torch.testing.assert_close(layer._branch(0 * queries, UserStates(3 * one), 4), 3 * out)  # and linear


def test_mixing_users(sd_unet: UNet2DConditionModel) -> None:
    add_user_attention(sd_unet, WIDTH, 0)
    filled(sd_unet)
    x = inputs()

    def drawn(states: UserStates) -> Tensor:
        out: Tensor = sd_unet(*x, cross_attention_kwargs={"user": states}).sample
        return out

    both, share = torch.stack([tokens(1, 1)[0], tokens(1, 1, 5)[0]]), torch.tensor([0.3, 0.7])
    of_embeds = drawn(UserStates((share[:, None, None] * both).sum(0)[None, None]))
    torch.testing.assert_close(drawn(UserStates(both[None], share)), of_embeds)  # one token each: the same
    several = torch.stack([tokens(1)[0], tokens(1, seed=5)[0]])
    assert not torch.allclose(
        drawn(UserStates(several[None], share)), drawn(UserStates((share[:, None, None] * several).sum(0)[None, None]))
    )
    assert torch.equal(drawn(UserStates(several[None], torch.tensor([1.0, 0.0]))), drawn(UserStates(several[None, :1])))
    halves = torch.cat([0 * several[None, :1], several[None, :1]])
    assert torch.equal(drawn(UserStates(halves))[0], sd_unet(*x).sample[0])  # the unconditional half knows nobody
    assert torch.equal(drawn(UserStates(halves))[1], drawn(UserStates(several[None, :1]))[1])


def test_keys_and_values_are_computed_once(sd_unet: UNet2DConditionModel) -> None:
    add_user_attention(sd_unet, WIDTH, 0)
    filled(sd_unet)
    calls: list[int] = []
    for layer in user_layers(sd_unet).values():
        layer.user_k.register_forward_hook(lambda *_: calls.append(0))
    states = UserStates(tokens(1)[:, None], kept={})
    first, second = (sd_unet(*inputs(), cross_attention_kwargs={"user": states}).sample for _ in range(2))
    assert torch.equal(first, second)
    assert len(calls) == len(user_layers(sd_unet))


def test_backends_agree(sd_unet: UNet2DConditionModel) -> None:
    add_user_attention(sd_unet, WIDTH, 0)
    filled(sd_unet)
    x = inputs()
    usual = sd_unet(*x, **user_kwargs(tokens())).sample
    sd_unet.set_attention_backend("_native_math")
    assert {layer._attention_backend for layer in user_layers(sd_unet).values()} == {"_native_math"}
    try:
        torch.testing.assert_close(sd_unet(*x, **user_kwargs(tokens())).sample, usual, atol=1e-5, rtol=1e-4)
    finally:
        sd_unet.set_attention_backend("native")  # the choice holds for the whole process


def test_gradients(sd_unet: UNet2DConditionModel) -> None:
    add_user_attention(sd_unet, WIDTH, 0)
    sd_unet.train()
    found = {}
    for checkpointing in (False, True):
        if checkpointing:
            sd_unet.enable_gradient_checkpointing()
        sd_unet.zero_grad()
        told = tokens().requires_grad_()
        sd_unet(*inputs(), **user_kwargs(told)).sample.pow(2).sum().backward()
        found[checkpointing] = {n: p.grad.clone() for n, p in sd_unet.named_parameters() if p.grad is not None}
        assert not told.grad.any()  # zero values hide the tokens
        filled(sd_unet) if checkpointing else None
    assert all("user_" in name for name in found[False])
    assert len(found[False]) == 2 * len(user_layers(sd_unet))
    assert all(bool(g.any()) is ("user_v" in name) for name, g in found[False].items())  # keys follow after the first update
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient)
    sd_unet.zero_grad()
    told = tokens().requires_grad_()
    sd_unet(*inputs(), **user_kwargs(told)).sample.pow(2).sum().backward()
    assert told.grad.any()
    assert all(p.grad.any() for n, p in sd_unet.named_parameters() if "user_k" in n)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_reference_of_a_personal_policy_is_the_base_model(family: str, request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(str(request.getfixturevalue(f"{family}_folder")))
    unet, width = backbone.denoiser, backbone.denoiser.config.cross_attention_dim
    cond = backbone.encode_prompts(["a red ring"]).map(lambda x: x.expand(1, 2, *x.shape[2:]))
    if backbone.uses_time_ids:
        cond = Conditioning(cond.prompt_embeds, cond.pooled_prompt_embeds, torch.full((1, 2, 6), 32.0))
    x_t, t = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[10, 800]])
    before = backbone.predictor(unet)(x_t, t, cond)
    add_lora(unet, 2, 2, "attention", 0)
    nn.init.normal_(next(p for n, p in unet.named_parameters() if "lora_B" in n))
    add_user_attention(unet, width, 0)
    filled(unet)
    module = UserUNet(unet, nn.Identity(), FAMILIES[family].predictor)
    told = Conditioning(**{**cond.__dict__, "user_embeds": torch.randn(1, 2, 3, width, generator=torch.Generator().manual_seed(1))})
    only_off = adapter_off(module, module)(x_t, t, told)
    assert (only_off - before).abs().max() > 0.01  # the branch is still on
    assert torch.equal(without_user(adapter_off(module, module))(x_t, t, told), before)
    assert not torch.allclose(module(x_t, t, told), only_off)


def test_unknown_users_are_exact_zeros() -> None:
    projector = nn.Linear(5, WIDTH)  # with a bias, which must not come through
    embeds = torch.stack([torch.zeros(2, 5), torch.ones(2, 5)])
    out = project(projector, embeds)
    assert torch.equal(out[0], torch.zeros(2, WIDTH))
    assert torch.equal(out[1], projector(embeds)[1])


def test_opposite_users_need_conditioning() -> None:
    """Two users label the same pairs the other way round: without them the loss cannot go below log 2, with them it does."""
    torch.manual_seed(0)
    unet = new_unet(TEXT_WIDTH).requires_grad_(False)
    add_user_attention(unet, WIDTH, 0)
    x_t, t, text = inputs(4)
    noise = torch.randn_like(x_t)
    reference = unet(x_t, t, text).sample.detach()
    people = torch.stack([tokens(1)[0], tokens(1, seed=2)[0]])

    def losses(predicted: Tensor) -> Tensor:
        reward = (reference - noise).pow(2).mean((1, 2, 3)) - (predicted - noise).pow(2).mean((1, 2, 3))
        margin = 50 * (reward[::2] - reward[1::2])  # two pairs
        return margin

    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], 1e-2)
    values = []
    for _ in range(25):
        margins = [losses(unet(x_t, t, text, **user_kwargs(person[None].expand(4, -1, -1))).sample) for person in people]
        values.append((nn.functional.softplus(-margins[0]).mean() + nn.functional.softplus(margins[1]).mean()) / 2)
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert float(values[0]) == pytest.approx(0.6931472, abs=1e-6)
    assert float(values[-1]) < 0.55
    plain = losses(unet(x_t, t, text, **user_kwargs(people[:1].expand(4, -1, -1))).sample)
    alone = (nn.functional.softplus(-plain).mean() + nn.functional.softplus(plain).mean()) / 2
    assert float(alone) >= 0.6931471


def test_refusals(sd_folder: Path, make_sd_folder: Callable[[str], Path]) -> None:
    unet = new_unet(TEXT_WIDTH, encoder_hid_dim_type=None)
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.group_norm = nn.GroupNorm(1, 16)
    with pytest.raises(ValueError, match="another kind"):
        add_user_attention(unet, WIDTH, 0)
    assert sd.predictor is FAMILIES["sd"].predictor
