"""Adafactor and AdamW for weights in float32 or bf16. Moments and products are float32; bf16 weights are rounded stochastically.

    w <- up with probability (w - down) / (up - down), else down        the two neighbours of w in bf16; the expectation is w

A step of training is often smaller than half the distance of two bf16 numbers (0.4 % of a weight): rounded to the nearest, it would be
lost every time (Zamirai et al., 2020, arXiv:2010.06192). Draws depend on seed and step alone: ranks round alike and a resumed run goes on.

Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235) without first moment and with a rate of its own, as in the published SDXL runs:

    b_t = 1 - t^-0.8,  V <- b_t V + (1 - b_t) (g^2 + 1e-30),  u = g / sqrt(V),  u <- u / max(1, rms(u)),  w <- (1 - rate decay) w - rate u

V is kept as its means over the rows and columns of a matrix, R and C: V = R C / mean(R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diffpref.core.random import derived

State = dict[str, Any]
Change = Callable[[Tensor, Tensor, State, State], None]
"""(float32 weight, float32 gradient, state of the weight, settings of its group): alters the weight and its state."""
FLOOR = 1e-30
"""Added to squared gradients by Adafactor."""


def rounded(x: Tensor, draw: torch.Generator) -> Tensor:
    """Float32 to bf16, up or down with probabilities that keep the expectation. Not finite numbers stay so."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, generator=draw, device=x.device, dtype=torch.int32)
    up_or_down = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), up_or_down, x).to(torch.bfloat16)


class Rounding(torch.optim.Optimizer):
    """One step: every weight as float32 to `change`, which alters it in place, and back to its own type."""

    def __init__(self, weights: Iterable[Tensor], change: Change, seed: int, **defaults: Any) -> None:
        super().__init__(weights, defaults)
        self.change, self.seed = change, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change all weights that have a gradient."""
        assert closure is None, "not supported"
        draws: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                weight = p.data.float()
                self.change(weight, p.grad.float(), state, group)
                if p.dtype != torch.float32:
                    if p.device not in draws:
                        seed = derived(self.seed, "rounding", int(state["step"]))
                        draws[p.device] = torch.Generator(p.device).manual_seed(seed)
                    p.copy_(rounded(weight, draws[p.device]))


def adamw(weight: Tensor, gradient: Tensor, state: State, group: State) -> None:
    """As torch does it, with float32 moments whatever the weights are."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    mean, square, (first, second) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    weight.addcdiv_(mean, root, value=-group["lr"] / (1 - first ** state["step"]))


def adafactor(weight: Tensor, gradient: Tensor, state: State, group: State) -> None:
    """See above; the numbers are those of transformers' Adafactor with relative_step and scale_parameter off.

    The larger of the temporary tensors are two of the weight's size.
    """
    keep = 1 - state["step"] ** -0.8
    square = gradient.square().add_(FLOOR)
    if gradient.ndim < 2:
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(weight)
        update = state["exp_avg_sq"].mul_(keep).add_(square, alpha=1 - keep).rsqrt().mul_(gradient)
    else:
        means = {"exp_avg_sq_row": square.mean(-1), "exp_avg_sq_col": square.mean(-2)}
        for name, x in means.items():
            if name not in state:
                state[name] = torch.zeros_like(x)
            state[name].mul_(keep).add_(x, alpha=1 - keep)
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        scale = (rows / rows.mean(-1, keepdim=True)).rsqrt_()
        update = torch.mul(gradient, scale.unsqueeze(-1), out=square).mul_(columns.rsqrt().unsqueeze(-2))
    update.div_((update.norm() / update.numel() ** 0.5).clamp_(min=1.0))
    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
