"""Aspect-ratio buckets: shapes of about R x R pixels, and the one in which a pair is trained.

Both pictures of a pair go to the same bucket, because they share the noise and so the shape of their latents: the bucket
whose aspect ratio is nearest to the mean of both, all in logarithms. A picture counts as at most MAX_ASPECT to 1, so that a
panorama does not decide alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from diffpref.data.groups import Groups, pair_group
from diffpref.data.images import DEFAULT_LIMITS, ImageError, ImageLimits, image_size
from diffpref.data.pairs import PairDataset

MAX_ASPECT = 4.0
"""Long side over short side of the most elongated buckets; SDXL's own end there too (arXiv:2307.01952, appendix I)."""

Shape = tuple[int, int]  # height, width

_DIGITS = 9  # of logarithms; their last bits may differ between processors, and ranks must agree on every pair


def bucket_shapes(resolution: int, step: int) -> tuple[Shape, ...]:
    """Shapes whose sides are multiples of `step`, from the tallest to the widest, none with more than resolution ** 2 pixels.

    Every multiple of `step` from `resolution` up is a long side; the short side is the longest that fits.

    Raises:
        ValueError: `resolution` is no multiple of `step`, or only the square is possible.
    """
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ValueError(
            f"resolution is {resolution}; with aspect_ratio_buckets it must be a multiple of bucket_step {step}, such as {near}"
        )
    tall, side = [], resolution + step
    while (short := resolution**2 // side // step * step) and side <= MAX_ASPECT * short:
        tall.append((side, short))
        side += step
    if not tall:
        raise ValueError(
            f"bucket_step is {step}, which leaves only the square at resolution {resolution}; lower bucket_step, raise resolution, "
            "or leave aspect_ratio_buckets out"
        )
    return (*reversed(tall), (resolution, resolution), *((short, long) for long, short in tall))


def read_sizes(pairs: PairDataset | Groups, limits: ImageLimits = DEFAULT_LIMITS, progress: bool = False) -> np.ndarray:
    """Height and width of the U pictures of every pair or group as they are shown, from their headers: (N, U, 2) int32.

    Raises:
        ValueError: a header cannot be read; the message names the pair.
    """
    count = 2 if isinstance(pairs, PairDataset) else pairs.cells.shape[1]
    sizes = np.empty((len(pairs), count, 2), np.int32)
    hidden = None if progress else True  # None: shown on a terminal only
    for index in tqdm(range(len(pairs)), "reading picture sizes", disable=hidden, delay=2, leave=False):
        group = pair_group(pairs, index) if isinstance(pairs, PairDataset) else pairs.group(index)
        for image, (column, data) in enumerate(zip(group.columns, group.images, strict=True)):
            try:
                sizes[index, image] = image_size(data, limits)
            except ImageError as error:
                raise ValueError(f"pair {group.group_id}, {column}: {error}; load with check_images=True to set such rows aside") from error
    return sizes


@dataclass(frozen=True, eq=False)
class Buckets:
    """The shapes, and the bucket of each of N pairs."""

    shapes: tuple[Shape, ...]
    of_pair: np.ndarray  # (N,) int64, position in `shapes`
    num_enlarged: int
    """Pairs with a picture that is smaller than its bucket, and so is enlarged."""
    num_elongated: int
    """Pairs with a picture beyond MAX_ASPECT to 1, of which more is cropped."""

    @classmethod
    def of_sizes(cls, sizes: np.ndarray, resolution: int, step: int) -> Buckets:
        """Buckets of groups with pictures of these `sizes`: (N, U, 2) height and width. Raises ValueError like `bucket_shapes`."""
        shapes = bucket_shapes(resolution, step)
        available = _log_aspect(np.array(shapes))
        aspects = _log_aspect(sizes)  # (N, U)
        limit = math.log(MAX_ASPECT)
        wanted = aspects.clip(-limit, limit).mean(1)
        between = (available[1:] + available[:-1]) / 2
        of_pair = np.searchsorted(between.round(_DIGITS), wanted.round(_DIGITS))
        enlarged = (sizes < np.array(shapes)[of_pair][:, None]).any((1, 2))
        elongated = (abs(aspects) > limit + 10**-_DIGITS).any(1)
        return cls(shapes, of_pair, int(enlarged.sum()), int(elongated.sum()))

    def counts(self) -> dict[Shape, int]:
        """Number of pairs per bucket that has any, from the tallest to the widest."""
        counts = np.bincount(self.of_pair, minlength=len(self.shapes)).tolist()
        return {shape: count for shape, count in zip(self.shapes, counts, strict=True) if count}

    def table(self, batch_size: int) -> str:
        """What is printed at the start of a run: pairs and batches per bucket, and how many pairs are enlarged or cut."""
        counts = self.counts()
        lines = [f"{len(counts)} of {len(self.shapes)} aspect-ratio buckets have pairs:", " height x width     pairs   batches per pass"]
        for (height, width), count in counts.items():
            lines.append(f"{height:>7} x {width:<6} {count:>8} {-(-count // batch_size):>18}")
        filled = sum(-count % batch_size for count in counts.values())
        if filled:
            lines.append(f"the last batch of a bucket is filled with pairs of its next pass: {filled} pairs in the first one")
        if self.num_enlarged:
            lines.append(f"{self.num_enlarged} pairs have a picture that is smaller than its bucket: it is enlarged")
        if self.num_elongated:
            lines.append(f"{self.num_elongated} pairs have a picture beyond {MAX_ASPECT:g}:1: its ends are cropped")
        return "\n".join(lines)


def _log_aspect(sizes: np.ndarray) -> np.ndarray:
    """Logarithm of width over height, (..., 2) to (...)."""
    return np.log(sizes[..., 1] / sizes[..., 0])
