"""Fitting the light encoder: from some of a user's decisions, predict another one. No diffusion model takes part, so it takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.core.random import generator
from diffpref.users.examples import Pair
from diffpref.users.projectors import ExampleEncoder


def fit_encoder(
    encoder: ExampleEncoder,
    users: Mapping[str, Sequence[Pair]],
    features: Mapping[str, Tensor],
    num_examples: int,
    steps: int,
    seed: int,
    batch: int = 256,
    rate: float = 2e-3,
) -> float:
    """Fit in place on the pairs of these users; returns the share of choices predicted in the last tenth of the steps.

        loss = -log sigmoid( u . e ) = -log P(the user prefers what the label says)

    features: pair id -> (F + F + P,) as preferred, rejected, prompt. A context never has the prompt of the pair that it predicts. A user
    needs two prompts; one with a single prompt takes no part.
    """
    table, rows, prompts = _columns(users, features)
    _standardise(encoder, table)
    draws, owners = generator(seed, "fit_encoder"), [i for i, own in enumerate(rows) if len(prompts[own].unique()) > 1]
    if not owners:
        raise ValueError("the encoder cannot be fitted: no user has decided pairs of two prompts; give more pairs per user")
    optimizer = torch.optim.AdamW([*encoder.evidence.parameters(), *encoder.attend.parameters()], rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    right: list[float] = []
    for _ in range(steps):
        picked = [rows[owners[i]] for i in torch.randint(len(owners), (batch,), generator=draws).tolist()]
        target = torch.stack([own[torch.randint(len(own), (), generator=draws)] for own in picked])
        context = torch.stack([own[torch.randint(len(own), (num_examples,), generator=draws)] for own in picked])
        evidence, logits = encoder.evidence_of(table[context])
        logits = logits.masked_fill(prompts[context] == prompts[target][:, None], -torch.inf)
        vector = (logits.softmax(-1).nan_to_num()[..., None] * evidence).sum(1)
        margin = (vector * encoder.evidence_of(table[target])[0]).sum(-1)
        optimizer.zero_grad()
        F.softplus(-margin).mean().backward()
        optimizer.step()
        schedule.step()
        right.append(float((margin > 0).float().mean()))
    with torch.no_grad():
        vectors = torch.cat([encoder.vector(table[own[:num_examples]][None]) for own in rows])
        encoder.unit.copy_(1 / vectors.std().clamp(min=1e-6))
    return float(torch.tensor(right[-max(1, steps // 10) :]).mean())


def _columns(users: Mapping[str, Sequence[Pair]], features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """All pairs as features (N, F + F + P), the rows of each user, and a number for each prompt (N,)."""
    pairs = [pair for own in users.values() for pair in own]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    sizes = [len(own) for own in users.values()]
    rows = list(torch.arange(len(pairs)).split(sizes))
    return torch.stack([features[pair.pair_id] for pair in pairs]), rows, torch.tensor([numbers[pair.prompt] for pair in pairs])


def _standardise(encoder: ExampleEncoder, table: Tensor) -> None:
    """Mean and scale of the features; the same for preferred and rejected, or exchanging them would not turn the evidence around."""
    preferred, rejected, prompt = table.split(encoder.sizes, -1)
    pictures = torch.cat([preferred, rejected])
    encoder.mean.copy_(torch.cat([pictures.mean(0), pictures.mean(0), prompt.mean(0)]))
    scales = [pictures.std(0), pictures.std(0), prompt.std(0) if len(prompt) > 1 else torch.ones_like(prompt[0])]
    encoder.scale.copy_(torch.cat(scales).clamp(min=1e-4))
