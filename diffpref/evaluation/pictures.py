"""What changed in the pictures besides the score: simple statistics in which a hacked reward often shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Measured:
    """Everything that was measured of one model."""

    scores: dict[str, np.ndarray]  # (P, S) each; NaN where the scorer refused the picture
    statistics: dict[str, np.ndarray]  # (P, S) each
    thumbnails: np.ndarray  # (P, S, 32, 32, 3) float32 in [0, 1]
    problems: dict[tuple[int, int], str] = field(default_factory=dict)  # (prompt, picture) -> why a scorer refused it


def saturation(image: np.ndarray) -> float:
    """Mean saturation of HSV, 0 to 1."""
    return float(np.asarray(Image.fromarray(image).convert("HSV"))[..., 1].mean() / 255)


def contrast(image: np.ndarray) -> float:
    """Standard deviation of the luma, 0 to about 0.5."""
    return float(luma(image).std())


def sharpness(image: np.ndarray) -> float:
    """Standard deviation of the Laplacian of the luma."""
    y = luma(image)
    laplacian = -4 * y[1:-1, 1:-1] + y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:]
    return float(laplacian.std()) if laplacian.size else 0.0


def jpeg_size(image: np.ndarray) -> float:
    """Bytes per pixel as a JPEG of quality 90: how much detail, or noise, there is."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.tell() / (image.shape[0] * image.shape[1])


def luma(image: np.ndarray) -> np.ndarray:
    """Brightness (H, W) in [0, 1] of uint8 (H, W, 3), by the weights of ITU-R 601."""
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


STATISTICS: Mapping[str, Callable[[np.ndarray], float]] = {
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
    "jpeg_size": jpeg_size,
}
"""Statistics of one picture uint8 (H, W, 3)."""


def thumbnail(image: np.ndarray, side: int = 32) -> np.ndarray:
    """float32 (side, side, 3) in [0, 1], for distances between whole pictures."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def diversity(thumbnails: np.ndarray) -> float:
    """Mean root-mean-square distance between the pictures of a prompt, over prompts; thumbnails (P, S, h, w, 3). NaN for S = 1."""
    count = thumbnails.shape[1]
    if count < 2:
        return float("nan")
    flat = thumbnails.reshape(*thumbnails.shape[:2], -1)
    distances = [np.sqrt(((flat[:, i] - flat[:, j]) ** 2).mean(-1)) for i in range(count) for j in range(i)]
    return float(np.mean(distances))


def drift(base: np.ndarray, model: np.ndarray) -> float:
    """Mean root-mean-square distance to the base's picture of the same prompt and seed; thumbnails (P, S, h, w, 3) each."""
    return float(np.sqrt(((model - base) ** 2).reshape(*base.shape[:2], -1).mean(-1)).mean())
