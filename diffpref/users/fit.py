"""Fitting the light encoder: from some of a user's decisions, predict another one. No diffusion model takes part, so it takes seconds."""

from __future__ import annotations

import copy
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
    batch: int = 128,
    rate: float = 2e-3,
) -> float:
    """Fit in place on the pairs of these users; returns the share of choices of other prompts that it predicts.

        loss = -log sigmoid( u . e ) = -log P(the user prefers what the label says)

    features: pair id -> (F + F + P,) as preferred, rejected, prompt. A context never has the prompt of the pair that it predicts. Pairs of
    every fifth prompt are kept out, and the weights that predict them best are kept: the encoder soon knows pairs by heart. Raises
    ValueError unless some user has pairs of two prompts on either side.
    """
    table, rows, prompts = _columns(users, features)
    _standardise(encoder, table)
    known, other = ([own[(prompts[own] % 5 == 0) == kept_out] for own in rows] for kept_out in (False, True))
    owners = [i for i, own in enumerate(known) if len(prompts[own].unique()) > 1]
    judged = [i for i in owners if len(other[i])]
    if not owners or not judged:
        raise ValueError("the encoder cannot be fitted: no user has decided pairs of enough prompts; give more pairs per user")
    optimizer = torch.optim.AdamW([*encoder.evidence.parameters(), *encoder.attend.parameters()], rate, weight_decay=0.1)
    draws, best, kept = generator(seed, "fit_encoder"), 0.0, copy.deepcopy(encoder.state_dict())

    def margins(of: Sequence[Tensor], whose: Sequence[int], number: int, source: torch.Generator) -> Tensor:
        picked = [whose[i] for i in torch.randint(len(whose), (number,), generator=source).tolist()]
        target = torch.stack([of[i][torch.randint(len(of[i]), (), generator=source)] for i in picked])
        context = torch.stack([known[i][torch.randint(len(known[i]), (num_examples,), generator=source)] for i in picked])
        return _margins(encoder, table[context], table[target], prompts[context] == prompts[target][:, None])

    for step in range(steps):
        optimizer.zero_grad()
        F.softplus(-margins(known, owners, batch, draws)).mean().backward()
        optimizer.step()
        if (step + 1) % LOOK_EVERY == 0 or step == steps - 1:
            with torch.no_grad():
                right = float((margins(other, judged, 1000, generator(seed, "judge_encoder")) > 0).float().mean())
            if right > best:
                best, kept = right, copy.deepcopy(encoder.state_dict())
    encoder.load_state_dict(kept)
    with torch.no_grad():
        vectors = torch.cat([encoder.vector(table[own[:num_examples]][None]) for own in rows])
        encoder.unit.copy_(1 / vectors.std().clamp(min=1e-6))
    return best


LOOK_EVERY = 25
"""Steps between looks at the pairs that are kept out."""


def _margins(encoder: ExampleEncoder, context: Tensor, target: Tensor, same_prompt: Tensor) -> Tensor:
    """u . e (B,) of contexts (B, N, F + F + P) and targets (B, F + F + P); examples of the target's prompt (B, N) do not count."""
    evidence, logits = encoder.evidence_of(context)
    logits = logits.masked_fill(same_prompt, -torch.inf)
    vector = (logits.softmax(-1).nan_to_num()[..., None] * evidence).sum(1)
    return (vector * encoder.evidence_of(target)[0]).sum(-1)


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
