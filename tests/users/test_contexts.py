"""No pair is trained with a context that has it or its prompt, and no user without enough pairs is trained on."""

from __future__ import annotations

import pytest

from diffpref.users.examples import Contexts, Pair, decided_by


def pairs(user: str, number: int, per_prompt: int = 1) -> list[Pair]:
    """Pairs of one user, `per_prompt` of each prompt."""
    return [Pair(f"{user}-{i}", f"prompt {i // per_prompt}", user) for i in range(number)]


@pytest.mark.parametrize(("number", "per_prompt", "count"), [(5, 1, 8), (30, 1, 16), (30, 3, 16), (200, 2, 4), (6, 2, 1)])
def test_a_pair_is_never_in_its_own_context(number: int, per_prompt: int, count: int) -> None:
    own = pairs("anna", number, per_prompt)
    kept, _ = decided_by(own, 4)
    contexts = Contexts.draw(kept["anna"], 4, count, seed=3)
    assert len(contexts.members) >= count
    used = set()
    for pair in own:
        for visit in range(12):
            at = contexts.of_visit(pair.pair_id, visit, seed=3)
            context = contexts.members[at]
            assert len({other.pair_id for other in context}) == 4
            assert pair.pair_id not in {other.pair_id for other in context}
            assert pair.prompt not in {other.prompt for other in context}
            used.add(at)
    assert len(used) > 1


def test_draws_are_keyed() -> None:
    own = pairs("anna", 30)
    assert Contexts.draw(own, 4, 8, 0) == Contexts.draw(own, 4, 8, 0)
    assert Contexts.draw(own, 4, 8, 0).members != Contexts.draw(own, 4, 8, 1).members
    several = Contexts.draw(own, 4, 64, 0)
    assert any([p.pair_id for p in c] != sorted(p.pair_id for p in c) for c in several.members)  # order says nothing
    visits = {several.of_visit("anna-0", visit, 0) for visit in range(40)}
    assert len(visits) > 5


def test_users_with_too_few_pairs_are_left_out_and_counted() -> None:
    # ben has five pairs, but two of one prompt: for these, three others are left
    known = [*pairs("anna", 5), *pairs("ben", 4), Pair("ben-x", "prompt 0", "ben"), *pairs("carl", 4)]
    kept, dropped = decided_by(known, 4)
    assert list(kept) == ["anna"]
    assert dropped == {"ben": 5, "carl": 4}
