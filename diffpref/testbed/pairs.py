"""Preference pairs of the testbed: sampled, labelled by a noisy Bradley-Terry judge, stored in the Pick-a-Pic v2 schema."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance, ImageFilter

from diffpref.core.random import uniform
from diffpref.evaluation.generate import Images
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.reward import reward
from diffpref.testbed.sampling import Sampler, sample_parallel

Regime = Literal["own", "mismatch", "noisy"]
REGIMES: dict[str, str] = {
    "own": "samples of the base model itself, 90 % of the labels agree with the true reward",
    "mismatch": "samples of a worse generator (4 steps, guidance 1.5) in another style (muted, soft), 90 % agreement",
    "noisy": "samples of the base model, 12 % ties, 60 % of the other labels agree with the true reward",
}
AGREEMENT = {"own": 0.90, "mismatch": 0.90, "noisy": 0.60}
TIES = {"own": 0.0, "mismatch": 0.0, "noisy": 0.12}
JPEG_QUALITY = 92
NUM_USERS = 12
CANDIDATES = 4
"""Samples per prompt; the best and the worst of them, by the true reward, make the pair that is then labelled."""


@dataclass(frozen=True)
class Labels:
    """Labels of N pairs."""

    p0: np.ndarray  # (N,) 1, 0, or 0.5 for a tie
    temperature: float  # of the judge

    def agreement(self, difference: np.ndarray) -> float:
        """Share of the labels, without ties, that agree with the sign of the true reward difference (N,), image 0 minus 1."""
        decided = self.p0 != 0.5
        return float((np.sign(difference[decided]) == np.sign(self.p0[decided] - 0.5)).mean())


def judge(difference: np.ndarray, agreement: float, tie_share: float, seed: int) -> Labels:
    """Bradley-Terry labels: P(image 0 wins) = sigmoid(difference / temperature), ties where the difference is least.

    The temperature is the one at which `agreement` of the labels is expected to follow the sign of `difference` (N,).
    """
    tied = np.argsort(np.abs(difference), kind="stable")[: round(tie_share * len(difference))]
    decided = np.setdiff1d(np.arange(len(difference)), tied)
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = np.sqrt(low * high)
        expected = (1 / (1 + np.exp(-np.abs(difference[decided]) / middle))).mean()
        low, high = (middle, high) if expected > agreement else (low, middle)
    chance = 1 / (1 + np.exp(-difference / low))
    draws = np.array([uniform(seed, "judge", i) for i in range(len(difference))])
    p0 = (draws < chance).astype(float)
    p0[tied] = 0.5
    return Labels(p0, float(low))


def sample_regime(regime: str, model: str, prompts: list[str], seed: int, num_processes: int) -> list[Images]:
    """The candidates of each prompt, uint8 (N, 64, 64, 3) each."""
    sampler = Sampler(model, steps=4, guidance=1.5) if regime == "mismatch" else Sampler(model)
    first = 1_000_000 * (seed + 1)
    seeds = list(range(first, first + CANDIDATES * len(prompts)))
    images = sample_parallel(sampler, prompts * CANDIDATES, seeds, num_processes)
    if regime == "mismatch":
        images = np.stack([restyle(image) for image in images])
    return list(images.reshape(CANDIDATES, len(prompts), *images.shape[1:]))


def widest(scores: np.ndarray, seed: int) -> np.ndarray:
    """Which two of each prompt's candidates make the pair: best and worst of scores (C, N), in random order. (2, N)"""
    picked = np.stack([scores.argmax(0), scores.argmin(0)])
    swap = np.array([uniform(seed, "order_of_pair", i) < 0.5 for i in range(scores.shape[1])])
    return np.where(swap, picked[::-1], picked)


def restyle(image: np.ndarray) -> np.ndarray:
    """The style of the other generator: half the saturation and soft outlines. uint8 (64, 64, 3)."""
    muted = ImageEnhance.Color(Image.fromarray(image)).enhance(0.5)
    return np.asarray(muted.filter(ImageFilter.GaussianBlur(0.8)))


def rank_all(scores: np.ndarray, temperature: float, tie_width: float, seed: int) -> np.ndarray:
    """Ranks (C, N) of each prompt's candidates by the same judge, 1 is best: scores (C, N) plus Gumbel noise of `temperature`.

    That is a Plackett-Luce ranking: any two candidates are ordered as `judge` orders a pair. Neighbours in the order whose true
    scores differ by at most `tie_width` share a rank; 0 for no ties.
    """
    draws = np.array([[uniform(seed, "list_judge", i, k) for i in range(scores.shape[1])] for k in range(len(scores))])
    seen = scores - temperature * np.log(-np.log(np.clip(draws, 1e-12, 1 - 1e-12)))
    order = np.argsort(-seen, axis=0, kind="stable")
    gaps = np.abs(np.diff(np.take_along_axis(scores, order, 0), axis=0))
    is_new = np.concatenate([np.ones((1, scores.shape[1]), bool), (gaps > tie_width) | (tie_width == 0)])
    ranks = np.empty(scores.shape, dtype=np.int64)
    np.put_along_axis(ranks, order, np.cumsum(is_new, 0), 0)
    return ranks


def make_pairs(regime: str, model: str, num_pairs: int, seed: int, num_processes: int, out: Path) -> dict[str, float]:
    """Sample, label and write `out`/<regime>.parquet and `out`/<regime>_lists.parquet; returns what the pairs are like.

    The second file holds all candidates of each prompt with their ranks by the same judge.
    """
    prompts = draw_prompts("pairs", num_pairs).texts
    candidates = [through_jpeg(images) for images in sample_regime(regime, model, prompts, seed, num_processes)]
    scores = np.stack([reward(images, prompts) for images, _ in candidates])
    picked, rows = widest(scores, seed), range(num_pairs)
    encoded_0, encoded_1 = ([candidates[picked[k, i]][1][i] for i in rows] for k in (0, 1))
    difference = scores[picked[0], rows] - scores[picked[1], rows]
    labels = judge(difference, AGREEMENT[regime], TIES[regime], seed)
    out.mkdir(parents=True, exist_ok=True)
    model_name = "testbed-base" if regime != "mismatch" else "testbed-base-4-steps-restyled"
    table = pick_a_pic_table(prompts, encoded_0, encoded_1, labels.p0, seed, model_name)
    pq.write_table(table, out / f"{regime}.parquet", compression="zstd")
    tied = np.abs(difference[labels.p0 == 0.5])
    ranks = rank_all(scores, labels.temperature, float(tied.max()) if len(tied) else 0.0, seed)
    lists = ranked_table(prompts, [data for _, data in candidates], ranks, seed, model_name)
    pq.write_table(lists, out / f"{regime}_lists.parquet", compression="zstd")
    return {
        "pairs": float(num_pairs),
        "ties": float((labels.p0 == 0.5).sum()),
        "agreement": labels.agreement(difference),
        "temperature": labels.temperature,
        "mean_absolute_difference": float(np.abs(difference).mean()),
    }


def through_jpeg(images: Images) -> tuple[Images, list[bytes]]:
    """(what training will see, JPEG bytes) of pictures."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        encoded.append(buffer.getvalue())
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in encoded]), encoded


def ranked_table(prompts: list[str], encoded: list[list[bytes]], ranks: np.ndarray, seed: int, model: str) -> pa.Table:
    """Ranked lists: a row per prompt with its pictures, encoded (C of N), and their ranks (C, N)."""
    rows = range(len(prompts))
    return pa.table(
        {
            "prompt": prompts,
            "images": pa.array([[data[i] for data in encoded] for i in rows], pa.list_(pa.binary())),
            "ranks": pa.array(ranks.T.tolist(), pa.list_(pa.int64())),
            "models": pa.array([[model] * len(encoded) for _ in rows], pa.list_(pa.string())),
            "ranking_id": pa.array([f"tb{seed}-{i:05d}" for i in rows], pa.string()),
            "user_id": pa.array([int(uniform(seed, "user", i) * NUM_USERS) for i in rows], pa.int64()),
        }
    )


def pick_a_pic_table(prompts: list[str], encoded_0: list[bytes], encoded_1: list[bytes], p0: np.ndarray, seed: int, model: str) -> pa.Table:
    """Rows in the Pick-a-Pic v2 schema; label_0 = 1 means that image 0 is preferred, 0.5 is a tie."""
    rows = range(len(prompts))
    uids = [[f"tb{seed}-{i:05d}-{k}" for i in rows] for k in (0, 1)]
    best = [uids[0][i] if p > 0.5 else uids[1][i] if p < 0.5 else "tie" for i, p in enumerate(p0)]
    return pa.table(
        {
            "are_different": [True for _ in rows],
            "best_image_uid": best,
            "caption": prompts,
            "created_at": ["2026-11-21T00:00:00" for _ in rows],
            "has_label": [True for _ in rows],
            "image_0_uid": uids[0],
            "image_0_url": ["" for _ in rows],
            "image_1_uid": uids[1],
            "image_1_url": ["" for _ in rows],
            "jpg_0": pa.array(encoded_0, pa.binary()),
            "jpg_1": pa.array(encoded_1, pa.binary()),
            "label_0": pa.array(p0, pa.float64()),
            "label_1": pa.array(1 - p0, pa.float64()),
            "model_0": [model for _ in rows],
            "model_1": [model for _ in rows],
            "ranking_id": pa.array(list(rows), pa.int64()),
            "user_id": pa.array([int(uniform(seed, "user", i) * NUM_USERS) for i in rows], pa.int64()),
            "num_example_per_prompt": pa.array([1 for _ in rows], pa.int64()),
            "__index_level_0__": pa.array(list(rows), pa.int64()),
        }
    )
