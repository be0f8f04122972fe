"""Simulated users of the testbed: two tastes each, pairs labelled by their own reward, some users kept for later.

    reward of a user = sum over its two tastes of weight * quality + 2 follow

A taste pulls along an axis, and every taste has an opposite, so no single model can please all users. Weights make the axes count alike:
a quality times its weight has a standard deviation of about 1 among base samples of one prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.evaluation.generate import Images
from diffpref.testbed.checker import read
from diffpref.testbed.pairs import judge, pick_a_pic_table, through_jpeg, widest
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.reward import qualities
from diffpref.testbed.sampling import Sampler, sample_parallel

AXES: Mapping[str, tuple[str, str]] = {
    "side": ("left", "right"),
    "height": ("high", "low"),
    "company": ("alone", "accompanied"),
    "colour": ("vivid", "muted"),
}
"""Qualities of the testbed that contradict each other."""
WEIGHTS: Mapping[str, float] = {"side": 3.7, "height": 3.7, "company": 2.0, "colour": 19.0}
"""One over the standard deviation of the quality among base samples of one prompt."""
FOLLOW = 2.0
HELD_OUT = ("left+vivid", "right+alone", "high+muted", "low+accompanied", "left+low", "right+muted", "alone+vivid", "high+accompanied")
"""Users of whom training sees nothing; each of their tastes occurs in other combinations."""
AGREEMENT = 0.9
FIRST_SEED = 20_000_000
"""Seeds of the candidates, away from those of the other pairs and of evaluations."""


def axis_of(taste: str) -> str:
    """The axis of a taste."""
    return next(axis for axis, tastes in AXES.items() if taste in tastes)


def all_users() -> list[str]:
    """Every combination of two tastes of different axes, "left+vivid": 24."""
    pairs = itertools.combinations(AXES.values(), 2)
    return [f"{a}+{b}" for first, second in pairs for a, b in itertools.product(first, second)]


def seen_users() -> list[str]:
    """The users whose pairs are trained on."""
    return [user for user in all_users() if user not in HELD_OUT]


def score_of(user: str, found: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a user thinks of N pictures with these qualities, float64 (N,). Raises ValueError for an unknown user."""
    if user not in all_users():
        raise ValueError(f"user {user!r} is not one of {', '.join(all_users())}")
    return FOLLOW * found["follow"] + sum(WEIGHTS[axis_of(taste)] * found[taste] for taste in user.split("+"))


@dataclass(frozen=True)
class Candidates:
    """C base samples for each of N prompts, as they come out of JPEG."""

    prompts: list[str]
    images: Images  # uint8 (C, N, 64, 64, 3)
    encoded: list[list[bytes]]  # (C, N)
    found: list[dict[str, np.ndarray]]  # qualities of each (N,)

    @classmethod
    def sample(cls, model: str, num_prompts: int, num_candidates: int, num_processes: int, path: Path) -> Candidates:
        """Draw them, or read what an earlier call left at `path`."""
        prompts = draw_prompts("pairs", num_prompts).texts
        if not path.exists():
            seeds = [FIRST_SEED + 100_000 * k + i for k in range(num_candidates) for i in range(num_prompts)]
            drawn = sample_parallel(Sampler(model), prompts * num_candidates, seeds, num_processes)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, images=drawn.reshape(num_candidates, num_prompts, *drawn.shape[1:]))
        seen = [through_jpeg(images) for images in np.load(path)["images"]]
        found = [qualities(read(images), prompts) for images, _ in seen]
        return cls(prompts, np.stack([images for images, _ in seen]), [encoded for _, encoded in seen], found)

    def pairs_of(self, user: str) -> pa.Table:
        """Best and worst candidate of every prompt under the user's reward, labelled with noise; Pick-a-Pic v2 schema."""
        scores, rows = np.stack([score_of(user, found) for found in self.found]), np.arange(len(self.prompts))
        seed = 1000 + all_users().index(user)
        picked = widest(scores, seed)
        labels = judge(scores[picked[0], rows] - scores[picked[1], rows], AGREEMENT, 0.0, seed)
        jpg_0, jpg_1 = ([self.encoded[picked[k, i]][i] for i in rows] for k in (0, 1))
        table = pick_a_pic_table(self.prompts, jpg_0, jpg_1, labels.p0, seed, "testbed-base")
        column = table.column_names.index("user_id")
        return table.set_column(column, "user_id", pa.array([user] * len(rows)))


def write_user_pairs(candidates: Candidates, folder: Path) -> None:
    """<folder>/seen holds the pairs of all seen users, <folder>/<user> those of each user alone, as train.parquet; "seen" comes last."""
    tables = {user: candidates.pairs_of(user) for user in all_users()}
    parts = tables | {"seen": pa.concat_tables([tables[user] for user in seen_users()])}
    for name, table in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name / "train.parquet", compression="zstd")
