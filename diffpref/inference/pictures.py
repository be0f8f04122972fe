"""Pictures of several models from the same prompts, seeds and starting latents, and their scores, kept as they are made."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from diffusers import DiffusionPipeline
from PIL import Image

from diffpref.evaluation.generate import Drawing, generate
from diffpref.evaluation.pictures import STATISTICS, Measured, thumbnail
from diffpref.evaluation.scoring import Score, score_pictures
from diffpref.evaluation.work import missing_shards, shard_path, write_bytes, write_table

CHUNK = 32
"""Prompts whose scores are stored together."""

_PNG_END = b"IEND\xaeB`\x82"


def picture_path(folder: Path, model: str, prompt: int, picture: int) -> Path:
    """<folder>/pictures/<model>/00012-0.png."""
    return folder / "pictures" / model / f"{prompt:05d}-{picture}.png"


def is_drawn(path: Path) -> bool:
    """Whether a picture is there to its last byte; a disk that lost power may hold less."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), io.SEEK_END)
            return file.read() == _PNG_END
    except OSError:  # not there, or shorter than that
        return False


def draw_missing(folder: Path, model: str, drawing: Drawing, load: Callable[[], DiffusionPipeline], rank: int = 0, world: int = 1) -> int:
    """Draw this rank's pictures that are not there yet; the model is loaded only if there are any. Returns their number."""
    seeds = drawing.seeds
    wanted = [(i, k) for i in range(rank, len(drawing.prompts), world) for k in range(drawing.pictures_per_prompt)]
    missing = [(i, k) for i, k in wanted if not is_drawn(picture_path(folder, model, i, k))]
    if not missing:
        return 0
    (folder / "pictures" / model).mkdir(parents=True, exist_ok=True)
    pipeline = load()
    for start in range(0, len(missing), drawing.batch_size):
        rows = missing[start : start + drawing.batch_size]
        images = generate(
            pipeline,
            [drawing.prompts[i] for i, _ in rows],
            [int(seeds[i, k]) for i, k in rows],
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            batch_size=drawing.batch_size,
            size=drawing.size,
        )
        for (i, k), image in zip(rows, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            write_bytes(picture_path(folder, model, i, k), buffer.getvalue())
    return len(missing)


def score_missing(folder: Path, model: str, drawing: Drawing, scorers: Mapping[str, Score], rank: int = 0, world: int = 1) -> int:
    """Score this rank's chunks that are not there yet: every picture is read once for all scorers. Returns their number.

    A picture that a scorer refuses has no score from it, and the reason in the column "problem".
    """
    place = folder / "scores"
    place.mkdir(parents=True, exist_ok=True)
    done = 0
    count = -(-len(drawing.prompts) // CHUNK)
    for number in missing_shards(place, model, count, rank, world):
        rows = range(number * CHUNK, min((number + 1) * CHUNK, len(drawing.prompts)))
        keys = [(i, k) for i in rows for k in range(drawing.pictures_per_prompt)]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_opened, [picture_path(folder, model, i, k) for i, k in keys]))
        scored = score_pictures(scorers, images, [drawing.prompts[i] for i, _ in keys])
        columns: dict[str, Any] = {"prompt": [i for i, _ in keys], "picture": [k for _, k in keys]}
        columns["problem"] = pa.array(scored.problems, pa.string())
        for name, values in scored.scores.items():
            columns[f"score/{name}"] = pa.array(values, pa.float64())
        arrays = [np.asarray(image) for image in images]
        for name, statistic in STATISTICS.items():
            columns[f"statistic/{name}"] = pa.array([statistic(image) for image in arrays], pa.float64())
        columns["thumbnail"] = pa.array([(thumbnail(image) * 255).round().astype(np.uint8).tobytes() for image in arrays], pa.binary())
        write_table(shard_path(place, model, number), pa.table(columns))
        done += 1
    return done


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"picture {path} cannot be read: {error}; delete it and run the command again, which draws it anew") from error


def read_measured(folder: Path, model: str, drawing: Drawing) -> Measured:
    """Put the chunks of a model together."""
    shape = (len(drawing.prompts), drawing.pictures_per_prompt)
    count = -(-shape[0] // CHUNK)
    table = pa.concat_tables([pq.read_table(shard_path(folder / "scores", model, n)) for n in range(count)])

    def column(name: str) -> np.ndarray:
        return table.column(name).to_numpy().reshape(shape)

    names = table.column_names
    small = np.stack([np.frombuffer(data or b"", np.uint8) for data in table.column("thumbnail").to_pylist()])
    side = int((small.shape[1] / 3) ** 0.5)
    return Measured(
        {n.removeprefix("score/"): column(n) for n in names if n.startswith("score/")},
        {n.removeprefix("statistic/"): column(n) for n in names if n.startswith("statistic/")},
        small.reshape(*shape, side, side, 3).astype(np.float32) / 255,
        {divmod(n, shape[1]): text for n, text in enumerate(table.column("problem").to_pylist()) if text},
    )
