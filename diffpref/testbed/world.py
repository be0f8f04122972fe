"""The small world of the testbed: captioned 64x64 scenes, rendered from a handful of numbers.

A caption states size, colour and shape of the object and the background. Everything else varies unstated: where the
object stands, how far it leans, whether a small companion disc stands beside it and on which side, and the exact
saturation, brightness and shading of the colours. Preferences are made of the unstated part.
"""

from __future__ import annotations

import colorsys
import dataclasses
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64

HUES = {"red": 0.0, "yellow": 55.0, "green": 120.0, "cyan": 183.0, "blue": 232.0, "pink": 312.0}
"""Named hues in degrees; at least 48 degrees apart, so that a checker can tell them apart."""
COLOURS = tuple(HUES)
GREYS = ("white", "gray", "black")
BACKGROUNDS = COLOURS + GREYS
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "medium", "large")
RADII = {"small": (9.5, 10.5), "medium": (13.0, 14.5), "large": (17.0, 18.5)}
"""Object radius in pixels; the gaps between the ranges make the size readable from pixels."""

MAX_TILT = 30.0
"""Degrees an object may lean to either side."""
COMPANION_SHARE = 0.75
"""Share of scenes in which a companion disc stands beside the object."""

_TEMPLATES = (
    "a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape}, {background} background",
    "a picture of a {size} {colour} {shape} on {background}",
    "a {background} background with a {size} {colour} {shape}",
)
_TEMPLATE_SHARES = (0.55, 0.15, 0.15, 0.15)

_EXTENT = {"circle": 1.0, "square": 1.2, "triangle": 1.2, "cross": 1.12, "ring": 1.0}
"""Farthest point of a shape from its centre, in radii."""


@dataclass(frozen=True)
class Scenes:
    """N scenes as arrays of shape (N,). The first four are stated in the caption, the rest are not."""

    colour: np.ndarray  # index into COLOURS
    shape: np.ndarray  # index into SHAPES
    size: np.ndarray  # index into SIZES
    background: np.ndarray  # index into BACKGROUNDS
    template: np.ndarray  # index of the caption template
    radius: np.ndarray  # pixels
    x: np.ndarray  # centre, pixels from the left
    y: np.ndarray  # centre, pixels from the top
    tilt: np.ndarray  # degrees, 0 = upright
    companion: np.ndarray  # bool
    companion_angle: np.ndarray  # degrees, 0 = right of the object, 90 = below it
    companion_radius: np.ndarray  # pixels
    companion_gap: np.ndarray  # pixels between the two outlines
    saturation: np.ndarray  # of the object, [0, 1]
    value: np.ndarray  # of the object, [0, 1]
    background_saturation: np.ndarray  # [0, 1]
    background_value: np.ndarray  # [0, 1]
    hue_shift: np.ndarray  # degrees, object
    shading: np.ndarray  # amplitude of a linear brightness ramp over the background, [0, 0.15]
    shading_angle: np.ndarray  # degrees

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, index: slice | np.ndarray) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    def captions(self) -> list[str]:
        return [
            _TEMPLATES[t].format(size=SIZES[s], colour=COLOURS[c], shape=SHAPES[k], background=BACKGROUNDS[b])
            for t, s, c, k, b in zip(self.template, self.size, self.colour, self.shape, self.background, strict=True)
        ]

    def scene_ids(self) -> np.ndarray:
        """One integer per stated combination (N,), the unit of the seen and unseen split."""
        return ((self.size * len(SHAPES) + self.shape) * len(COLOURS) + self.colour) * len(BACKGROUNDS) + self.background


def sample_scenes(rng: np.random.Generator, num_scenes: int) -> Scenes:
    """Draw scenes: stated attributes uniform, object and background never of the same hue."""
    n = num_scenes
    colour = rng.integers(0, len(COLOURS), n)
    background = rng.integers(0, len(BACKGROUNDS) - 1, n)
    background = np.where(background >= colour, background + 1, background)  # skips the object's own hue
    shape, size = rng.integers(0, len(SHAPES), n), rng.integers(0, len(SIZES), n)
    low, high = np.array([RADII[s] for s in SIZES])[size].T
    radius = rng.uniform(low, high)
    extent = radius * np.array([_EXTENT[s] for s in SHAPES])[shape] + 1.0
    near, far = np.maximum(extent, 20.0), np.minimum(IMAGE_SIZE - extent, 44.0)
    x, y = rng.uniform(near, far), rng.uniform(near, far)
    companion_radius, companion_gap = rng.uniform(5.0, 6.0, n), rng.uniform(2.0, 4.0, n)
    angle = _companion_angle(rng, x, y, extent + companion_gap + companion_radius, companion_radius)
    name = np.array(BACKGROUNDS)[background]
    saturation_range = np.where(np.isin(name, GREYS)[:, None], [0.0, 0.05], [0.45, 0.90])
    value_range = np.array([{"white": (0.90, 1.0), "gray": (0.42, 0.58), "black": (0.02, 0.12)}.get(b, (0.6, 0.95)) for b in name])
    return Scenes(
        colour=colour,
        shape=shape,
        size=size,
        background=background,
        template=rng.choice(len(_TEMPLATES), n, p=_TEMPLATE_SHARES),
        radius=radius,
        x=x,
        y=y,
        tilt=rng.uniform(-MAX_TILT, MAX_TILT, n),
        companion=(rng.random(n) < COMPANION_SHARE) & np.isfinite(angle),
        companion_angle=np.nan_to_num(angle),
        companion_radius=companion_radius,
        companion_gap=companion_gap,
        saturation=rng.uniform(0.55, 1.0, n),
        value=rng.uniform(0.7, 1.0, n),
        background_saturation=rng.uniform(saturation_range[:, 0], saturation_range[:, 1]),
        background_value=rng.uniform(value_range[:, 0], value_range[:, 1]),
        hue_shift=rng.uniform(-5.0, 5.0, n),
        shading=rng.uniform(0.0, 0.15, n),
        shading_angle=rng.uniform(0.0, 360.0, n),
    )


def _companion_angle(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, distance: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """A direction uniform among those that keep the companion inside the picture; NaN where there is none. (N,)"""
    tries = rng.uniform(0.0, 360.0, (64, len(x)))
    cx, cy = x + distance * np.cos(np.radians(tries)), y + distance * np.sin(np.radians(tries))
    inside = (np.minimum(cx, cy) - radius > 0.5) & (np.maximum(cx, cy) + radius < IMAGE_SIZE - 0.5)
    first = inside.argmax(0)
    picked = np.take_along_axis(tries, first[None], 0)[0]
    return np.where(inside.any(0), picked, np.nan)


def outline(shape: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of an upright shape, negative inside; u right, v down from the centre."""
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    if shape == "cross":
        across = np.maximum(np.abs(u) - 1.05 * radius, np.abs(v) - 0.36 * radius)
        return np.minimum(across, np.maximum(np.abs(v) - 1.05 * radius, np.abs(u) - 0.36 * radius))
    if shape == "triangle":  # circumscribed radius 1.2, inscribed 0.6
        side = 0.8660254 * np.abs(u) - 0.5 * v
        return np.maximum(side, v) - 0.6 * radius
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def render(scenes: Scenes) -> np.ndarray:
    """Draw scenes with anti-aliased outlines. Returns float32 (N, 64, 64, 3) in [0, 1]."""
    grid = np.arange(IMAGE_SIZE) + 0.5
    px, py = np.meshgrid(grid, grid)
    column = {f.name: getattr(scenes, f.name)[:, None, None] for f in dataclasses.fields(scenes)}
    dx, dy = px - column["x"], py - column["y"]
    turn = np.radians(column["tilt"])
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, -np.sin(turn) * dx + np.cos(turn) * dy
    distance = np.empty(u.shape)
    for index, shape in enumerate(SHAPES):
        rows = scenes.shape == index
        distance[rows] = outline(shape, u[rows], v[rows], column["radius"][rows])
    reach = column["radius"] * np.array([_EXTENT[s] for s in SHAPES])[scenes.shape][:, None, None] + 1.0
    reach = reach + column["companion_gap"] + column["companion_radius"]
    direction = np.radians(column["companion_angle"])
    disc = np.hypot(dx - reach * np.cos(direction), dy - reach * np.sin(direction)) - column["companion_radius"]
    distance = np.where(column["companion"], np.minimum(distance, disc), distance)
    cover = np.clip(0.5 - distance / 1.4, 0.0, 1.0)[..., None]

    hue = np.array([HUES[c] for c in COLOURS])[scenes.colour] + scenes.hue_shift
    ink = _rgb(hue, scenes.saturation, scenes.value)[:, None, None]
    ground_hue = np.array([HUES.get(b, 0.0) for b in BACKGROUNDS])[scenes.background]
    ground = _rgb(ground_hue, scenes.background_saturation, scenes.background_value)[:, None, None]
    light = np.radians(column["shading_angle"])
    ramp = ((px - 32) * np.cos(light) + (py - 32) * np.sin(light)) / 32
    ground = ground * (1 + column["shading"] * ramp)[..., None]
    return np.clip(ground * (1 - cover) + ink * cover, 0, 1).astype(np.float32)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    rows = zip(hue / 360 % 1, saturation, value, strict=True)
    return np.array([colorsys.hsv_to_rgb(h, s, v) for h, s, v in rows]).reshape(-1, 3)
