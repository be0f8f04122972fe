"""Preference batches from latents and prompts that were encoded before, and how they are encoded: data/cache.py has the files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffpref.core.random import permutation
from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.data import cache
from diffpref.data.cache import ADD, Key, LatentStore
from diffpref.data.loader import PairPixels, batches
from diffpref.sources.dataset import Encoded, Encoder, MicroBatches, assemble, check_finite, join, scores_of, weight_of

SHARD_BYTES = 2**28
"""A file is written when it has this many; so much is lost when a build is killed, and held in memory."""
LOOKED_AT = 16
"""Pairs whose pictures are compared with the data when a folder is opened."""
GROUPS_AT_ONCE = 16

Advance = Callable[[int], object]  # told how many pictures or prompts were done


def contents(pixels: PairPixels, index: int) -> list[Key]:
    """Content keys (U,) of a group's pictures."""
    shape = pixels.shape(index)
    return [cache.content_key(data, shape) for data in pixels.group(index).images]


def picture_keys(pixels: PairPixels) -> list[Key]:
    """The names of all pictures (N * U,): a picture is called after its place in its pair, however pairs make groups."""
    ids = pixels.pairs.pair_ids
    return [cache.picture_key(ids[pair], image) for pair, image in pixels.cells().reshape(-1, 2).tolist()]


@dataclass(frozen=True)
class Owed:
    """A group with pictures that are not stored yet: which of its U they are, and what they are called."""

    index: int
    keys: Mapping[int, Key]


def owed(pixels: PairPixels, keys: Sequence[Sequence[Key]], known: set[Key]) -> list[Owed]:
    """The groups to be encoded, those of one shape together. Their keys are added to `known`."""
    found = []
    for index, of_group in enumerate(keys):
        new = {}
        for position, key in enumerate(of_group):
            if key not in known:
                new[position] = key
                known.add(key)
        if new:
            found.append(Owed(index, new))
    return sorted(found, key=lambda group: pixels.shape(group.index))


def store_latents(
    folder: Path, pixels: PairPixels, work: Sequence[Owed], encoder: Encoder, dtype: torch.dtype, num_workers: int, advance: Advance
) -> None:
    """Encode and write the pictures of `work`, mirrored ones too if `pixels` mirrors."""
    by_index = {group.index: group for group in work}
    chunks = pixels.chunks(by_index, GROUPS_AT_ONCE)
    views = [
        batches(replace(pixels, flip_probability=p), lambda: chunks, num_workers)
        for p in ((0.0, 1.0) if pixels.flip_probability else (0.0,))
    ]
    keys: list[Key] = []
    parts: list[tuple[Tensor, Tensor]] = []

    def write() -> None:
        if keys:
            moments, time_ids = (torch.cat(x) for x in zip(*parts, strict=True))
            cache.write_shard(folder, cache.LATENTS, keys, {"moments": moments, "time_ids": time_ids})
        keys.clear()
        parts.clear()

    for seen in zip(*views, strict=True):
        index = seen[0]["index"].tolist()
        new = {(g, u): key for g, i in enumerate(index) for u, key in by_index[i].keys.items()}
        rows = tuple(torch.tensor(list(new)).T)
        moments = torch.stack([encoder.moments(batch["pixels"][rows]).cpu() for batch in seen], 1).to(dtype)
        check_finite(moments, [seen[0]["pair_id"][g] for g, _ in new])
        if parts and (parts[0][0].shape[1:] != moments.shape[1:] or sum(x.nbytes for x, _ in parts) + moments.nbytes > SHARD_BYTES):
            write()
        parts.append((moments, torch.stack([batch["time_ids"][rows] for batch in seen], 1)))
        keys += new.values()
        advance(len(new))
    write()


def store_prompts(folder: Path, prompts: Sequence[str], encoder: Encoder, dtype: torch.dtype | None, advance: Advance) -> None:
    """Encode and write distinct prompts, in `dtype` or as they come."""
    row_bytes = sum(x.nbytes for x in cache.fields_of(encoder.null_prompt).values())
    size = max(1, SHARD_BYTES // row_bytes // encoder.prompts_at_once) * encoder.prompts_at_once
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        joined = join(encoder.prompt_rows(part)).map(lambda x: x[:, 0].to("cpu", dtype if x.is_floating_point() else None))
        cache.write_shard(folder, cache.PROMPTS, [cache.prompt_key(p) for p in part], cache.fields_of(joined))
        advance(len(part))


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """The latents of groups in an open folder."""

    store: LatentStore
    pixels: PairPixels
    places: np.ndarray  # (N, U, 2) int32: file and row

    @classmethod
    def of(cls, store: LatentStore, pixels: PairPixels) -> StoredLatents:
        """Find the pictures of all groups.

        Raises ValueError when pictures are missing, or are not those of the data; a few are compared with it.
        """
        size, where = len(pixels), f"latent_cache {str(store.folder)!r}"
        places = store.pictures.find(picture_keys(pixels)).reshape(size, -1, 2)
        missing = np.flatnonzero((places < 0).any((1, 2)))
        if len(missing):
            first = pixels.group_id(int(missing[0]))
            raise ValueError(f"{where} lacks {len(missing)} of {size} pairs, the first is {first}; {ADD}")
        for index in permutation(size, 0, "looked_at")[:LOOKED_AT].tolist():
            if [store.content(place) for place in places[index]] != contents(pixels, index):
                raise ValueError(
                    f"{where} has other pictures for pair {pixels.group_id(index)} than the data, or for another size; build it again in "
                    "a new folder"
                )
        return cls(store, pixels, places)

    def batches(self, micro_batches: MicroBatches, encoder: Encoder) -> Iterator[PreferenceBatch]:
        """The same batches as `from_disk`, without decoding and encoding."""
        pixels = self.pixels
        for items in micro_batches():
            index, visits = [i for i, _ in items], [visit for _, visit in items]
            places = self.places[index]  # (G, U, 2)
            views = [int(flip) for i, visit in items for flip in pixels.draws(i, visit)[1]]
            moments, time_ids = (x.unflatten(0, places.shape[:2]) for x in self.store.moments(places.reshape(-1, 2), views))
            names, prompts = [pixels.group_id(i) for i in index], [pixels.prompts(i) for i in index]
            facts = (pixels.relevance(index), names, prompts, visits, pixels.slots, scores_of(pixels, index), weight_of(pixels, index))
            yield assemble(Encoded(moments, time_ids, *facts), encoder)


def with_store(encoder: Encoder, store: LatentStore, takes_prompts: bool) -> Encoder:
    """An encoder of pairs whose latents lie in a folder, and whose prompts do too, in the types that the model gives."""
    like = cache.fields_of(encoder.null_prompt)

    def stored_prompt(prompt: str) -> Conditioning:
        found = store.prompt(prompt)
        return replace(found, **{name: x.to(like[name].dtype) for name, x in cache.fields_of(found).items()})

    return replace(encoder, store=store, stored_prompt=stored_prompt if takes_prompts else None)


def missing_prompts(prompts: Iterable[str], known: set[Key]) -> list[str]:
    """Distinct prompts that are not stored yet, in their order."""
    return [p for p in dict.fromkeys(prompts) if cache.prompt_key(p) not in known]
