"""Pairs as a reward model sees them: both pictures prepared as the finished scorer prepares them, in the order of the source."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffpref.core.preference import prompt_weights
from diffpref.data.images import decode_image
from diffpref.data.pairs import PairDataset
from diffpref.data.sampler import Item
from diffpref.scorers.preprocessing import Preprocessing

_AHEAD = 2  # batches that are decoded while the model works on another


@dataclass(frozen=True)
class RewardBatch:
    """G pairs."""

    pixels: Tensor  # (G, 2, 3, S, S) uint8, image 0 and image 1
    prompts: list[str]
    p0: Tensor  # (G,) float32, probability that image 0 is the better one
    weight: Tensor  # (G,) float64, 1 / pairs of the prompt
    pair_ids: list[str]
    visits: list[int]  # how often each pair was seen before


@dataclass(frozen=True)
class RewardPairs:
    """Pairs with the preprocessing of a scorer."""

    pairs: PairDataset
    preprocessing: Preprocessing

    @cached_property
    def weights(self) -> list[float]:
        """One over the number of pairs with the same prompt, (N,)."""
        return prompt_weights(self.pairs.prompts)

    def total_weight(self, indices: Iterable[int]) -> float:
        """Sum of the weights at `indices`; it does not depend on their order."""
        return math.fsum(self.weights[i] for i in indices)

    def batches(self, chunks: Iterable[Sequence[Item]], num_workers: int) -> Generator[RewardBatch, None, None]:
        """One batch per chunk of (index, visit), in their order; `num_workers` threads decode up to two batches ahead.

        Raises ValueError, naming the pair, for an image that cannot be decoded.
        """
        with ThreadPoolExecutor(num_workers) as pool:
            pending: deque[tuple[Sequence[Item], list[Future[Tensor]]]] = deque()
            try:
                for chunk in chunks:
                    pending.append((chunk, [pool.submit(self._pixels, *self._row(i)) for i, _ in chunk]))
                    if len(pending) > _AHEAD:
                        yield self._batch(*pending.popleft())
                while pending:
                    yield self._batch(*pending.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _row(self, index: int) -> tuple[str, bytes, bytes]:
        row = self.pairs.row(index)  # in this thread: tables are not meant to be read from several
        return row.pair_id, row.image_0, row.image_1

    def _pixels(self, pair_id: str, *encoded: bytes) -> Tensor:
        """(2, 3, S, S) uint8."""
        try:
            return torch.stack([self.preprocessing.image(decode_image(data)) for data in encoded])
        except ValueError as error:  # ImageError, or too long to be resized
            raise ValueError(f"pair {pair_id}: {error}; load with check_images true to set such rows aside") from error

    def _batch(self, chunk: Sequence[Item], futures: list[Future[Tensor]]) -> RewardBatch:
        return RewardBatch(
            pixels=torch.stack([future.result() for future in futures]),
            prompts=[self.pairs.prompts[i] for i, _ in chunk],
            p0=torch.tensor([self.pairs.p0[i] for i, _ in chunk], dtype=torch.float32),
            weight=torch.tensor([self.weights[i] for i, _ in chunk], dtype=torch.float64),
            pair_ids=[self.pairs.pair_ids[i] for i, _ in chunk],
            visits=[visit for _, visit in chunk],
        )
