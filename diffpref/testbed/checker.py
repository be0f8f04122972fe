"""Read a scene back from its pixels: what stands where, in which colour, shape, size and posture.

The checker sees pixels only. It separates the object from the background by colour, takes the largest connected part as
the object and a second part as its companion, and finds shape, radius and tilt by comparing the object's soft mask with
drawn templates. Its own accuracy on renders is the ceiling of every prompt-following figure (docs/testbed.md).
"""

from __future__ import annotations

import colorsys
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.testbed.world import BACKGROUNDS, COLOURS, GREYS, HUES, IMAGE_SIZE, RADII, SHAPES, SIZES, outline

_PERIOD = {"circle": 0.0, "square": 90.0, "triangle": 120.0, "cross": 90.0, "ring": 0.0}
"""Degrees after which a shape looks the same; 0 means that it has no posture."""
_TEMPLATE_RADII = np.arange(6.0, 23.0, 0.75)
_TILT_STEP = 6.0
_SIZE_LIMITS = [
    (RADII["small"][1] + RADII["medium"][0]) / 2,
    (RADII["medium"][1] + RADII["large"][0]) / 2,
]
_MIN_COMPANION_AREA = 35


def _tilts(period: float) -> list[float]:
    """Tilts in degrees from -period / 2 to period / 2, upright among them."""
    turns = np.arange(0.0, max(period, 1.0), _TILT_STEP)
    return [float(t if t <= period / 2 else t - period) for t in turns]


@dataclass(frozen=True)
class Reading:
    """What N pictures show. Arrays of shape (N,); NaN where a picture does not have the property."""

    colour: np.ndarray  # index into COLOURS, -1 if grey
    background: np.ndarray  # index into BACKGROUNDS
    shape: np.ndarray  # index into SHAPES
    size: np.ndarray  # index into SIZES
    x: np.ndarray  # centre, pixels
    y: np.ndarray
    radius: np.ndarray  # pixels
    tilt: np.ndarray  # degrees from upright, 0 to half the shape's period; NaN for circle and ring
    companion: np.ndarray  # bool
    companion_angle: np.ndarray  # degrees, 0 = right, 90 = below; NaN without companion
    fit: np.ndarray  # overlap of the object with its template, [0, 1]
    saturation: np.ndarray  # of the object
    value: np.ndarray
    background_saturation: np.ndarray
    background_value: np.ndarray
    shading: np.ndarray  # brightness difference across the background, [0, 1]


@functools.cache
def _templates() -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Soft masks (M, 64 * 64) centred in the picture, with their shape index, radius and tilt (M,)."""
    offset = np.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    dx, dy = np.meshgrid(offset, offset)
    masks, kinds, radii, tilts = [], [], [], []
    for index, shape in enumerate(SHAPES):
        for tilt in _tilts(_PERIOD[shape]):
            turn = np.radians(tilt)
            u, v = np.cos(turn) * dx + np.sin(turn) * dy, -np.sin(turn) * dx + np.cos(turn) * dy
            for radius in _TEMPLATE_RADII:
                masks.append(np.clip(0.5 - outline(shape, u, v, np.array(radius)) / 1.4, 0, 1).ravel())
                kinds.append(index)
                radii.append(radius)
                tilts.append(tilt if _PERIOD[shape] else np.nan)
    return torch.from_numpy(np.array(masks, dtype=np.float32)), np.array(kinds), np.array(radii), np.array(tilts)


def read(images: np.ndarray) -> Reading:
    """Read pictures. images: uint8 (N, 64, 64, 3). Raises ValueError for another shape or type."""
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"images must be uint8 (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {images.dtype} {images.shape}")
    parts = [_read_chunk(torch.from_numpy(images[i : i + 100]).float() / 255) for i in range(0, len(images), 100)]
    return Reading(**{name: np.concatenate([p[name] for p in parts]) for name in Reading.__dataclass_fields__})


def _read_chunk(x: Tensor) -> dict[str, np.ndarray]:
    border = torch.cat([x[:, :2].flatten(1, 2), x[:, -2:].flatten(1, 2), x[:, :, :2].flatten(1, 2), x[:, :, -2:].flatten(1, 2)], 1)
    ground = border.median(1).values
    ramp = _background_plane(x, ground)
    gap = (x - ramp).norm(dim=-1)
    strength = gap.flatten(1).quantile(0.97, dim=1)[:, None, None]
    mask = (gap > 0.5 * strength) & (gap > 0.08)
    main, companion = _two_largest(mask)
    ink = _masked_median(x, _erode(main))
    soft = _coverage(x, ramp, ink) * F.max_pool2d(main[:, None].float(), 3, 1, 1)[:, 0]
    cx, cy = _centroid(soft)
    kind, radius, tilt, fit = _match(soft, cx, cy)
    has_companion = companion.flatten(1).sum(1) >= _MIN_COMPANION_AREA
    px, py = _centroid(companion.float())
    angle = torch.rad2deg(torch.atan2(py - cy, px - cx)).numpy() % 360
    object_hsv, ground_hsv = _hsv(ink), _hsv(ground)
    return {
        "colour": _name_colour(object_hsv),
        "background": _name_background(ground_hsv),
        "shape": kind,
        "size": np.digitize(radius, _SIZE_LIMITS),
        "x": cx.numpy(),
        "y": cy.numpy(),
        "radius": radius,
        "tilt": np.abs(tilt),
        "companion": has_companion.numpy(),
        "companion_angle": np.where(has_companion.numpy(), angle, np.nan),
        "fit": fit,
        "saturation": object_hsv[:, 1],
        "value": object_hsv[:, 2],
        "background_saturation": ground_hsv[:, 1],
        "background_value": ground_hsv[:, 2],
        "shading": _shading(ramp),
    }


def _background_plane(x: Tensor, ground: Tensor) -> Tensor:
    """The background as a colour plus a linear ramp, fitted to pixels near the border's colour. (N, 64, 64, 3)."""
    axis = torch.linspace(-1, 1, IMAGE_SIZE)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    basis = torch.stack([torch.ones_like(u), u, v], -1).reshape(-1, 3)
    flat = x.flatten(1, 2)
    near = ((flat - ground[:, None]).norm(dim=-1) < 0.25).float()[..., None] + 1e-4
    gram = torch.einsum("pi,npx,pj->nij", basis, near, basis)
    plane = torch.linalg.solve(gram, torch.einsum("pi,npx,npc->nic", basis, near, flat))
    return torch.einsum("pi,nic->npc", basis, plane).reshape(x.shape)


def _two_largest(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest 8-connected parts of bool masks (N, 64, 64)."""
    label = torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).view(1, *mask.shape[1:]) * mask
    while True:
        spread = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, label):
            break
        label = spread
    flat = label.flatten(1).long()
    area = torch.zeros(len(mask), mask[0].numel() + 1, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    area[:, 0] = 0
    top = area.topk(2, dim=1).indices
    pick = [(label == top[:, k, None, None]) & mask for k in range(2)]
    return pick[0], pick[1]


def _erode(mask: Tensor) -> Tensor:
    """The inside of masks (N, 64, 64); masks too thin to have an inside stay as they are."""
    inner = -F.max_pool2d(-mask[:, None].float(), 3, 1, 1)[:, 0] > 0.5
    return torch.where(inner.flatten(1).sum(1)[:, None, None] >= 12, inner, mask)


def _masked_median(x: Tensor, mask: Tensor) -> Tensor:
    """Median colour under each mask (N, 3); grey where a mask is empty."""
    hidden = torch.where(mask[..., None], x, torch.nan).flatten(1, 2)
    return hidden.nanmedian(1).values.nan_to_num(0.5)


def _coverage(x: Tensor, ground: Tensor, ink: Tensor) -> Tensor:
    """How much of each pixel the object covers, by projecting on the line from background to object colour. (N, 64, 64)."""
    line = ink[:, None, None] - ground
    return (((x - ground) * line).sum(-1) / line.pow(2).sum(-1).clamp_min(1e-4)).clamp(0, 1)


def _centroid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass in pixels, (N,) each; the picture's centre where there is no mass."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    mass = weight.sum((1, 2))
    x, y = (weight.sum(1) * grid).sum(1), (weight.sum(2) * grid).sum(1)
    empty = mass < 1
    half = torch.full_like(mass, IMAGE_SIZE / 2)
    return torch.where(empty, half, x / mass.clamp_min(1)), torch.where(empty, half, y / mass.clamp_min(1))


def _match(soft: Tensor, cx: Tensor, cy: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Best template by the overlap sum(ab) / (sum(aa) + sum(bb) - sum(ab)): shape index, radius, tilt, overlap, (N,) each."""
    shift = torch.stack([(cx - IMAGE_SIZE / 2), (cy - IMAGE_SIZE / 2)], -1) * 2 / IMAGE_SIZE
    theta = torch.eye(2, 3).repeat(len(soft), 1, 1)
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [len(soft), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    centred = F.grid_sample(soft[:, None], grid, align_corners=False).flatten(1)
    masks, kinds, radii, tilts = _templates()
    common = centred @ masks.T
    overlap = common / (centred.pow(2).sum(1, keepdim=True) + masks.pow(2).sum(1) - common).clamp_min(1e-6)
    best = overlap.argmax(1).numpy()
    return kinds[best], radii[best], tilts[best], overlap.max(1).values.numpy()


def _hsv(rgb: Tensor) -> np.ndarray:
    """Hue in degrees, saturation and value in [0, 1]. (N, 3)."""
    rows = [colorsys.rgb_to_hsv(*c) for c in rgb.clamp(0, 1).tolist()]
    return np.array([(h * 360, s, v) for h, s, v in rows]).reshape(-1, 3)


def _nearest_hue(hue: np.ndarray) -> np.ndarray:
    distance = np.abs((hue[:, None] - np.array(list(HUES.values())) + 180) % 360 - 180)
    return distance.argmin(1)


def _name_colour(hsv: np.ndarray) -> np.ndarray:
    return np.where((hsv[:, 1] < 0.25) | (hsv[:, 2] < 0.25), -1, _nearest_hue(hsv[:, 0]))


def _name_background(hsv: np.ndarray) -> np.ndarray:
    white, gray, black = (BACKGROUNDS.index(name) for name in GREYS)
    grey = np.where(hsv[:, 2] > 0.75, white, np.where(hsv[:, 2] < 0.27, black, gray))
    return np.where((hsv[:, 1] < 0.2) | (hsv[:, 2] < 0.2), grey, _nearest_hue(hsv[:, 0]))


def _shading(ramp: Tensor) -> np.ndarray:
    """Brightness range of the fitted background. (N,)"""
    light = ramp.mean(-1).flatten(1)
    return (light.amax(1) - light.amin(1)).numpy()


def follows(reading: Reading, prompts: list[str]) -> dict[str, np.ndarray]:
    """Whether each picture shows what its caption states: colour, background, shape, size; bool (N,) each.

    Raises ValueError for a prompt that is not a caption of this world.
    """
    wanted = [parse(p) for p in prompts]
    stated = {key: np.array([w[key] for w in wanted]) for key in ("colour", "background", "shape", "size")}
    return {key: getattr(reading, key) == value for key, value in stated.items()}


def parse(prompt: str) -> dict[str, int]:
    """The attributes that a caption states, as indices into COLOURS, BACKGROUNDS, SHAPES and SIZES."""
    words = prompt.replace(",", " ").split()
    shape = next((w for w in words if w in SHAPES), None)
    size = next((w for w in words if w in SIZES), None)
    if shape is None or size is None or words.index(shape) == 0:
        raise ValueError(f"prompt {prompt!r} is not a caption of the testbed, e.g. 'a small red circle on a gray background'")
    colour = words[words.index(shape) - 1]
    others = [w for i, w in enumerate(words) if w in BACKGROUNDS and i != words.index(shape) - 1]
    if colour not in COLOURS or len(others) != 1:
        raise ValueError(f"prompt {prompt!r} must name one colour of {', '.join(COLOURS)} and one background of {', '.join(BACKGROUNDS)}")
    return {
        "colour": COLOURS.index(colour),
        "background": BACKGROUNDS.index(others[0]),
        "shape": SHAPES.index(shape),
        "size": SIZES.index(size),
    }
