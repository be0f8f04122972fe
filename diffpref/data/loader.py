"""Pairs, or groups made of them, to pixel batches.

Flip and crop are keyed draws, so neither workers nor ranks change what a picture looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from diffpref.core.random import uniform
from diffpref.data.buckets import Buckets, Shape
from diffpref.data.groups import Group, Groups, pair_group
from diffpref.data.images import DEFAULT_LIMITS, ImageError, ImageLimits, decode_image, prepare_images
from diffpref.data.pairs import PairDataset
from diffpref.data.sampler import Item

Sample = dict[str, Any]
Batch = dict[str, Any]

_TENSORS = ("pixels", "time_ids", "relevance")
_NUMBERS = {"index": torch.int64, "visit": torch.int64, "chosen_first": torch.bool}


@dataclass(frozen=True, eq=False)
class PairPixels(Dataset[Sample]):
    """Maps (index, visit) to one prepared pair, the chosen image first, or to one of `groups`."""

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
    """Shape of each pair or group; all are square without."""
    groups: Groups | None = None
    """What is trained on; the pairs themselves without."""
    weights: np.ndarray | None = None
    """(N,) float32, what multiplies the loss of each group; all alike without."""

    def __post_init__(self) -> None:
        assert self.buckets is None or len(self.buckets.of_pair) == len(self)

    def __len__(self) -> int:
        return len(self.pairs if self.groups is None else self.groups)

    def __getitem__(self, item: Item) -> Sample:
        """One group: pixels (U, 3, H, W) float32 in [-1, 1] in the group's shape, time_ids (U, 6), relevance (K,) and

        index, visit, pair_id, prompts (K,), user_id (None if unknown), chosen_first = True if the source had this order too. For pairs
        U and K are 2, and relevance is the probability of either image to be the better one, the larger first.

        Raises:
            ValueError: an image cannot be decoded; the message names the pair.
        """
        index, visit = item
        group = self.group(index)
        crop, flips = self.draws(index, visit)
        images = [self._decode(group, column, data) for column, data in zip(group.columns, group.images, strict=True)]
        pixels, time_ids = prepare_images(images, self.shape(index), crop, flips)
        return {
            "index": index,
            "visit": visit,
            "pair_id": group.group_id,
            "prompts": group.prompts,
            "user_id": group.user_id,
            "pixels": pixels,
            "time_ids": time_ids,
            "chosen_first": group.is_in_order,
            "relevance": torch.tensor(group.relevance, dtype=torch.float32),
        }

    @property
    def slots(self) -> tuple[int, ...]:
        """(K,) which of the U pictures of a group each slot shows."""
        return (0, 1) if self.groups is None else self.groups.slots

    @property
    def num_pictures(self) -> int:
        """U, the different pictures of a group."""
        return max(self.slots) + 1

    def group(self, index: int) -> Group:
        """Group `index` with its encoded pictures."""
        return pair_group(self.pairs, index) if self.groups is None else self.groups.group(index)

    def group_id(self, index: int) -> str:
        """What the draws of group `index` are keyed by."""
        return (self.pairs.pair_ids if self.groups is None else self.groups.group_ids)[index]

    def cells(self) -> np.ndarray:
        """Pair and image of it behind every picture, int64 (N, U, 2), best first."""
        if self.groups is not None:
            return self.groups.cells
        order = np.where(self.pairs.p0[:, None] >= 0.5, [[0, 1]], [[1, 0]])
        return np.stack([np.broadcast_to(np.arange(len(self))[:, None], order.shape), order], -1)

    def prompts(self, index: int) -> tuple[str, ...]:
        """The captions (K,) of group `index`."""
        return (self.pairs.prompts[index],) * 2 if self.groups is None else self.groups.prompts[index]

    def scores(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The stored scores of groups, float64 (G, K) by scorer, best picture first."""
        rows = np.asarray(indices)
        if self.groups is not None:
            return {name: found[rows] for name, found in self.groups.scores.items()}
        order = np.where(self.pairs.p0[rows, None] >= 0.5, [[0, 1]], [[1, 0]])
        return {name: np.take_along_axis(found[rows], order, 1) for name, found in self.pairs.scores.items()}

    def relevance(self, indices: Sequence[int]) -> torch.Tensor:
        """The relevance (G, K) of groups, float32, as their samples have it."""
        rows = np.asarray(indices)
        if self.groups is not None:
            return torch.from_numpy(self.groups.relevance[rows]).float()
        larger = np.maximum(self.pairs.p0[rows], 1 - self.pairs.p0[rows])
        return torch.from_numpy(np.stack([larger, 1 - larger], 1)).float()

    def shape(self, index: int) -> Shape:
        """Height and width to which group `index` is brought."""
        if self.buckets is None:
            return self.resolution, self.resolution
        return self.buckets.shapes[self.buckets.of_pair[index]]

    def draws(self, index: int, visit: int) -> tuple[tuple[float, float] | None, tuple[bool, ...]]:
        """(crop, flip of each picture (U,), best first) of group `index` at one visit."""
        pair_id = self.group_id(index)
        flips: tuple[bool, ...]
        if self.flip_mode == "shared":
            flips = (uniform(self.seed, "flip", pair_id, visit) < self.flip_probability,) * self.num_pictures
        else:  # by position in the source, so that a label does not decide what an image looks like
            flips = tuple(uniform(self.seed, "flip", pair_id, visit, place) < self.flip_probability for place in self._places(index))
        if not self.random_crop:
            return None, flips
        return (uniform(self.seed, "crop_top", pair_id, visit), uniform(self.seed, "crop_left", pair_id, visit)), flips

    def _places(self, index: int) -> list[int]:
        """Position of each picture of group `index` in the source's own order."""
        if self.groups is not None:
            return [int(place) for place in self.groups.places[index]]
        return [0, 1] if self.pairs.p0[index] >= 0.5 else [1, 0]

    def chunks(self, indices: Iterable[int], batch_size: int) -> list[list[Item]]:
        """The pairs at `indices`, each at visit 0, in lists of at most `batch_size` of one shape; in their order without buckets."""
        by_shape: dict[Shape, list[int]] = {}
        for index in indices:
            by_shape.setdefault(self.shape(index), []).append(index)
        parts = [part[i : i + batch_size] for part in by_shape.values() for i in range(0, len(part), batch_size)]
        return [[(index, 0) for index in part] for part in parts]

    def _decode(self, group: Group, column: str, data: bytes) -> Image.Image:
        try:
            return decode_image(data, self.limits)
        except ImageError as error:
            raise ValueError(f"pair {group.group_id}, {column}: {error}; set check_images to true to have such rows set aside") from error


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack B samples of one shape: pixels (B, U, 3, H, W), time_ids (B, U, 6), relevance (B, K); numbers (B,); the rest as lists."""
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


WORKER_TIMEOUT = 300.0
"""Seconds after which a worker that gives nothing is taken to hang."""


def batches(pixels: PairPixels, sampler_fn: Callable[[], Iterable[list[Item]]], num_workers: int = 0) -> Generator[Batch, None, None]:
    """Collated micro-batches in the order of `sampler_fn`, which may be endless; closing the generator ends its workers.

    `sampler_fn` returns lists of (index, visit), for example `lambda: sampler.micro_batches(rank, ...)`. The batches do not
    depend on `num_workers`. A worker that gives nothing for WORKER_TIMEOUT seconds is given up with RuntimeError.

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
        timeout=WORKER_TIMEOUT if num_workers > 0 else 0,
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
