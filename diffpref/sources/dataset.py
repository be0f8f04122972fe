"""Preference batches from stored pairs: decoded and encoded at each visit, or encoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, PreferenceBatch
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
    prompt_cache: dict[str, Conditioning] | None = None  # filled with every prompt that passes, if given


@dataclass(frozen=True)
class Encoded:
    """G pairs after the autoencoder, on the CPU."""

    moments: Tensor  # (G, 2, 2, C, h, w): chosen and rejected; mean and standard deviation
    time_ids: Tensor  # (G, 2, 6)
    labels: Tensor  # (G,) probability that the first image is the better one
    pair_ids: list[str]
    prompts: list[str]
    visits: list[int]


def assemble(encoded: Encoded, encoder: Encoder) -> PreferenceBatch:
    """Sample latents from their moments, drop prompts and encode the rest; every draw belongs to (seed, pair, visit)."""
    draws = PairRandom(encoder.seed, tuple(encoded.pair_ids), tuple(encoded.visits))
    mean, sd = encoded.moments.unbind(2)
    latents = mean + sd * draws.normal("posterior", mean.shape[1:])
    empty = draws.uniform("empty_prompt") < encoder.proportion_empty_prompts
    cond = _conditioning(encoded.prompts, empty.tolist(), encoder)
    time_ids = encoded.time_ids if encoder.uses_time_ids else None
    cond = cond.map(lambda x: x.to(encoder.device).expand(-1, 2, *x.shape[2:]))
    cond = Conditioning(cond.prompt_embeds, cond.pooled_prompt_embeds, None if time_ids is None else time_ids.to(encoder.device))
    relevance = torch.stack([encoded.labels, 1 - encoded.labels], 1)
    return PreferenceBatch(latents.to(encoder.device), cond, relevance.to(encoder.device), tuple(encoded.pair_ids), tuple(encoded.visits))


def _conditioning(prompts: Sequence[str], empty: Sequence[bool], encoder: Encoder) -> Conditioning:
    """Text conditioning (G, 1, ...) with the null prompt where `empty`."""
    if encoder.prompt_cache is None:
        rows = split(encoder.encode_prompts(prompts))
    else:
        new = list(dict.fromkeys(p for p in prompts if p not in encoder.prompt_cache))
        if new:
            encoder.prompt_cache.update(zip(new, split(encoder.encode_prompts(new)), strict=True))
        rows = [encoder.prompt_cache[p] for p in prompts]
    return join([encoder.null_prompt if dropped else row for row, dropped in zip(rows, empty, strict=True)])


def split(cond: Conditioning) -> list[Conditioning]:
    """(N, ...) to N pieces (1, ...)."""

    def row(i: int) -> Conditioning:
        return cond.map(lambda x: x[i : i + 1])

    return [row(i) for i in range(len(cond.prompt_embeds))]


def join(rows: Sequence[Conditioning]) -> Conditioning:
    """Concatenate along the first axis."""
    pooled = [r.pooled_prompt_embeds for r in rows if r.pooled_prompt_embeds is not None]
    return Conditioning(torch.cat([r.prompt_embeds for r in rows]), torch.cat(pooled) if pooled else None)


def from_disk(pixels: PairPixels, micro_batches: MicroBatches, encoder: Encoder, num_workers: int = 0) -> Iterator[PreferenceBatch]:
    """Decode and encode every pair at every visit."""
    for batch in batches(pixels, micro_batches, num_workers):
        moments = encoder.encode_moments(batch["pixels"].flatten(0, 1)).cpu().unflatten(0, (-1, 2))
        yield assemble(
            Encoded(moments, batch["time_ids"], batch["label"], batch["pair_id"], batch["prompt"], batch["visit"].tolist()), encoder
        )


@dataclass
class LatentCache:
    """Moments of all N pairs in memory, mirrored ones beside them when pairs are mirrored at random."""

    pixels: PairPixels
    prompts: list[str]
    labels: Tensor  # (N,)
    time_ids: Tensor  # (N, F, 2, 6), F = 2 with mirroring, else 1
    moments: Tensor  # (N, F, 2, 2, C, h, w)
    pair_ids: list[str]

    @classmethod
    def build(cls, pixels: PairPixels, encoder: Encoder, batch_size: int = 16) -> LatentCache:
        """Decode and encode every pair once (twice with mirroring)."""
        size = len(pixels)
        chunks = [[(i, 0) for i in range(start, min(start + batch_size, size))] for start in range(0, size, batch_size)]
        moments, times, labels = [], [], []
        for mirrored in (0.0, 1.0) if pixels.flip_probability else (0.0,):
            for batch in batches(replace(pixels, flip_probability=mirrored), lambda: chunks):
                moments.append(encoder.encode_moments(batch["pixels"].flatten(0, 1)).cpu().unflatten(0, (-1, 2)))
                times.append(batch["time_ids"])
                labels.append(batch["label"])
        pairs = pixels.pairs

        def views(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).unflatten(0, (-1, size)).transpose(0, 1)

        return cls(pixels, pairs.prompts, views(labels)[:, 0], views(times), views(moments), pairs.pair_ids)

    def batches(self, micro_batches: MicroBatches, encoder: Encoder) -> Iterator[PreferenceBatch]:
        """The same batches as `from_disk`, without decoding."""
        for items in micro_batches():
            index = torch.tensor([i for i, _ in items])
            pair_ids, visits = [self.pair_ids[i] for i, _ in items], [visit for _, visit in items]
            flips = torch.tensor([int(self.pixels.draws(p, v)[1]) for p, v in zip(pair_ids, visits, strict=True)])
            prompts = [self.prompts[i] for i, _ in items]
            encoded = Encoded(self.moments[index, flips], self.time_ids[index, flips], self.labels[index], pair_ids, prompts, visits)
            yield assemble(encoded, encoder)
