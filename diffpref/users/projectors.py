"""From a user embedding to the tokens of the user branch; trained with it. Zeros go in for a dropped user, and are kept zeros outside.

Each maps (B, L, D) to (B, n, width). Nothing depends on the order of L, which is that of a user's examples or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpref.core.random import generator


class TokenProjector(nn.Module):
    """Every token of an embedding for itself, normalised: for hidden states of a large model."""

    def __init__(self, d: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, bias=False)
        self.linear = _linear(d, width, seed, "token_projector")

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, L, d) to (B, L, width)."""
        out: Tensor = self.linear(self.norm(embeds))
        return out


class UserTable(nn.Module):
    """Learned tokens of each user of a closed set; the embedding (B, 1, 1) is the user's number plus one."""

    def __init__(self, num_users: int, num_tokens: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.table = nn.Embedding(num_users, num_tokens * width)
        nn.init.normal_(self.table.weight, generator=generator(seed, "user_table"))

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, 1, 1) to (B, num_tokens, width)."""
        number = (embeds[:, 0, 0].round().long() - 1).clamp(min=0)
        out: Tensor = self.table(number).unflatten(-1, (self.num_tokens, -1))
        return out


class AxisTokens(nn.Module):
    """A learned token per axis, times the axis' entry of a preference vector (B, 1, A): MCDPO's gamma."""

    def __init__(self, num_axes: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self.axes = nn.Parameter(torch.randn(num_axes, width, generator=generator(seed, "axis_tokens")))

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, 1, A) to (B, A, width)."""
        return embeds[:, 0, :, None] * self.axes


class ExampleEncoder(nn.Module):
    """The light encoder: evidence of each example, attended by its prompt, as a user vector, and that as tokens.

        e_i = h(d, m, p) - h(-d, m, p)        d, m: half the difference and mean of the two pictures' features, p: the prompt's
        u   = sum_i softmax_i(a(m, p)) e_i    user vector
        tokens = u W

    Exchanging preferred and rejected turns e into -e. `users/fit.py` fits h and a to predict choices: logit = u . e of another pair.
    An example of zeros is none.
    """

    mean: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, picture: int, prompt: int, width: int, num_tokens: int = 4, dim: int = 16, hidden: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.sizes = [picture, picture, prompt]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.evidence = nn.Sequential(nn.Linear(sum(self.sizes), hidden), nn.SiLU(), nn.Linear(hidden, dim, bias=False))
            self.attend = nn.Linear(picture + prompt, 1, bias=False)
            self.tokens = nn.Linear(dim, num_tokens * width, bias=False)
        nn.init.zeros_(self.attend.weight)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5, generator=generator(seed, "example_tokens"))
        self.num_tokens = num_tokens
        self.register_buffer("mean", torch.zeros(sum(self.sizes)))  # of the features, set when the encoder is fitted
        self.register_buffer("scale", torch.ones(sum(self.sizes)))
        self.register_buffer("unit", torch.ones(()))  # brings fitted user vectors to unit variance

    def evidence_of(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Examples (..., F + F + P) as preferred, rejected, prompt: evidence (..., dim), and attention logits (...) with -inf for none."""
        preferred, rejected, prompt = ((examples - self.mean) / self.scale).split(self.sizes, -1)
        difference, middle = (preferred - rejected) / 2, (preferred + rejected) / 2
        beside = torch.cat([middle, prompt], -1)
        evidence = self.evidence(torch.cat([difference, beside], -1)) - self.evidence(torch.cat([-difference, beside], -1))
        logits = self.attend(beside).squeeze(-1).masked_fill(examples.eq(0).all(-1), -torch.inf)
        return evidence, logits

    def vector(self, examples: Tensor) -> Tensor:
        """User vector (B, dim) of examples (B, N, F + F + P); zeros where all N are none."""
        evidence, logits = self.evidence_of(examples)
        return (logits.softmax(-1).nan_to_num()[..., None] * evidence).sum(1)

    def forward(self, examples: Tensor) -> Tensor:
        """(B, N, F + F + P) to (B, num_tokens, width)."""
        out: Tensor = self.tokens(self.vector(examples) * self.unit).unflatten(-1, (self.num_tokens, -1))
        return out


def _linear(inputs: int, outputs: int, seed: int, purpose: str) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator(seed, purpose))
    return layer


PROJECTORS: Mapping[str, Callable[..., nn.Module]] = {
    "tokens": TokenProjector,
    "table": UserTable,
    "axes": AxisTokens,
    "examples": ExampleEncoder,
}


def new_projector(kind: str, **sizes: Any) -> nn.Module:
    """A projector by its name and the sizes that its class takes. Raises ValueError for an unknown name."""
    if kind not in PROJECTORS:
        raise ValueError(f"projector is {kind!r}; accepted: {', '.join(PROJECTORS)}")
    return PROJECTORS[kind](**sizes)
