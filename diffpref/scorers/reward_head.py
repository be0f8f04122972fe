"""The multi-layer head that turns one feature vector into a reward: 1024, 128, 64, 16, 1 wide in every release that has one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffpref.scorers.weights import fill

_WIDTHS = (1024, 128, 64, 16, 1)
# Positions of the linear layers. Dropout stood between the first four without an activation; the last two were adjacent.
_AFFINE, _GELU = (0, 2, 4, 6, 7), (0, 2, 4, 6, 8)


def load_head(state: Mapping[str, Tensor], what: str, *, gelu: bool = False) -> nn.Module:
    """A head (N, D) -> (N, 1) from tensors named "0.weight", "0.bias", "2.weight", ...

    gelu: with GELU between the linear layers (CycleReward) instead of nothing (ImageReward, LAION aesthetic). what: named in
    the error. Raises ValueError if the tensors are those of another head.
    """
    positions = _GELU if gelu else _AFFINE
    width = state["0.weight"].shape[-1] if "0.weight" in state else _WIDTHS[0]
    between = nn.GELU if gelu else nn.Identity
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for position, out in zip(positions, _WIDTHS, strict=True):
            layers += [between() for _ in range(position - len(layers))]
            layers.append(nn.Linear(width, out))
            width = out
    return fill(nn.Sequential(*layers), state, what)
