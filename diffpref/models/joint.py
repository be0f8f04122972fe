"""A UNet and its text encoders as one module, for runs that train both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffpref.core.types import Conditioning, Predict

Encode = Callable[[Sequence[nn.Module], Tensor], Conditioning]
"""(text encoders, token ids (N, E, L)) -> conditioning (N, 1, ...)."""


class TextAndUNet(nn.Module):
    """Encodes token ids, then denoises, in one forward: a data-parallel wrapper then sees every trained parameter in it."""

    def __init__(
        self,
        unet: nn.Module,
        encoders: Mapping[str, nn.Module],
        encode: Encode,
        predictor: Callable[[nn.Module], Predict],
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text = nn.ModuleDict(encoders)
        self._encode = encode
        self._predict = predictor(unet)
        self.recompute = recompute
        """Encode again in the backward pass in place of keeping the encoders' activations while the UNet runs."""

    def forward(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """The prediction (G, K, C, h, w) for x_t, timesteps (G, K) and cond.token_ids (G, K, E, L); every prompt is encoded once."""
        assert cond.token_ids is not None, "the text encoders are trained: the source must yield token ids"
        shape = timesteps.shape
        distinct, place = torch.unique(cond.token_ids.flatten(0, 1), dim=0, return_inverse=True)
        if self.recompute and torch.is_grad_enabled():
            text = checkpoint(self.encode, distinct, use_reentrant=False)
        else:
            text = self.encode(distinct)
        text = text.map(lambda x: x[place, 0].unflatten(0, shape))
        return self._predict(x_t, timesteps, replace(text, time_ids=cond.time_ids))

    def encode(self, token_ids: Tensor) -> Conditioning:
        """Token ids (N, E, L) to conditioning (N, 1, ...); a row of -1 gives zeros."""
        text = self._encode(list(self.text.values()), token_ids.clamp(min=0))
        given = token_ids[:, 0, 0] >= 0
        return text.map(lambda x: x * given.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))
