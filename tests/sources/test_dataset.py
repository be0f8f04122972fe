"""Stored pairs become the same batches whether decoded at each visit, by workers, or kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffpref.core.random import uniform
from diffpref.core.types import PreferenceBatch
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import load_pairs
from diffpref.models.backbone import Backbone, load_backbone
from diffpref.sources.dataset import Encoder, LatentCache, from_disk, join, split

ITEMS = [[(3, 0), (0, 0), (7, 0)], [(1, 0), (3, 1)], [(3, 2), (0, 1), (5, 9)]]


@pytest.fixture(scope="module")
def pixels(pairs_file: Path, table_cache: Path) -> PairPixels:
    """Eight pairs, mirrored half of the time."""
    return PairPixels(load_pairs(pairs_file, max_samples=8, cache_dir=table_cache), 32, seed=4, flip_probability=0.5)


@pytest.fixture(scope="module")
def backbones(sd_folder: Path, sdxl_folder: Path) -> dict[str, Backbone]:
    return {"sd": load_backbone(str(sd_folder)), "sdxl": load_backbone(str(sdxl_folder))}


@pytest.fixture(scope="module")
def make_encoder(backbones: dict[str, Backbone]) -> Callable[..., Encoder]:
    """make_encoder(family, **options)"""

    def make(family: str, **options: object) -> Encoder:
        b = backbones[family]
        plain = Encoder(b.encode_moments, b.encode_prompts, b.null_prompt(), b.uses_time_ids, torch.device("cpu"), seed=4)
        return replace(plain, **options)  # type: ignore[arg-type]

    return make


def tensors(batch: PreferenceBatch) -> dict[str, Tensor]:
    """Everything the model sees."""
    found = {"latents": batch.latents, "relevance": batch.relevance, "prompt": batch.cond.prompt_embeds}
    extra = {"pooled": batch.cond.pooled_prompt_embeds, "times": batch.cond.time_ids}
    return found | {name: x for name, x in extra.items() if x is not None}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_batches_are_laid_out_as_promised(family: str, pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    made = list(from_disk(pixels, lambda: ITEMS, make_encoder(family)))
    first = made[0]
    assert [len(b.pair_ids) for b in made] == [3, 2, 3]
    assert first.latents.shape == (3, 2, 4, 8, 8)
    assert first.pair_ids == tuple(pixels.pairs.pair_ids[i] for i, _ in ITEMS[0])
    assert made[2].visits == (2, 1, 9)
    assert torch.equal(first.relevance, torch.tensor([[1.0, 0.0]] * 3))
    assert torch.equal(first.cond.prompt_embeds[:, 0], first.cond.prompt_embeds[:, 1])
    if family == "sdxl":
        assert first.cond.time_ids is not None
        assert first.cond.time_ids.shape == (3, 2, 6)
        assert first.cond.pooled_prompt_embeds is not None
        assert first.cond.pooled_prompt_embeds.shape == (3, 2, 16)
    else:
        assert first.cond.time_ids is None


def test_the_chosen_image_comes_first(pixels: PairPixels, make_encoder: Callable[..., Encoder], backbones: dict[str, Backbone]) -> None:
    (batch,) = from_disk(replace(pixels, flip_probability=0.0), lambda: [[(0, 0), (1, 0)]], make_encoder("sd"))
    for g in range(2):
        moments = backbones["sd"].encode_moments(replace(pixels, flip_probability=0.0)[g, 0]["pixels"])
        assert pixels.pairs.p0[g] == g  # pair 0 prefers image 1, pair 1 image 0
        score = (batch.latents[g] - moments[:, 0]) / moments[:, 1]
        assert score.abs().max() < 6


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kept_latents_give_the_same_batches(family: str, pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    dropping = {"proportion_empty_prompts": 0.3}
    fresh = list(from_disk(pixels, lambda: ITEMS, make_encoder(family, **dropping)))
    encoder = make_encoder(family, prompt_cache={}, **dropping)
    cache = LatentCache.build(pixels, encoder, batch_size=3)
    kept = list(cache.batches(lambda: ITEMS, encoder))
    assert cache.moments.shape == (8, 2, 2, 2, 4, 8, 8)
    assert {pixels.draws(pixels.pairs.pair_ids[i], v)[1] for items in ITEMS for i, v in items} == {False, True}
    for a, b in zip(kept, fresh, strict=True):
        assert (a.pair_ids, a.visits) == (b.pair_ids, b.visits)
        for name, x in tensors(a).items():
            torch.testing.assert_close(x, tensors(b)[name], rtol=1e-5, atol=1e-5)


def test_without_mirroring_one_view_is_kept(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    plain, encoder = replace(pixels, flip_probability=0.0), make_encoder("sd")
    cache = LatentCache.build(plain, encoder)
    assert cache.moments.shape[1] == 1
    for a, b in zip(cache.batches(lambda: ITEMS, encoder), from_disk(plain, lambda: ITEMS, encoder), strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-5, atol=1e-5)


def test_latents_are_drawn_anew_at_each_visit_and_not_by_neighbours(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    plain, encoder = replace(pixels, flip_probability=0.0), make_encoder("sd")
    first, again, alone = from_disk(plain, lambda: [[(3, 0), (0, 0)], [(0, 1), (3, 1)], [(3, 0)]], encoder)
    torch.testing.assert_close(alone.latents[0], first.latents[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again.latents[1], first.latents[0], atol=1e-4)
    noise = [(b.latents[i] - encoder.encode_moments(plain[3, 0]["pixels"])[:, 0]).flatten() for b, i in ((first, 0), (again, 1))]
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 0.2


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_prompts_are_dropped_per_pair_by_key(family: str, pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder(family, proportion_empty_prompts=0.5)
    items = [(i, visit) for visit in range(2) for i in range(8)]
    (batch,) = from_disk(pixels, lambda: [items], encoder)
    (turned,) = from_disk(pixels, lambda: [items[::-1]], encoder)
    null = encoder.null_prompt.prompt_embeds[0, 0]
    dropped = [bool((x == null).all()) for x in batch.cond.prompt_embeds[:, 0]]
    expected = [uniform(4, "empty_prompt", pixels.pairs.pair_ids[i], visit, 0) < 0.5 for i, visit in items]
    assert dropped == expected
    assert dropped[:8] != dropped[8:]
    assert torch.equal(batch.cond.prompt_embeds[:, 0], batch.cond.prompt_embeds[:, 1])
    torch.testing.assert_close(turned.cond.prompt_embeds.flip(0), batch.cond.prompt_embeds, rtol=1e-5, atol=1e-5)
    kept = [i for i, d in enumerate(dropped) if not d]
    prompts = [pixels.pairs.prompts[items[i][0]] for i in kept]
    torch.testing.assert_close(batch.cond.prompt_embeds[kept, 0], encoder.encode_prompts(prompts).prompt_embeds[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_prompts_can_be_dropped(share: float, pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder("sd", proportion_empty_prompts=share)
    (batch,) = from_disk(pixels, lambda: [[(i, 0) for i in range(8)]], encoder)
    same = [bool((x == encoder.null_prompt.prompt_embeds[0, 0]).all()) for x in batch.cond.prompt_embeds[:, 0]]
    assert same == [bool(share)] * 8


def test_workers_change_nothing(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder("sdxl", proportion_empty_prompts=0.3)
    for a, b in zip(from_disk(pixels, lambda: ITEMS, encoder), from_disk(pixels, lambda: ITEMS, encoder, num_workers=2), strict=True):
        assert (a.pair_ids, a.visits) == (b.pair_ids, b.visits)
        for name, x in tensors(a).items():
            assert torch.equal(x, tensors(b)[name]), name


def test_split_and_join_are_inverse(make_encoder: Callable[..., Encoder]) -> None:
    cond = make_encoder("sdxl").encode_prompts(["a", "b", "c"])
    again = join(split(cond))
    assert torch.equal(again.prompt_embeds, cond.prompt_embeds)
    assert again.pooled_prompt_embeds is not None
    assert cond.pooled_prompt_embeds is not None
    assert torch.equal(again.pooled_prompt_embeds, cond.pooled_prompt_embeds)
