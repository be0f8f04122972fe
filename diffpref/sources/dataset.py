"""Preference batches from stored pairs: decoded and encoded at each visit, or encoded once and kept in memory.

Both give the same numbers, bit for bit on a CPU: pictures and prompts go through their encoders in parts of one size, because
the rounding of a kernel depends on the size of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffpref.core.random import PairRandom, moved
from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.data.buckets import Shape
from diffpref.data.cache import LatentStore
from diffpref.data.loader import PairPixels, batches
from diffpref.data.sampler import Item

MicroBatches = Callable[[], Iterable[list[Item]]]


@dataclass(frozen=True)
class Encoder:
    """The model's encoders as functions, and how prompts are dropped."""

    encode_moments: Callable[[Tensor], Tensor]  # pixels (N, 3, H, W) -> mean and sd of the latents (N, 2, C, h, w)
    encode_prompts: Callable[[Sequence[str]], Conditioning]  # N prompts -> (N, 1, ...)
    null_prompt: Conditioning  # (1, 1, ...)
    uses_time_ids: bool
    device: torch.device
    seed: int
    proportion_empty_prompts: float = 0.0
    prompt_cache: dict[str, Conditioning] | None = None  # filled with every prompt that passes, on the CPU, if given
    store: LatentStore | None = None  # where the latents of the pairs lie, if they were encoded before
    stored_prompt: Callable[[str], Conditioning] | None = None  # gives prompts that were encoded before, in place of encode_prompts
    pictures_at_once: int = 8  # given to encode_moments
    prompts_at_once: int = 8  # given to encode_prompts

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to mean and standard deviation of the latents (N, 2, C, h, w), where the autoencoder is.

        The last part is filled up with its last picture, so that a picture's numbers do not depend on N.
        """
        parts = []
        for part in pixels.split(self.pictures_at_once):
            missing = self.pictures_at_once - len(part)
            full = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            parts.append(self.encode_moments(full)[: len(part)])
        return torch.cat(parts)

    def prompt_rows(self, prompts: Sequence[str]) -> list[Conditioning]:
        """N prompts to N pieces (1, 1, ...); as with pictures, their numbers do not depend on N."""
        rows: list[Conditioning] = []
        for start in range(0, len(prompts), self.prompts_at_once):
            part = list(prompts[start : start + self.prompts_at_once])
            filled = part + part[-1:] * (self.prompts_at_once - len(part))
            rows += split(self.encode_prompts(filled))[: len(part)]
        return rows

    @cached_property
    def null_row(self) -> Conditioning:
        """The null prompt where the other rows lie: on the CPU with prompts that are kept or stored."""
        return self.null_prompt if self.prompt_cache is None and self.stored_prompt is None else self.null_prompt.map(_kept)


@dataclass(frozen=True)
class Encoded:
    """G groups after the autoencoder, on the CPU but for latents that come right from it."""

    moments: Tensor  # (G, U, 2, C, h, w): best picture first; mean and standard deviation
    time_ids: Tensor  # (G, U, 6)
    relevance: Tensor  # (G, K)
    pair_ids: list[str]
    prompts: list[tuple[str, ...]]  # (G,) of K
    visits: list[int]
    slots: tuple[int, ...] = (0, 1)  # (K,) which of the U pictures a slot shows
    scores: dict[str, Tensor] = field(default_factory=dict)  # by scorer (G, K), best picture first
    weight: Tensor | None = None  # (G,)


def weight_of(pixels: PairPixels, index: Sequence[int]) -> Tensor | None:
    """What multiplies the loss of groups, (G,)."""
    return None if pixels.weights is None else torch.from_numpy(pixels.weights[list(index)])


def scores_of(pixels: PairPixels, index: Sequence[int]) -> dict[str, Tensor]:
    """The stored scores of groups, float32 (G, K) by scorer, best picture first."""
    return {name: torch.from_numpy(x).float() for name, x in pixels.scores(index).items()}


def check_finite(moments: Tensor, pair_ids: Sequence[str]) -> None:
    """Raises ValueError for latents that are not finite, before they are kept; moments (N, ...) of the pairs of these names."""
    bad = [name for name, x in zip(pair_ids, moments, strict=True) if not x.isfinite().all()]
    if bad:
        raise ValueError(
            f"the latents of {len(bad)} of {len(moments)} pictures are not finite, the first is of pair {bad[0]}: the autoencoder "
            "overflows, or the type that the cache keeps them in does; use a cache in float32, or another pretrained_vae_model_name_or_path"
        )


def assemble(encoded: Encoded, encoder: Encoder) -> PreferenceBatch:
    """Sample latents from their moments, drop prompts and encode the rest; every draw belongs to (seed, pair, visit).

    A picture that serves several slots is the same latent in all of them; a group loses all its prompts or none.
    """
    draws = PairRandom(encoder.seed, tuple(encoded.pair_ids), tuple(encoded.visits))
    mean, sd = encoded.moments.unbind(2)
    sampled = mean + sd * moved(draws.normal("posterior", mean.shape[1:]), mean.device)
    latents = torch.stack([sampled[:, slot] for slot in encoded.slots], 1)
    empty = (draws.uniform("empty_prompt") < encoder.proportion_empty_prompts).tolist()
    groups, images = encoded.relevance.shape
    if all(len(set(prompts)) == 1 for prompts in encoded.prompts):
        shared = _conditioning([prompts[0] for prompts in encoded.prompts], empty, encoder)
        cond = shared.map(lambda x: x.expand(-1, images, *x.shape[2:]))
    else:
        flat = [prompt for prompts in encoded.prompts for prompt in prompts]
        own = _conditioning(flat, [dropped for dropped in empty for _ in range(images)], encoder)
        cond = own.map(lambda x: x.reshape(groups, images, *x.shape[2:]))
    if encoder.uses_time_ids:
        cond = replace(cond, time_ids=moved(encoded.time_ids[:, encoded.slots], encoder.device))
    return PreferenceBatch(
        moved(latents, encoder.device),
        cond,
        moved(encoded.relevance, encoder.device),
        tuple(encoded.pair_ids),
        tuple(encoded.visits),
        {name: moved(x, encoder.device) for name, x in encoded.scores.items()},
        None if encoded.weight is None else moved(encoded.weight, encoder.device),
    )


def _conditioning(prompts: Sequence[str], empty: Sequence[bool], encoder: Encoder) -> Conditioning:
    """Text conditioning (N, 1, ...) of N prompts on the encoder's device, with the null prompt where `empty`."""
    if encoder.stored_prompt is not None:
        rows = [encoder.null_row if dropped else encoder.stored_prompt(p) for p, dropped in zip(prompts, empty, strict=True)]
    elif encoder.prompt_cache is None:
        different = list(dict.fromkeys(prompts))
        known = dict(zip(different, encoder.prompt_rows(different), strict=True))
        rows = [known[prompt] for prompt in prompts]
    else:
        new = list(dict.fromkeys(p for p in prompts if p not in encoder.prompt_cache))
        encoder.prompt_cache.update(zip(new, (row.map(_kept) for row in encoder.prompt_rows(new)), strict=True))
        rows = [encoder.prompt_cache[p] for p in prompts]
    joined = join([encoder.null_row if dropped else row for row, dropped in zip(rows, empty, strict=True)])
    return joined.map(lambda x: moved(x, encoder.device))


def _kept(x: Tensor) -> Tensor:
    """A copy on the CPU that keeps no larger tensor alive."""
    return torch.empty_like(x, device="cpu").copy_(x)


def split(cond: Conditioning) -> list[Conditioning]:
    """(N, ...) to N pieces (1, ...)."""

    def row(i: int) -> Conditioning:
        return cond.map(lambda x: x[i : i + 1])

    (size,) = {len(x) for f in fields(cond) if (x := getattr(cond, f.name)) is not None}
    return [row(i) for i in range(size)]


def join(rows: Sequence[Conditioning]) -> Conditioning:
    """Concatenate every field along the first axis; a field is in all rows or in none."""
    joined: dict[str, Any] = {}
    for entry in fields(rows[0]):
        parts = [getattr(row, entry.name) for row in rows]
        present = [part for part in parts if part is not None]
        assert len(present) in (0, len(parts)), f"{entry.name} is in {len(present)} of {len(parts)} rows"
        joined[entry.name] = torch.cat(present) if present else None
    return replace(rows[0], **joined)


def from_disk(pixels: PairPixels, micro_batches: MicroBatches, encoder: Encoder, num_workers: int = 0) -> Iterator[PreferenceBatch]:
    """Decode and encode every pair at every visit."""
    for batch in batches(pixels, micro_batches, num_workers):
        moments = encoder.moments(batch["pixels"].flatten(0, 1)).unflatten(0, batch["pixels"].shape[:2])
        yield assemble(
            Encoded(
                moments,
                batch["time_ids"],
                batch["relevance"],
                batch["pair_id"],
                batch["prompts"],
                batch["visit"].tolist(),
                pixels.slots,
                scores_of(pixels, batch["index"].tolist()),
                weight_of(pixels, batch["index"].tolist()),
            ),
            encoder,
        )


@dataclass
class LatentCache:
    """Moments of all N groups in memory, mirrored ones beside them when images are mirrored at random."""

    pixels: PairPixels
    relevance: Tensor  # (N, K)
    time_ids: Tensor  # (N, F, U, 6), F = 2 with mirroring, else 1
    moments: dict[Shape, Tensor]  # pixel shape -> (n, F, U, 2, C, h, w) of the n groups of that shape
    place: Tensor  # (N,) int64, position of a group among those of its shape

    @classmethod
    def build(cls, pixels: PairPixels, encoder: Encoder, batch_size: int = 16) -> LatentCache:
        """Decode and encode every group once (twice with mirroring)."""
        size, views = len(pixels), (0.0, 1.0) if pixels.flip_probability else (0.0,)
        relevance, time_ids = torch.empty(size, len(pixels.slots)), torch.empty(size, len(views), pixels.num_pictures, 6)
        cache = cls(pixels, relevance, time_ids, {}, torch.empty(size, dtype=torch.int64))
        chunks, filled = pixels.chunks(range(size), batch_size), dict.fromkeys(map(pixels.shape, range(size)), 0)
        for chunk in chunks:
            shape = pixels.shape(chunk[0][0])
            cache.place[[i for i, _ in chunk]] = torch.arange(filled[shape], filled[shape] + len(chunk))
            filled[shape] += len(chunk)
        for view, mirrored in enumerate(views):
            for batch in batches(replace(pixels, flip_probability=mirrored), lambda: chunks):
                index = batch["index"]
                moments = encoder.moments(batch["pixels"].flatten(0, 1)).cpu().unflatten(0, batch["pixels"].shape[:2])
                check_finite(moments, batch["pair_id"])
                shape = pixels.shape(int(index[0]))
                if shape not in cache.moments:  # made at once: joining parts at the end would need twice the memory
                    cache.moments[shape] = torch.empty(filled[shape], len(views), *moments.shape[1:])
                cache.moments[shape][cache.place[index], view] = moments
                cache.time_ids[index, view] = batch["time_ids"]
                cache.relevance[index] = batch["relevance"]
        return cache

    def batches(self, micro_batches: MicroBatches, encoder: Encoder) -> Iterator[PreferenceBatch]:
        """The same batches as `from_disk`, without decoding."""
        pixels, image = self.pixels, torch.arange(self.pixels.num_pictures)
        for items in micro_batches():
            index = torch.tensor([i for i, _ in items])
            (shape,) = {pixels.shape(i) for i, _ in items}  # a micro-batch lies in one bucket
            views = torch.tensor([pixels.draws(i, visit)[1] for i, visit in items]).long()  # (G, U)
            moments = self.moments[shape][self.place[index, None], views, image]
            names = [pixels.group_id(i) for i, _ in items]
            prompts, visits = [pixels.prompts(i) for i, _ in items], [visit for _, visit in items]
            time_ids, scores = self.time_ids[index[:, None], views, image], scores_of(pixels, index.tolist())
            facts = (self.relevance[index], names, prompts, visits, pixels.slots, scores, weight_of(pixels, index.tolist()))
            yield assemble(Encoded(moments, time_ids, *facts), encoder)
