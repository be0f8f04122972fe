"""From a picture to the input of a vision tower, as each released scorer was trained and published with.

Two geometries, each once for 8-bit images and once for tensors through which gradients flow. On an 8-bit image the two
agree up to the rounding to 8 bits that Pillow's resize makes; `LongestSidePad` has no such rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MAX_PIXELS = 2**26
"""Width times height that an image may have, before and after the resize."""

# The normalisation that OpenAI trained CLIP with; every scorer here uses it.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Preprocessing(Protocol):
    """The geometry of one released scorer."""

    def image(self, image: Image.Image) -> Tensor:
        """One 8-bit image to (3, S, S), uint8 or float32 in [0, 1]."""

    def pixels(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to float (N, 3, S, S), differentiable."""


@dataclass(frozen=True)
class ShortestSideCrop:
    """Bicubic resize of the shorter side to `size`, then a crop of the centre."""

    size: int
    torchvision: bool = False
    """How odd margins and other modes than RGB are handled: False as transformers' CLIP processor (RGB first, offsets rounded
    down), True as OpenAI's and BLIP's transforms (RGB last, offsets rounded to even)."""

    def image(self, image: Image.Image) -> Tensor:
        """See Preprocessing. Raises ValueError for an image so long that its resized form would exceed MAX_PIXELS."""
        image = image if self.torchvision else _rgb(image)
        width, height = self._resized(*image.size)
        left, top = self._offset(width), self._offset(height)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + self.size, top + self.size))
        return _to_tensor(_rgb(image))

    def pixels(self, pixels: Tensor) -> Tensor:
        """See Preprocessing; values stay in [0, 1], as they do in an 8-bit image."""
        width, height = self._resized(pixels.shape[3], pixels.shape[2])
        left, top = self._offset(width), self._offset(height)
        resized = _resize(pixels, width, height, antialias=True).clamp(0, 1)
        return resized[:, :, top : top + self.size, left : left + self.size]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        short, long = min(width, height), max(width, height)
        long = int(self.size * long / short)
        if long * self.size > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is too long and narrow: resized it has {long} x {self.size} pixels, at most {MAX_PIXELS}")
        return (self.size, long) if width <= height else (long, self.size)

    def _offset(self, side: int) -> int:
        margin = side - self.size
        return round(margin / 2) if self.torchvision else margin // 2


@dataclass(frozen=True)
class LongestSidePad:
    """Bicubic resize, in floating point, of the longer side to `size`, then black margins around; nothing is cut off."""

    size: int
    antialias: bool = True
    """Whether shrinking averages over all pixels; False is what torchvision before 0.17 did, and older published numbers."""

    def image(self, image: Image.Image) -> Tensor:
        """See Preprocessing."""
        return self.pixels(_to_tensor(_rgb(image))[None].float() / 255)[0]

    def pixels(self, pixels: Tensor) -> Tensor:
        """See Preprocessing; the overshoot of the bicubic kernel beyond [0, 1] is kept, as in the release."""
        scale = self.size / max(pixels.shape[2:])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[2:])
        resized = _resize(pixels, width, height, self.antialias)
        down, right = self.size - height, self.size - width
        return F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalise(pixels: Tensor) -> Tensor:
    """(N, 3, S, S), uint8 or float in [0, 1], to what the vision towers take: float32, about zero mean and unit spread."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (_MEAN, _STD))
    if pixels.dtype == torch.uint8:  # in place, in the same order: a third of the time
        return pixels.float().div_(255).sub_(mean).div_(std)
    return (pixels.float() - mean) / std


def _rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; Pillow's convert copies one that is already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resize(pixels: Tensor, width: int, height: int, antialias: bool) -> Tensor:
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
