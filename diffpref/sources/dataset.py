"""Preference batches from stored pairs: decoded and encoded at each visit, or encoded once and kept in memory.

Both give the same numbers, bit for bit on a CPU: pictures and prompts go through their encoders in parts of one size, because
the rounding of a kernel depends on the size of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.data.buckets import Shape
from diffpref.data.loader import PairPixels, batches
from diffpref.data.pairs import PairDataset
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
    pictures_at_once: int = 8  # given to encode_moments
    prompts_at_once: int = 8  # given to encode_prompts

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to mean and standard deviation of the latents (N, 2, C, h, w), on the CPU.

        The last part is filled up with its last picture, so that a picture's numbers do not depend on N.
        """
        parts = []
        for part in pixels.split(self.pictures_at_once):
            missing = self.pictures_at_once - len(part)
            full = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            parts.append(self.encode_moments(full)[: len(part)].cpu())
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
        """The null prompt where the other rows lie: on the CPU with a prompt cache."""
        return self.null_prompt if self.prompt_cache is None else self.null_prompt.map(_kept)


@dataclass(frozen=True)
class Encoded:
    """G groups after the autoencoder, on the CPU."""

    moments: Tensor  # (G, K, 2, C, h, w): best picture first; mean and standard deviation
    time_ids: Tensor  # (G, K, 6)
    labels: Tensor  # (G,) probability that the first image is the better one
    pair_ids: list[str]
    prompts: list[str]
    visits: list[int]
    scores: dict[str, Tensor] = field(default_factory=dict)  # by scorer (G, K), best picture first


def scores_of(pairs: PairDataset, index: Sequence[int]) -> dict[str, Tensor]:
    """The stored scores of pairs, float32 (G, 2) by scorer, chosen image first."""
    rows = np.asarray(index)
    order = np.where(pairs.p0[rows, None] >= 0.5, [[0, 1]], [[1, 0]])
    return {name: torch.from_numpy(np.take_along_axis(x[rows], order, 1)).float() for name, x in pairs.scores.items()}


def assemble(encoded: Encoded, encoder: Encoder) -> PreferenceBatch:
    """Sample latents from their moments, drop prompts and encode the rest; every draw belongs to (seed, pair, visit)."""
    draws = PairRandom(encoder.seed, tuple(encoded.pair_ids), tuple(encoded.visits))
    mean, sd = encoded.moments.unbind(2)
    latents = mean + sd * draws.normal("posterior", mean.shape[1:])
    empty = draws.uniform("empty_prompt") < encoder.proportion_empty_prompts
    images = mean.shape[1]
    cond = _conditioning(encoded.prompts, empty.tolist(), encoder).map(lambda x: x.expand(-1, images, *x.shape[2:]))
    if encoder.uses_time_ids:
        cond = replace(cond, time_ids=encoded.time_ids.to(encoder.device))
    relevance = torch.stack([encoded.labels, 1 - encoded.labels], 1)
    return PreferenceBatch(
        latents.to(encoder.device),
        cond,
        relevance.to(encoder.device),
        tuple(encoded.pair_ids),
        tuple(encoded.visits),
        {name: x.to(encoder.device) for name, x in encoded.scores.items()},
    )


def _conditioning(prompts: Sequence[str], empty: Sequence[bool], encoder: Encoder) -> Conditioning:
    """Text conditioning (G, 1, ...) on the encoder's device, with the null prompt where `empty`."""
    if encoder.prompt_cache is None:
        rows = encoder.prompt_rows(prompts)
    else:
        new = list(dict.fromkeys(p for p in prompts if p not in encoder.prompt_cache))
        encoder.prompt_cache.update(zip(new, (row.map(_kept) for row in encoder.prompt_rows(new)), strict=True))
        rows = [encoder.prompt_cache[p] for p in prompts]
    joined = join([encoder.null_row if dropped else row for row, dropped in zip(rows, empty, strict=True)])
    return joined.map(lambda x: _moved(x, encoder.device))


def _kept(x: Tensor) -> Tensor:
    """A copy on the CPU that keeps no larger tensor alive."""
    return torch.empty_like(x, device="cpu").copy_(x)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. To a GPU through pinned memory, which does not wait for it; only the batch is pinned, not all that is kept."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)


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
        moments = encoder.moments(batch["pixels"].flatten(0, 1)).unflatten(0, (-1, 2))
        yield assemble(
            Encoded(
                moments,
                batch["time_ids"],
                batch["label"],
                batch["pair_id"],
                batch["prompt"],
                batch["visit"].tolist(),
                scores_of(pixels.pairs, batch["index"].tolist()),
            ),
            encoder,
        )


@dataclass
class LatentCache:
    """Moments of all N pairs in memory, mirrored ones beside them when images are mirrored at random."""

    pixels: PairPixels
    labels: Tensor  # (N,)
    time_ids: Tensor  # (N, F, 2, 6), F = 2 with mirroring, else 1
    moments: dict[Shape, Tensor]  # pixel shape -> (n, F, 2, 2, C, h, w) of the n pairs of that shape
    place: Tensor  # (N,) int64, position of a pair among those of its shape

    @classmethod
    def build(cls, pixels: PairPixels, encoder: Encoder, batch_size: int = 16) -> LatentCache:
        """Decode and encode every pair once (twice with mirroring)."""
        size, views = len(pixels), (0.0, 1.0) if pixels.flip_probability else (0.0,)
        cache = cls(pixels, torch.empty(size), torch.empty(size, len(views), 2, 6), {}, torch.empty(size, dtype=torch.int64))
        chunks, filled = pixels.chunks(range(size), batch_size), dict.fromkeys(map(pixels.shape, range(size)), 0)
        for chunk in chunks:
            shape = pixels.shape(chunk[0][0])
            cache.place[[i for i, _ in chunk]] = torch.arange(filled[shape], filled[shape] + len(chunk))
            filled[shape] += len(chunk)
        for view, mirrored in enumerate(views):
            for batch in batches(replace(pixels, flip_probability=mirrored), lambda: chunks):
                index = batch["index"]
                moments = encoder.moments(batch["pixels"].flatten(0, 1)).unflatten(0, (-1, 2))
                shape = pixels.shape(int(index[0]))
                if shape not in cache.moments:  # made at once: joining parts at the end would need twice the memory
                    cache.moments[shape] = torch.empty(filled[shape], len(views), *moments.shape[1:])
                cache.moments[shape][cache.place[index], view] = moments
                cache.time_ids[index, view] = batch["time_ids"]
                cache.labels[index] = batch["label"]
        return cache

    def batches(self, micro_batches: MicroBatches, encoder: Encoder) -> Iterator[PreferenceBatch]:
        """The same batches as `from_disk`, without decoding."""
        pairs, image = self.pixels.pairs, torch.arange(2)
        for items in micro_batches():
            index = torch.tensor([i for i, _ in items])
            (shape,) = {self.pixels.shape(i) for i, _ in items}  # a micro-batch lies in one bucket
            views = torch.tensor([self.pixels.draws(i, visit)[1] for i, visit in items]).long()  # (G, 2)
            moments = self.moments[shape][self.place[index, None], views, image]
            names = [pairs.pair_ids[i] for i, _ in items]
            prompts, visits = [pairs.prompts[i] for i, _ in items], [visit for _, visit in items]
            time_ids, scores = self.time_ids[index[:, None], views, image], scores_of(pairs, index.tolist())
            yield assemble(Encoded(moments, time_ids, self.labels[index], names, prompts, visits, scores), encoder)
