"""A reward model as a function from pictures and prompts to numbers: batched, with decoding and resizing in threads beside it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffpref.scorers.preprocessing import MAX_PIXELS, Preprocessing, normalise

# What converts to 8-bit RGB without losing the image: Pillow clips modes of 16 bits and more, so that they turn white.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# Pillow decodes at first use, which two threads must not do to one image; a list may hold the same image twice.
_DECODING = tuple(threading.Lock() for _ in range(64))


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One released reward model, ready to score; higher is better.

    A score depends on its own picture and prompt only. Other neighbours in the batch, another batch size or another order
    change it by float32 rounding at most (about 1e-6 relative).
    """

    name: str
    """As in SCORERS."""
    version: str
    """Of the released weights."""
    convention: str
    """What the number is: formula, scale and the preprocessing that it depends on."""
    checksum: str
    """SHA-256 of the weight files."""
    preprocessing: Preprocessing
    reward: Callable[[Tensor, Sequence[str]], Tensor] = field(repr=False)
    """Normalised (N, 3, S, S) on `device` and N prompts to (N,)."""
    device: torch.device
    uses_prompts: bool = True
    batch_size: int = 32
    """Pictures per forward pass."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Threads that fetch, decode and resize."""

    def __post_init__(self) -> None:
        for setting in ("batch_size", "num_workers"):
            if (value := getattr(self, setting)) < 1:
                raise ValueError(f"{self.name}: {setting} is {value}; accepted: 1 or more")

    @property
    def record(self) -> dict[str, str]:
        """What has to stand beside every number of this scorer."""
        return {"name": self.name, "version": self.version, "convention": self.convention, "checksum": self.checksum}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image] | np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Score N pictures, each for its own prompt: float32 (N,) on the CPU.

        images: 8-bit images of any size and mode, or uint8 (N, H, W, 3). They are fetched by index in worker threads, so a
        sequence that opens a file in `__getitem__` decodes beside the model. Transparency is dropped, EXIF rotation is not
        applied, as in the released scorers.

        Raises:
            ValueError: the counts differ, a prompt is empty, an image is missing, broken, of more than 8 bits or too large, or
                a score is not finite. The message has the index.
        """
        self._check(images, prompts)
        scores = [torch.zeros(0)]
        for start, batch in self._batches(images):
            batch_prompts = list(prompts[start : start + len(batch)])
            # A caller's autocast must not reach the model: half precision rounds HPS to steps of 2e-4 and makes ties.
            with torch.autocast(self.device.type, enabled=False):
                reward = self.reward(normalise(batch.to(self.device)), batch_prompts)
            scores.append(reward.float().cpu())
        found = torch.cat(scores)
        if not found.isfinite().all():
            bad = int((~found.isfinite()).nonzero()[0])
            raise ValueError(f"{self.name}: the score of image {bad} is {found[bad]}; the weights are broken")
        return found

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score (N, 3, H, W) in [0, 1], each for its prompt, with gradients to the pixels: float32 (N,) on their device.

        One forward pass. This is the variant "<name>_pixels": where the scorer resizes 8-bit images, its values differ slightly
        from those of `__call__`, so the two are not to be compared.

        Raises ValueError for other shapes and types, for unequal counts and for empty prompts.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"{self.name}: pixels is {pixels.dtype} {tuple(pixels.shape)}; accepted: floating point (N, 3, H, W) in [0, 1]"
            )
        self._check(pixels, prompts)
        with torch.autocast(self.device.type, enabled=False):
            return self.reward(normalise(self.preprocessing.pixels(pixels.float().to(self.device))), prompts).to(pixels.device)

    def _check(self, images: Any, prompts: Sequence[str]) -> None:
        if isinstance(images, Image.Image) or not hasattr(images, "__getitem__") or isinstance(images, str | bytes):
            raise ValueError(f"{self.name}: images is one {type(images).__name__}; accepted: a sequence of images, or uint8 (N, H, W, 3)")
        if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
            raise ValueError(f"{self.name}: images is {images.dtype} {images.shape}; accepted: uint8 (N, H, W, 3)")
        if isinstance(prompts, str):
            raise ValueError(f"{self.name}: prompts is one string; accepted: a sequence with one prompt for each image")
        if len(images) != len(prompts):
            raise ValueError(f"{self.name}: {len(images)} images and {len(prompts)} prompts; every image needs its own prompt")
        if self.uses_prompts:
            bad = next((i for i, p in enumerate(prompts) if not isinstance(p, str) or not p.strip()), None)
            if bad is not None:
                raise ValueError(f"{self.name}: prompt {bad} is {prompts[bad]!r}; accepted: text. Leave out images without a prompt")

    def _batches(self, images: Sequence[Any] | np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Start index and (n, 3, S, S) of each batch; the workers are at most two batches ahead."""
        indices = iter(range(len(images)))
        with ThreadPoolExecutor(self.num_workers) as pool:
            pending: deque[Future[Tensor]] = deque()
            try:
                pending.extend(pool.submit(self._prepare, images, i) for i in islice(indices, 2 * self.batch_size))
                start = 0
                while pending:
                    batch = [pending.popleft().result() for _ in range(min(self.batch_size, len(pending)))]
                    pending.extend(pool.submit(self._prepare, images, i) for i in islice(indices, len(batch)))
                    yield start, torch.stack(batch)
                    start += len(batch)
            finally:
                pool.shutdown(cancel_futures=True)

    def _prepare(self, images: Sequence[Any] | np.ndarray, index: int) -> Tensor:
        try:
            image = images[index]
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            return self.preprocessing.image(decoded(image))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly every type there is
            raise ValueError(f"{self.name}: image {index} cannot be scored: {error}") from error


def decoded(image: Any) -> Image.Image:
    """A checked image whose pixels are in memory. Raises ValueError, and what Pillow raises for broken files."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"it is a {type(image).__name__}; accepted: PIL images")
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; accepted: 1 to {MAX_PIXELS}")
    if image.mode not in _MODES:
        raise ValueError(f"its mode is {image.mode}; accepted: {', '.join(_MODES)}. Convert it to 8 bits first")
    with _DECODING[id(image) % len(_DECODING)]:
        image.load()
    return image
