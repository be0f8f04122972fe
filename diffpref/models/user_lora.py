"""Low-rank updates of a UNet whose strength follows the user: an extension of PPD's user branch (user_attention.py), not of the paper.

    y = W x + scale * sum_m weight_m  up( gate(U_m) * down(x) )      gate: R tokens' sum / sqrt(n) -> one factor for each of r directions

A user branch reaches a picture through the outputs of text cross-attention alone; tastes about places and colours need the layers that a
LoRA reaches. Every user mixes the same r directions in other proportions. No biases, and `up` zero at the start: so, as in the branch,
without a user, with zero tokens, with scale 0 and before the first step the layer is the base model's.

Layers learn of the user from the UNet's own forward, whose cross_attention_kwargs name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffpref.core.random import generator
from diffpref.models.user_attention import UserStates

ENDINGS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
"""Layers that get an update: of attention, feed-forward and residual blocks, text cross-attention among them."""


class Shown:
    """The user that the layers of one UNet see; None for nobody."""

    user: UserStates | None = None


class UserLora(nn.Module):
    """The update of one linear or convolutional layer."""

    def __init__(self, name: str, layer: nn.Linear | nn.Conv2d, width: int, rank: int, seed: int, shown: Shown) -> None:
        super().__init__()
        self.name, self.shown = name, shown
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **how)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.gate = nn.Linear(width, rank, bias=False)
        draws = generator(seed, "user_lora", name)
        fan_in = self.down.weight[0].numel()
        nn.init.uniform_(self.down.weight, -(fan_in**-0.5), fan_in**-0.5, generator=draws)
        nn.init.normal_(self.gate.weight, std=width**-0.5, generator=draws)
        nn.init.zeros_(self.up.weight)

    @property
    def _directions(self) -> Tensor:
        """The weight of `up` (C, r)."""
        return self.up.weight.flatten(1)

    def add_to(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: what the layer gives (B, ..., C) or (B, C, h, w), with the user's update."""
        user = self.shown.user
        if user is None or user.scale == 0:
            return output
        inner = self.down(inputs[0])  # (B, ..., r) or (B, r, h, w)
        gate = self._gate(user).repeat_interleave(len(inner) // len(user.tokens), 0).to(inner.dtype)  # (B, r)
        if isinstance(self.down, nn.Conv2d):
            inner, weight = (gate[:, :, None, None] * inner).flatten(2), self._directions.expand(len(inner), -1, -1)
            # product and sum in one pass over the output, which is most of what an update costs
            return torch.baddbmm(output.flatten(2), weight.to(inner), inner, alpha=user.scale).view_as(output)
        inner, weight = (gate.view(len(gate), *[1] * (inner.ndim - 2), -1) * inner).flatten(1, -2), self._directions.T
        flat = output.reshape(len(output), -1, output.shape[-1])
        return torch.baddbmm(flat, inner, weight.to(inner).expand(len(inner), -1, -1), alpha=user.scale).view_as(output)

    def _gate(self, user: UserStates) -> Tensor:
        """Factors (b, r), summed over users; kept with the keys and values of a sampling run."""
        kept = user.kept if user.kept is not None else {}
        if self.name not in kept:
            each = self.gate(user.tokens.sum(2) / user.tokens.shape[2] ** 0.5)  # (b, M, r)
            kept[self.name] = (each.sum(1) if user.weights is None else (each * user.weights.to(each)[:, None]).sum(1),)
        return kept[self.name][0]


def add_user_lora(unet: UNet2DConditionModel, width: int, rank: int, seed: int) -> None:
    """Give the UNet's layers updates of this rank for user tokens of this width. Adapters may be there already, or come later.

    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"user_rank is {rank}; it must be at least 1, or 0 for none")
    shown = Shown()
    found = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for full_name, layer in found.items():
        name = full_name.replace(".base_layer", "")
        if not name.endswith(ENDINGS) or ".lora_" in name:
            continue
        update = UserLora(name, layer, width, rank, seed, shown).to(layer.weight.device)
        layer.add_module("user_lora", update)
        layer.register_forward_hook(update.add_to)
    _show_with_forward(unet, shown)


def _show_with_forward(unet: nn.Module, shown: Shown) -> None:
    """Make a forward of the UNet show its user to the layers.

    A forward without a user hides the one before only meanwhile: the backward pass may recompute that one's layers afterwards.
    """
    hidden: list[UserStates | None] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        user = (kwargs.get("cross_attention_kwargs") or {}).get("user")
        hidden.append(shown.user if user is None else user)
        shown.user = user

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shown.user = hidden.pop()

    unet.register_forward_pre_hook(before, with_kwargs=True)
    unet.register_forward_hook(after)


def user_updates(unet: nn.Module) -> dict[str, UserLora]:
    """The updates of a UNet by layer."""
    return {module.name: module for module in unet.modules() if isinstance(module, UserLora)}


@contextmanager
def user_shown(unet: nn.Module, user: UserStates | None) -> Iterator[None]:
    """Within the block the updates see this user, for calls of the UNet's `forward` that go past its hooks."""
    states = list({id(update.shown): update.shown for update in user_updates(unet).values()}.values())
    before = [shown.user for shown in states]
    for shown in states:
        shown.user = user
    try:
        yield
    finally:
        for shown, old in zip(states, before, strict=True):
            shown.user = old
