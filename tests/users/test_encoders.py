"""Embeddings of users: the light encoder learns tastes from features, the VLM reads what it is told, files hold what was made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffpref.scorers.vlm_judge import load_vlm_judge
from diffpref.users.examples import Example, Pair
from diffpref.users.features import FeatureEncoder
from diffpref.users.fit import fit_encoder
from diffpref.users.projectors import PROJECTORS, ExampleEncoder, new_projector
from diffpref.users.stored import load_embeds, save_embeds
from diffpref.users.vlm import VlmEncoder
from tests.scorers.test_vlm_judge import folder as vlm_folder  # noqa: F401  # a saved LLaVA of a few thousand parameters

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
SIZES = {
    "tokens": {"d": 6, "width": 5},
    "table": {"num_users": 3, "num_tokens": 2, "width": 5},
    "axes": {"num_axes": 3, "width": 5},
    "examples": {"picture": 3, "prompt": 2, "width": 5},
}
EMBEDS = {"tokens": (2, 4, 6), "table": (2, 1, 1), "axes": (2, 1, 3), "examples": (2, 4, 8)}


@pytest.mark.parametrize("kind", list(PROJECTORS))
def test_projectors(kind: str) -> None:
    embeds = torch.rand(EMBEDS[kind], generator=torch.Generator().manual_seed(0)) + 0.5
    first, again = (new_projector(kind, **SIZES[kind])(embeds) for _ in range(2))
    assert torch.equal(first, again)  # weights come from the seed
    assert first.shape[0] == 2
    assert first.shape[2] == 5
    assert first.abs().sum() > 0
    order = new_projector(kind, **SIZES[kind])(embeds.flip(1))
    found = order.flip(1) if kind == "tokens" else order
    torch.testing.assert_close(found, first)
    with pytest.raises(ValueError, match="projector is 'x'"):
        new_projector("x")


def made_users(number: int, seed: int, tastes: int = 3) -> tuple[dict[str, list[Pair]], dict[str, Tensor], dict[str, np.ndarray]]:
    """Users who judge features along a direction of their own among a few."""
    rng = np.random.default_rng(seed)
    users, features, directions = {}, {}, {}
    for u in range(number):
        direction = np.zeros(6)
        direction[rng.permutation(tastes)[:2]] = rng.choice([-1, 1], 2)
        name = f"user-{seed}-{u}"
        directions[name] = direction
        users[name] = [Pair(f"{name}-{i}", f"prompt {i}", name) for i in range(40)]
        for pair in users[name]:
            a, b = rng.normal(size=(2, 6))
            better, worse = (a, b) if direction @ a > direction @ b else (b, a)
            features[pair.pair_id] = torch.tensor(np.concatenate([better, worse, rng.normal(size=4)])).float()
    return users, features, directions


def test_the_light_encoder_learns_what_users_like() -> None:
    encoder = ExampleEncoder(6, 4, 5, dim=8, hidden=32)
    users, features, _ = made_users(60, 0)
    right = fit_encoder(encoder, users, features, 4, 150, seed=0, batch=64)
    new, theirs, _ = made_users(12, 1)  # users of other directions, who were never seen
    hits, turned = [], []
    with torch.no_grad():
        for own in new.values():
            table = torch.stack([theirs[pair.pair_id] for pair in own])
            vector = encoder.vector(table[None, :8])
            hits.append((encoder.evidence_of(table[8:])[0] @ vector[0] > 0).float().mean())
            other = torch.cat([table[:8, 6:12], table[:8, :6], table[:8, 12:]], 1)
            turned.append((encoder.vector(other[None]) + vector).abs().max())
    assert right > 0.75
    assert float(torch.stack(hits).mean()) > 0.75  # chance is 0.5
    assert float(torch.stack(turned).max()) < 1e-5  # preferring the other picture says the opposite


def test_labels_by_chance_teach_nothing() -> None:
    encoder = ExampleEncoder(6, 4, 5, dim=8, hidden=32)
    users, features, _ = made_users(24, 0)
    rng = np.random.default_rng(5)
    mixed = {i: torch.cat([x[6:12], x[:6], x[12:]]) if rng.random() < 0.5 else x for i, x in features.items()}
    fit_encoder(encoder, users, mixed, 4, 150, seed=0, batch=64)
    new, theirs, _ = made_users(12, 1)
    with torch.no_grad():
        tables = [torch.stack([theirs[pair.pair_id] for pair in own]) for own in new.values()]
        hits = [(encoder.evidence_of(t[8:])[0] @ encoder.vector(t[None, :8])[0] > 0).float().mean() for t in tables]
    assert abs(float(torch.stack(hits).mean()) - 0.5) < 0.2


def test_an_example_of_zeros_is_none() -> None:
    encoder = ExampleEncoder(3, 2, 5)
    torch.nn.init.normal_(encoder.attend.weight)
    examples = torch.rand(1, 3, 8)
    filled = torch.cat([examples, torch.zeros(1, 2, 8)], 1)
    torch.testing.assert_close(encoder.vector(filled), encoder.vector(examples))
    assert not encoder.vector(torch.zeros(1, 2, 8)).any()


def test_features_are_laid_out_and_kept() -> None:
    asked: list[int] = []

    def pictures(images: object) -> Tensor:
        asked.append(len(images))  # type: ignore[arg-type]
        return torch.stack([torch.tensor(np.asarray(i)[0, 0, [0, 2]] / 255.0) for i in images])  # type: ignore[attr-defined]

    encoder = FeatureEncoder(pictures, lambda texts: torch.tensor([[float(len(t))] for t in texts]), {"encoder": "x"})
    examples = [Example("ab", RED, BLUE, "one"), Example("abc", BLUE, RED)]
    wanted = torch.tensor([[1.0, 0, 0, 1, 2], [0, 1, 1, 0, 3]])
    torch.testing.assert_close(encoder.encode(examples), wanted)
    torch.testing.assert_close(encoder.encode(examples[::-1]), wanted.flip(0))
    assert asked == [4, 2]  # the pair with an id was known the second time


def test_the_vlm_is_told_which_picture_was_preferred(vlm_folder: Path) -> None:  # noqa: F811
    judge = load_vlm_judge(str(vlm_folder))
    encoder = VlmEncoder(judge.model, judge.processor, judge.version, judge.checksum, num_tokens=3)
    examples = [Example("red circle", RED, BLUE, f"pair-{i}") for i in range(6)]
    content, pictures = encoder.messages(examples)
    said = [part["text"] for part in content if "chose" in part.get("text", "")][1:]
    firsts = [np.asarray(p)[0, 0, 0] > 0 for p in pictures[::2]]  # whether the preferred, red one stands first
    assert [("first" in text) for text in said] == firsts
    assert len(set(firsts)) == 2  # either place occurs
    embeds = encoder.encode(examples[:4])
    assert embeds.shape == (3, 16)
    assert torch.equal(encoder.encode(examples[:4]), embeds)
    turned = [Example("red circle", BLUE, RED, f"pair-{i}") for i in range(4)]
    assert not torch.allclose(encoder.encode(turned), embeds)
    means = VlmEncoder(judge.model, judge.processor, judge.version, judge.checksum, num_tokens=2, layer=1, pooling="mean")
    assert means.encode(examples[:1]).shape == (2, 16)
    with pytest.raises(ValueError, match="vlm_layer is 9"):
        VlmEncoder(judge.model, judge.processor, judge.version, judge.checksum, layer=9)
    with pytest.raises(ValueError, match="stands for a picture"):
        encoder.encode([Example("a <image>", RED, BLUE)])


def test_stored_embeddings(tmp_path: Path) -> None:
    embeds = {"anna": torch.rand(2, 3, 4), "ben": torch.rand(2, 3, 4)}
    assert load_embeds(tmp_path) is None
    save_embeds(tmp_path, embeds, {"encoder": "clip", "seed": 0})
    found = load_embeds(tmp_path, {"encoder": "clip", "seed": 0})
    assert found is not None
    assert all(torch.equal(found[user], x) for user, x in embeds.items())
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        load_embeds(tmp_path, {"encoder": "clip", "seed": 1})
