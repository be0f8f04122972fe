"""Pairs to pixel batches. Flip and crop are keyed draws, so neither workers nor ranks change what a pair looks like."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from diffpref.core.random import uniform
from diffpref.data.buckets import Buckets, Shape
from diffpref.data.images import DEFAULT_LIMITS, ImageError, ImageLimits, decode_image, prepare_pair
from diffpref.data.pairs import PairDataset
from diffpref.data.sampler import Item
from diffpref.data.schema import PairRow

Sample = dict[str, Any]
Batch = dict[str, Any]

_TENSORS = ("pixels", "time_ids")
_NUMBERS = {"index": torch.int64, "visit": torch.int64, "chosen_first": torch.bool, "label": torch.float32}


@dataclass(frozen=True, eq=False)
class PairPixels(Dataset[Sample]):
    """Maps (index, visit) to one prepared pair, the chosen image first."""

    pairs: PairDataset
    resolution: int
    """Side of the square images in pixels, and of the square bucket."""
    seed: int = 0
    flip_probability: float = 0.0
    """Probability that an image is mirrored, drawn anew at each visit."""
    random_crop: bool = False
    """Cut the window at a random place, shared by the pair, instead of the centre."""
    limits: ImageLimits = DEFAULT_LIMITS
    flip_mode: Literal["shared", "independent"] = "shared"
    """Mirror both images of a pair together, or each by a draw of its own."""
    buckets: Buckets | None = None
    """Shape of each pair; all are square without."""

    def __post_init__(self) -> None:
        assert self.buckets is None or len(self.buckets.of_pair) == len(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: Item) -> Sample:
        """One pair: pixels (2, 3, H, W) float32 in [-1, 1] in the pair's shape, time_ids (2, 6), and

        index, visit, pair_id, prompt, user_id (None if unknown), label = probability in [0.5, 1] that the first image is the
        better one, chosen_first = True if the source had it first too.

        Raises:
            ValueError: an image cannot be decoded; the message names the pair.
        """
        index, visit = item
        row = self.pairs.row(index)
        crop, flips = self.draws(index, visit)
        chosen_first = row.p0 >= 0.5
        images = [self._decode(row, "jpg_0", row.image_0), self._decode(row, "jpg_1", row.image_1)]
        chosen, rejected = images if chosen_first else images[::-1]
        pixels, time_ids = prepare_pair(chosen, rejected, self.shape(index), crop, flips)
        return {
            "index": index,
            "visit": visit,
            "pair_id": row.pair_id,
            "prompt": row.prompt,
            "user_id": row.user_id,
            "pixels": pixels,
            "time_ids": time_ids,
            "chosen_first": chosen_first,
            "label": max(row.p0, 1 - row.p0),
        }

    def shape(self, index: int) -> Shape:
        """Height and width to which pair `index` is brought."""
        if self.buckets is None:
            return self.resolution, self.resolution
        return self.buckets.shapes[self.buckets.of_pair[index]]

    def draws(self, index: int, visit: int) -> tuple[tuple[float, float] | None, tuple[bool, bool]]:
        """(crop, flips of the chosen and of the rejected image) of pair `index` at one visit."""
        pair_id = self.pairs.pair_ids[index]
        if self.flip_mode == "shared":
            flip = uniform(self.seed, "flip", pair_id, visit) < self.flip_probability
            flips = (flip, flip)
        else:  # by position in the source, so that a label does not decide what an image looks like
            first, second = (uniform(self.seed, "flip", pair_id, visit, image) < self.flip_probability for image in (0, 1))
            flips = (first, second) if self.pairs.p0[index] >= 0.5 else (second, first)
        if not self.random_crop:
            return None, flips
        return (uniform(self.seed, "crop_top", pair_id, visit), uniform(self.seed, "crop_left", pair_id, visit)), flips

    def chunks(self, indices: Iterable[int], batch_size: int) -> list[list[Item]]:
        """The pairs at `indices`, each at visit 0, in lists of at most `batch_size` of one shape; in their order without buckets."""
        by_shape: dict[Shape, list[int]] = {}
        for index in indices:
            by_shape.setdefault(self.shape(index), []).append(index)
        parts = [part[i : i + batch_size] for part in by_shape.values() for i in range(0, len(part), batch_size)]
        return [[(index, 0) for index in part] for part in parts]

    def _decode(self, row: PairRow, column: str, data: bytes) -> Image.Image:
        try:
            return decode_image(data, self.limits)
        except ImageError as error:
            raise ValueError(f"pair {row.pair_id}, {column}: {error}; set check_images to true to have such rows set aside") from error


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack B samples of one shape: pixels (B, 2, 3, H, W), time_ids (B, 2, 6); numbers as tensors (B,); the rest as lists."""
    batch: Batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name in _TENSORS:
        batch[name] = torch.stack(batch[name])
    for name, dtype in _NUMBERS.items():
        batch[name] = torch.tensor(batch[name], dtype=dtype)
    return batch


class _MicroBatches(Sampler[list[Item]]):
    """Adapts a function that yields micro-batches to what DataLoader calls a batch sampler."""

    def __init__(self, sampler_fn: Callable[[], Iterable[list[Item]]]) -> None:
        self._sampler_fn = sampler_fn

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self._sampler_fn())


def batches(
    pixels: PairPixels, sampler_fn: Callable[[], Iterable[list[Item]]], num_workers: int = 0, timeout_s: float = 300.0
) -> Generator[Batch, None, None]:
    """Collated micro-batches in the order of `sampler_fn`, which may be endless; closing the generator ends its workers.

    `sampler_fn` returns lists of (index, visit), for example `lambda: sampler.micro_batches(rank, ...)`. The batches do not
    depend on `num_workers`. A worker that gives nothing for `timeout_s` seconds ends the run with RuntimeError.

    Raises:
        ValueError: `num_workers` is negative, or an image cannot be decoded.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}, accepted: 0 (load in this process) or more")
    loader = DataLoader(
        pixels,
        batch_sampler=_MicroBatches(sampler_fn),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        timeout=timeout_s if num_workers > 0 else 0,
        # DataLoader draws a seed for its workers; without its own generator it would advance the global one.
        generator=torch.Generator(),
    )
    stream = iter(loader)
    try:
        yield from stream
    finally:
        # Workers otherwise live until the iterator is collected, which a kept traceback delays; later forks would inherit it.
        if num_workers > 0:
            stream._shutdown_workers()  # type: ignore[attr-defined]
