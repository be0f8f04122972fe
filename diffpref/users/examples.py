"""What is known of a user: decided pairs; and which of them stand in a user's context.

A context is N of a user's pairs. The pair that is trained on, and every pair of its prompt, is in no context it is trained with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from diffpref.core.random import permutation, uniform


@dataclass(frozen=True, eq=False)
class Example:
    """One decision of a user."""

    prompt: str
    preferred: Image.Image
    rejected: Image.Image
    pair_id: str | None = None  # under which an encoder may keep what it computed


class UserEncoder(Protocol):
    """Makes a user embedding of examples."""

    @property
    def facts(self) -> Mapping[str, str | int | float | None]:
        """What the embedding depends on besides the examples; kept with stored embeddings and compared."""
        ...

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """(n_tokens, d) float32 of one user's examples."""
        ...


@dataclass(frozen=True)
class Pair:
    """What contexts are drawn by."""

    pair_id: str
    prompt: str
    user_id: str


def decided_by(pairs: Sequence[Pair], num_examples: int) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """(user -> pairs, user -> number of pairs of users that are left out because they decided too few).

    A user needs, for every pair, `num_examples` pairs of other prompts.
    """
    grouped: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        grouped[pair.user_id].append(pair)
    kept, dropped = {}, {}
    for user, own in grouped.items():
        largest = max(sum(other.prompt == pair.prompt for other in own) for pair in {p.prompt: p for p in own}.values())
        if len(own) - largest >= num_examples:
            kept[user] = own
        else:
            dropped[user] = len(own)
    return kept, dropped


@dataclass(frozen=True)
class Contexts:
    """Contexts of one user, and which of them a pair may be trained with."""

    members: list[list[Pair]]  # M contexts of N pairs, in random order
    allowed: dict[str, list[int]]  # pair id -> numbers of the contexts without the pair and its prompt, at least one

    @classmethod
    def draw(cls, own: Sequence[Pair], num_examples: int, count: int, seed: int) -> Contexts:
        """At least `count` contexts: the user's prompts are dealt into groups, and each group has contexts without it.

        `own` are all pairs of the user, as `decided_by` keeps them. A pair may use every context that has neither it nor its prompt.
        """
        user = own[0].user_id
        prompts = list(dict.fromkeys(pair.prompt for pair in own))
        order = permutation(len(prompts), seed, "user_prompts", user).tolist()
        groups = _groups([prompts[i] for i in order], own, num_examples, min(count, len(prompts)))
        members = []
        for number in range(max(count, len(groups))):
            outside = [pair for pair in own if pair.prompt not in groups[number % len(groups)]]
            chosen = permutation(len(outside), seed, "user_context", user, number)[:num_examples].tolist()
            members.append([outside[i] for i in chosen])
        in_context = [{pair.prompt for pair in context} for context in members]
        allowed = {prompt: [m for m, held in enumerate(in_context) if prompt not in held] for prompt in prompts}
        return cls(members, {pair.pair_id: allowed[pair.prompt] for pair in own})

    def of_visit(self, pair_id: str, visit: int, seed: int) -> int:
        """The context that a pair is trained with at a visit; a pair of another prompt than all of these may have any."""
        allowed = self.allowed.get(pair_id, range(len(self.members)))
        return allowed[int(uniform(seed, "context_of_visit", pair_id, visit) * len(allowed))]


def _groups(prompts: Sequence[str], own: Sequence[Pair], num_examples: int, count: int) -> list[set[str]]:
    """Prompts dealt into `count` groups, or into one group per prompt where larger ones leave fewer than `num_examples` pairs."""
    groups = [set(prompts[start::count]) for start in range(count)]
    if all(sum(pair.prompt not in group for pair in own) >= num_examples for group in groups):
        return groups
    return [{prompt} for prompt in prompts]
