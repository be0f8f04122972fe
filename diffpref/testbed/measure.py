"""Measuring a model on the testbed: pictures of the same prompts and seeds, scored part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from diffpref.evaluation.compare import compare_scores
from diffpref.evaluation.generate import Images
from diffpref.evaluation.stats import spread_ratio
from diffpref.locations import asset
from diffpref.testbed.checker import Reading, follows, parse, read
from diffpref.testbed.reward import reward_parts, total, unrewarded

FIRST_SEED = 7_000_000
"""Seeds of evaluations start here, away from those of the pairs."""


def seeds_for(num_prompts: int, sample: int = 0) -> list[int]:
    """One seed per prompt; another `sample` gives other seeds."""
    return [FIRST_SEED + 100_000 * sample + i for i in range(num_prompts)]


@dataclass(frozen=True)
class Measured:
    """N pictures and everything that is said about them."""

    images: Images
    prompts: list[str]
    parts: dict[str, np.ndarray]  # reward parts, (N,) each
    score: np.ndarray  # (N,)
    following: dict[str, np.ndarray]  # bool (N,) each
    reading: Reading


def measure(images: Images, prompts: list[str]) -> Measured:
    """Score uint8 (N, 64, 64, 3)."""
    reading = read(images)
    parts = reward_parts(images, prompts)
    return Measured(images, prompts, parts, total(parts), follows(reading, prompts), reading)


def shares(measured: Measured) -> dict[str, float]:
    """Prompt following: share of pictures per stated attribute, and of those that show all four."""
    each = {name: float(ok.mean()) for name, ok in measured.following.items()}
    return each | {"all": float(np.all(list(measured.following.values()), axis=0).mean())}


def diversity(base: Measured, aligned: Measured) -> dict[str, float]:
    """Spread of unrewarded attributes within equal captions, aligned over base."""
    stated = [parse(p) for p in base.prompts]
    colour, ground = np.array([s["colour"] for s in stated]), np.array([s["background"] for s in stated])
    of_object = {"object_saturation", "object_value"}
    groups = {name: colour if name in of_object else ground for name in unrewarded(base.reading)}
    return spread_ratio(unrewarded(base.reading), unrewarded(aligned.reading), groups)


def comparison(base: Measured, aligned: Measured, ruler: np.ndarray | None) -> dict[str, object]:
    """Every number of a comparison, as plain values; ruler: base scores (N, M) of the same prompts, for best-of-N."""
    return {
        **compare_scores(base.score, aligned.score, ruler),
        "prompt_following_base": shares(base),
        "prompt_following_aligned": shares(aligned),
        "score_parts_base": {k: float(v.mean()) for k, v in base.parts.items()},
        "score_parts_aligned": {k: float(v.mean()) for k, v in aligned.parts.items()},
        "diversity": diversity(base, aligned),
    }


FILTERS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "saturation x 1.5": (("color", 1.5),),
    "saturation x 0.6": (("color", 0.6),),
    "contrast x 1.3": (("contrast", 1.3),),
    "sharpness x 3": (("sharpness", 3.0),),
    "mode 5": (("mode", 5),),
    "median 5": (("median", 5),),
    "median 13": (("median", 13),),
    "median 5, saturation x 1.5": (("median", 5), ("color", 1.5)),
    "mode 5, saturation x 1.5": (("mode", 5), ("color", 1.5)),
    "mode 13, saturation x 1.5": (("mode", 13), ("color", 1.5)),
    "blur 1, sharpness x 3": (("blur", 1.0), ("sharpness", 3.0)),
    "minimum 3": (("min", 3),),
    "maximum 3": (("max", 3),),
}
"""Chains of pixel filters that are tried as an untrained way to win."""


def apply_filter(name: str, images: Images) -> Images:
    """Apply a chain of FILTERS to uint8 (N, 64, 64, 3)."""
    return np.stack([np.asarray(_filtered(Image.fromarray(image), FILTERS[name])) for image in images])


def _filtered(image: Image.Image, chain: tuple[tuple[str, float], ...]) -> Image.Image:
    for kind, amount in chain:
        if kind in ("color", "contrast", "sharpness"):
            image = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "sharpness": ImageEnhance.Sharpness}[kind](
                image
            ).enhance(amount)
        elif kind == "blur":
            image = image.filter(ImageFilter.GaussianBlur(amount))
        else:
            ranked: dict[str, Callable[[int], ImageFilter.Filter]] = {
                "mode": ImageFilter.ModeFilter,
                "median": ImageFilter.MedianFilter,
                "min": ImageFilter.MinFilter,
                "max": ImageFilter.MaxFilter,
            }
            image = image.filter(ranked[kind](int(amount)))
    return image


def fingerprint(model: Path) -> str:
    """Hash of a pipeline's weights, which ties stored measurements to their model."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*/*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Ruler:
    """Scores of many base samples per test prompt, from which best-of-N is read."""

    model: str  # fingerprint
    steps: int
    guidance: float
    scores: np.ndarray  # (P, M)

    def save(self, path: Path) -> None:
        """Write JSON with four decimals."""
        rows = [[round(float(x), 4) for x in row] for row in self.scores]
        path.write_text(json.dumps({"model": self.model, "steps": self.steps, "guidance": self.guidance, "scores": rows}))

    @classmethod
    def load(cls, path: Path) -> Ruler:
        """Read what `save` wrote."""
        stored = json.loads(path.read_text())
        return cls(stored["model"], stored["steps"], stored["guidance"], np.array(stored["scores"]))


def shipped_ruler(model: str, steps: int, guidance: float, num_prompts: int) -> np.ndarray | None:
    """Scores (num_prompts, M) of the shipped ruler, None if it belongs to another model or sampling or has fewer prompts."""
    path = asset("testbed") / "ruler.json"
    if not path.exists():
        return None
    stored = Ruler.load(path)
    fits = (stored.model, stored.steps, stored.guidance) == (fingerprint(Path(model)), steps, guidance)
    return stored.scores[:num_prompts] if fits and num_prompts <= len(stored.scores) else None
