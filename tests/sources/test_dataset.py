"""Stored pairs become the same batches whether decoded at each visit, by workers, or kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpref.core.random import uniform
from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.data.buckets import Buckets
from diffpref.data.loader import PairPixels
from diffpref.data.pairs import load_pairs
from diffpref.models.backbone import Backbone, load_backbone
from diffpref.sources.dataset import Encoder, LatentCache, from_disk, join, split

BUCKETS = Buckets(((48, 16), (32, 32), (24, 40)), np.array([1, 0, 2, 1, 0, 1, 2, 1]), 0, 0)
IN_BUCKETS = [[(3, 0), (0, 0), (7, 0)], [(2, 0), (6, 1)], [(4, 2), (1, 1)], [(2, 9)], [(5, 1), (3, 2)]]
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
@pytest.mark.parametrize("flips", ["none", "shared", "independent"])
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("pictures_at_once", [1, 2, 5, 8])
def test_kept_latents_give_the_same_batches(
    family: str, flips: str, shaped: bool, pictures_at_once: int, pixels: PairPixels, make_encoder: Callable[..., Encoder]
) -> None:
    pixels = replace(pixels, flip_probability=0.0) if flips == "none" else replace(pixels, flip_mode=flips)
    pixels, order = (replace(pixels, buckets=BUCKETS), IN_BUCKETS) if shaped else (pixels, ITEMS)
    settings = {"proportion_empty_prompts": 0.3, "pictures_at_once": pictures_at_once, "prompts_at_once": 3}
    fresh = list(from_disk(pixels, lambda: order, make_encoder(family, **settings)))
    encoder = make_encoder(family, prompt_cache={}, **settings)
    cache = LatentCache.build(pixels, encoder, batch_size=3)
    kept = list(cache.batches(lambda: order, encoder))
    seen = {pixels.draws(i, v)[1] for items in order for i, v in items}
    assert len(seen) >= {"none": 1, "shared": 2, "independent": 3}[flips]
    for a, b in zip(kept, fresh, strict=True):
        assert (a.pair_ids, a.visits) == (b.pair_ids, b.visits)
        for name, x in tensors(a).items():
            assert torch.equal(x, tensors(b)[name]), name
    if shaped:
        assert [tuple(b.latents.shape) for b in kept] == [
            (3, 2, 4, 8, 8),
            (2, 2, 4, 6, 10),
            (2, 2, 4, 12, 4),
            (1, 2, 4, 6, 10),
            (2, 2, 4, 8, 8),
        ]


def test_kept_latents_lie_by_shape(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder("sd")
    plain, shaped = LatentCache.build(pixels, encoder), LatentCache.build(replace(pixels, buckets=BUCKETS), encoder, batch_size=2)
    assert {shape: tuple(x.shape) for shape, x in plain.moments.items()} == {(32, 32): (8, 2, 2, 2, 4, 8, 8)}
    assert {shape: tuple(x.shape) for shape, x in shaped.moments.items()} == {
        (32, 32): (4, 2, 2, 2, 4, 8, 8),
        (48, 16): (2, 2, 2, 2, 4, 12, 4),
        (24, 40): (2, 2, 2, 2, 4, 6, 10),
    }


def test_a_mixed_micro_batch_is_no_batch(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    shaped, encoder = replace(pixels, buckets=BUCKETS), make_encoder("sd")
    for made in (
        from_disk(shaped, lambda: [[(0, 0), (1, 0)]], encoder),
        LatentCache.build(shaped, encoder).batches(lambda: [[(0, 0), (1, 0)]], encoder),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            next(made)


def test_without_mirroring_one_view_is_kept(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    plain, encoder = replace(pixels, flip_probability=0.0), make_encoder("sd")
    cache = LatentCache.build(plain, encoder)
    assert {x.shape[1] for x in cache.moments.values()} == {1}
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


def test_the_encoders_see_parts_of_one_size(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    plain, given = make_encoder("sd"), []

    def encode_moments(x: Tensor) -> Tensor:
        given.append(len(x))
        return plain.encode_moments(x)

    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        given.append(len(prompts))
        return plain.encode_prompts(prompts)

    watched = replace(plain, encode_moments=encode_moments, encode_prompts=encode_prompts, pictures_at_once=4, prompts_at_once=2)
    list(from_disk(pixels, lambda: ITEMS[:1], watched))
    assert given == [4, 4, 2, 2]
    given.clear()
    list(LatentCache.build(pixels, watched, batch_size=5).batches(lambda: ITEMS, replace(watched, prompt_cache={})))
    assert set(given[:-3]) == {4}
    assert set(given[-3:]) == {2}  # the eight pairs have four prompts


def test_what_is_encoded_does_not_depend_on_its_neighbours(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder("sdxl", pictures_at_once=3, prompts_at_once=3)
    images = torch.cat([pixels[i, 0]["pixels"] for i in range(4)])
    moments, prompts = encoder.moments(images), ["a", "a red circle", "b", "c"]
    for i in range(8):
        assert torch.equal(encoder.moments(images[i : i + 1])[0], moments[i])
    torch.testing.assert_close(moments, encoder.encode_moments(images), rtol=1e-5, atol=1e-5)
    for one, row in zip(prompts, encoder.prompt_rows(prompts), strict=True):
        assert torch.equal(encoder.prompt_rows([one])[0].prompt_embeds, row.prompt_embeds)


def test_the_prompt_cache_is_on_the_cpu_and_holds_no_larger_tensor(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    plain = make_encoder("sdxl")
    meta = replace(plain, prompt_cache={}, proportion_empty_prompts=0.5, prompts_at_once=4)
    list(from_disk(pixels, lambda: ITEMS, meta))
    assert meta.prompt_cache is not None
    assert sorted(meta.prompt_cache) == sorted({pixels.pairs.prompts[i] for items in ITEMS for i, _ in items})
    for row in (*meta.prompt_cache.values(), meta.null_row):
        for x in (row.prompt_embeds, row.pooled_prompt_embeds):
            assert x is not None
            assert x.device.type == "cpu"
            assert x.untyped_storage().nbytes() == x.numel() * 4


@pytest.mark.gpu
def test_on_a_gpu_the_prompt_cache_stays_on_the_cpu(pixels: PairPixels, sdxl_folder: Path) -> None:
    device = torch.device("cuda")
    backbone = load_backbone(str(sdxl_folder))
    backbone.pipeline.to(device)
    plain = Encoder(
        backbone.encode_moments, backbone.encode_prompts, backbone.null_prompt(), True, device, seed=4, proportion_empty_prompts=0.4
    )
    encoder = replace(plain, prompt_cache={})
    cache = LatentCache.build(pixels, encoder)
    for a, b in zip(cache.batches(lambda: ITEMS, encoder), from_disk(pixels, lambda: ITEMS, plain), strict=True):
        for name, x in tensors(a).items():
            assert x.device.type == "cuda"
            assert torch.equal(x, tensors(b)[name]), name
    assert encoder.prompt_cache is not None
    assert {row.prompt_embeds.device.type for row in encoder.prompt_cache.values()} == {"cpu"}


@dataclass(frozen=True)
class WithIds(Conditioning):
    """Conditioning with one more field, as a trained text encoder needs it."""

    input_ids: Tensor | None = None  # (G, K, L) int64


def test_further_fields_of_the_conditioning_pass_through(pixels: PairPixels, make_encoder: Callable[..., Encoder]) -> None:
    plain = make_encoder("sdxl")

    def with_ids(cond: Conditioning, ids: Sequence[int]) -> WithIds:
        return WithIds(cond.prompt_embeds, cond.pooled_prompt_embeds, input_ids=torch.tensor(ids)[:, None, None].expand(-1, 1, 7))

    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        return with_ids(plain.encode_prompts(prompts), [len(p) for p in prompts])

    encoder = replace(plain, encode_prompts=encode_prompts, null_prompt=with_ids(plain.null_prompt, [0]), proportion_empty_prompts=0.4)
    items, found = [(i, visit) for visit in range(2) for i in range(8)], []
    for cache in (None, {}):
        (batch,) = from_disk(pixels, lambda: [items], replace(encoder, prompt_cache=cache))
        assert isinstance(batch.cond, WithIds)
        assert batch.cond.input_ids is not None
        assert batch.cond.input_ids.shape == (16, 2, 7)
        assert batch.cond.input_ids.dtype == torch.int64
        assert batch.cond.time_ids is not None
        found.append(batch.cond.input_ids[:, 1, 3].tolist())
    dropped = [uniform(4, "empty_prompt", pixels.pairs.pair_ids[i], visit, 0) < 0.4 for i, visit in items]
    assert found[0] == found[1] == [0 if d else len(pixels.pairs.prompts[i]) for (i, _), d in zip(items, dropped, strict=True)]
    assert {0, len(pixels.pairs.prompts[0])} <= set(found[0])


def test_split_and_join_are_inverse(make_encoder: Callable[..., Encoder]) -> None:
    cond = make_encoder("sdxl").encode_prompts(["a", "b", "c"])
    again = join(split(cond))
    assert torch.equal(again.prompt_embeds, cond.prompt_embeds)
    assert again.pooled_prompt_embeds is not None
    assert cond.pooled_prompt_embeds is not None
    assert torch.equal(again.pooled_prompt_embeds, cond.pooled_prompt_embeds)
