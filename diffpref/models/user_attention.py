"""Cross-attention to tokens of a user beside the text cross-attention (PPD, Dang et al., 2025, arXiv:2501.06655).

    Z = Attn(Q, K_text, V_text) + scale * sum_m weight_m Attn(Q, U_m W_k, U_m W_v)

U_m are tokens of user m; one user with weight 1 while training. Same queries, a softmax of its own per user, no biases, and W_v zero at
the start. So without tokens, with zero tokens, with scale 0 and before the first step the layer is the base model's, bit for bit.
The tokens may say anything about a picture, for instance which of several rewards it should serve (MCDPO); nothing here is about people.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from diffpref.core.random import generator
from diffpref.core.types import Conditioning, Predict
from diffpref.models.attention import NATIVE, DispatchedAttention, attended, check_layer, heads, kernel

Kept = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class UserStates:
    """What the user branch of every layer reads in one forward pass of B pictures.

    b divides B: 1 for one user of all pictures, B for one each, 2 for the two halves of classifier-free guidance, unconditional first.
    """

    tokens: Tensor  # (b, M, n, d): n tokens of each of M users
    weights: Tensor | None = None  # (M,); None for weight 1
    scale: float = 1.0
    kept: Kept | None = None  # by layer: filled in the first pass and used in later ones; one dictionary per sampling run


@dataclass
class UserWeights:
    """The user branch of a UNet: the module that makes tokens, and what is needed to build it again."""

    projector: nn.Module  # (B, L, D) -> (B, n, d)
    width: int  # d
    config: Mapping[str, Any] = field(default_factory=dict)


class UserAttention(nn.Module):
    """Processor of a text cross-attention layer with a user branch.

    Both attentions go through the same kernel, as in `DispatchedAttention`; torch's own by default.
    """

    def __init__(self, name: str, width: int, inner: int, seed: int, backend: AttentionBackendName = NATIVE) -> None:
        super().__init__()
        self.name = name
        # Not to_k and to_v, which a LoRA would take for its targets.
        self.user_k = nn.Linear(width, inner, bias=False)
        self.user_v = nn.Linear(width, inner, bias=False)
        bound = math.sqrt(3 / width)  # keys of unit variance for tokens of unit variance
        nn.init.uniform_(self.user_k.weight, -bound, bound, generator=generator(seed, "user_attention", name))
        nn.init.zeros_(self.user_v.weight)
        self._attention_backend: AttentionBackendName | None = backend

    def __call__(  # diffusers looks at its signature for the arguments that a processor takes
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        user: UserStates | None = None,
    ) -> Tensor:
        """Attention of hidden_states (B, S, C) to text (B, L, D) and user."""
        branch = None if user is None or user.scale == 0 else lambda query: user.scale * self._branch(query, user, attn.heads)
        return attended(attn, hidden_states, encoder_hidden_states, attention_mask, self._attention_backend, branch)

    def _branch(self, query: Tensor, user: UserStates, number: int) -> Tensor:
        """The weighted sum of the users' attentions (B, S, H, C/H)."""
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in self._keys_and_values(user))
        total: Tensor | None = None
        for m in range(key.shape[1]):
            part = kernel(query, heads(key[:, m], number), heads(value[:, m], number), None, self._attention_backend)
            if user.weights is not None:
                part = part * user.weights[m].to(part)
            total = part if total is None else total + part
        assert total is not None, "user tokens of no user"
        return total

    def _keys_and_values(self, user: UserStates) -> tuple[Tensor, Tensor]:
        """Both (b, M, n, C), from `kept` where they are there."""
        if user.kept is not None and self.name in user.kept:
            key, value = user.kept[self.name]
            return key, value
        found = self.user_k(user.tokens), self.user_v(user.tokens)
        if user.kept is not None:
            user.kept[self.name] = found
        return found


def add_user_attention(unet: UNet2DConditionModel, width: int, seed: int) -> None:
    """Give every text cross-attention layer of a UNet a trainable user branch for tokens of this width. Add a LoRA before.

    Raises ValueError for a UNet that has a user branch already, or attention layers of other kinds.
    """
    if user_layers(unet):
        raise ValueError("this UNet has user weights already; load the model anew to give it others")
    before: dict[str, Any] = dict(unet.attn_processors)
    after: dict[str, Any] = {}
    for name, processor in before.items():
        layer = unet.get_submodule(name.removesuffix(".processor"))
        check_layer(name, layer)
        backend = getattr(processor, "_attention_backend", None) or NATIVE
        if name.endswith("attn2.processor"):
            branch = UserAttention(name, width, layer.to_v.out_features, seed, backend)
            after[name] = branch.to(next(layer.parameters()).device)
        else:
            after[name] = DispatchedAttention(backend)
    unet.set_attn_processor(after)


def user_layers(unet: nn.Module) -> dict[str, UserAttention]:
    """The user branches of a UNet by layer."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, UserAttention)}


def user_kwargs(tokens: Tensor | None) -> dict[str, Any]:
    """The argument by which a forward of the UNet hands tokens (B, n, d) to its user branches; none for None."""
    return {} if tokens is None else {"cross_attention_kwargs": {"user": UserStates(tokens[:, None])}}


def project(projector: nn.Module, embeds: Tensor) -> Tensor:
    """Tokens (B, n, d) of user embeddings (B, L, D); exact zeros for an embedding of zeros, which is a dropped or unknown user."""
    known = embeds.flatten(1).ne(0).any(1)
    tokens: Tensor = projector(embeds)
    return torch.where(known[:, None, None], tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device))


class UserUNet(nn.Module):
    """A UNet with user branches and the projector of its users in one forward: a data-parallel wrapper then sees all that is trained."""

    def __init__(self, unet: nn.Module, projector: nn.Module, predictor: Any) -> None:
        super().__init__()
        self.unet = unet
        self.projector = projector
        self._predict: Predict = predictor(unet)

    def forward(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """The prediction (G, K, C, h, w); cond.user_embeds (G, K, L, D), or None for the model without its user branch."""
        if cond.user_embeds is not None:
            tokens = project(self.projector, cond.user_embeds.flatten(0, 1)).unflatten(0, timesteps.shape)
            cond = replace(cond, user_embeds=tokens)
        return self._predict(x_t, timesteps, cond)
