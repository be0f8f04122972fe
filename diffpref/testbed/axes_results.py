"""`diffpref testbed axes`: MCDPO on qualities that contradict each other; can one model be asked for either end of each of them?

Trained on the pairs of the simulated users (users.py) without their names: what a pair says is in the signs of four differences alone.
Parts that are finished in `out` are not done again.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.evaluation.generate import Images, generate
from diffpref.evaluation.stats import paired_bootstrap
from diffpref.inference.user_pipelines import as_user_pipeline
from diffpref.locations import asset
from diffpref.models.backbone import load_pipeline
from diffpref.testbed.checker import read
from diffpref.testbed.measure import fingerprint, seeds_for
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.recipe import read_recipe
from diffpref.testbed.reward import qualities
from diffpref.testbed.sampling import BATCH, GUIDANCE, STEPS, Sampler
from diffpref.testbed.users import AXES, WEIGHTS, Candidates, write_user_pairs
from diffpref.testbed.users_results import train_once
from diffpref.training.settings import Settings

ENDS = {axis: tastes[0] for axis, tastes in AXES.items()}
"""The quality that stands for each axis: more of it is its first taste, less its second."""


@dataclass(frozen=True, kw_only=True)
class AxesConfig:
    """Settings of `diffpref testbed axes`."""

    out: str = "outputs/testbed/users"
    """Folder of the users' pairs, of the run and of axes.json; that of `diffpref testbed users` saves sampling them again."""
    pair_prompts: int = 600
    """Prompts of the pairs."""
    candidates: int = 8
    """Base samples per prompt, of which each user's best and worst make the pair."""
    max_train_steps: int | None = None
    """Steps of the training; the recipe's when not given."""
    num_prompts: int = 120
    """Test prompts that every end of every axis is drawn for."""
    processes: int = 2
    """Processes that sample the pairs."""


def run_axes(config: AxesConfig) -> None:
    """Pairs, training, pictures, numbers: axes.json."""
    out, model = Path(config.out), str(asset("testbed", "pipeline"))
    if not (out / "pairs" / "seen").exists():
        made = Candidates.sample(model, config.pair_prompts, config.candidates, config.processes, out / "candidates.npz")
        write_user_pairs(made, out / "pairs")
    data = out / "pairs" / "axes"
    if not data.exists():
        table = with_axes(pq.read_table(out / "pairs" / "seen" / "train.parquet"))
        data.mkdir()
        pq.write_table(table, data / "train.parquet", compression="zstd")
    settings = settings_of(config)
    train_once(settings, data, out / "mcdpo")
    texts, seeds = draw_prompts("test", config.num_prompts).texts, seeds_for(config.num_prompts)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "model": fingerprint(asset("testbed", "pipeline")),
        "settings": settings,
        "num_prompts": config.num_prompts,
        "axes": measure_axes(out / "mcdpo", texts, seeds),
    }
    (out / "axes.json").write_text(json.dumps(result, indent=1))
    print(axes_table(result))


def with_axes(table: pa.Table) -> pa.Table:
    """Pairs of the testbed with what each picture has of every axis, read from its pixels: columns <quality>_0 and <quality>_1."""
    prompts = table.column("caption").to_pylist()
    for k in (0, 1):
        pictures = np.stack([np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in table.column(f"jpg_{k}").to_pylist()])
        found = qualities(read(pictures), prompts)
        for name in ENDS.values():
            table = table.append_column(f"{name}_{k}", pa.array(found[name].astype(np.float64)))
    return table


def settings_of(config: AxesConfig) -> Settings:
    """The recipe with what this command changes; without places on this machine."""
    recipe = read_recipe("mcdpo") | {"seed": 0, "held_out_pairs": 0, "validation_steps": None, "merge_lora": False, "split": "train"}
    recipe |= {"max_train_steps": config.max_train_steps} if config.max_train_steps else {}
    for place in ("pretrained_model_name_or_path", "train_data_dir"):
        recipe.pop(place)
    return recipe


def measure_axes(folder: Path, texts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """For either end of every axis: change of all qualities from the base's, in standard deviations among base samples of a prompt."""
    base_pipeline = load_pipeline(str(asset("testbed", "pipeline")))
    pipeline: Any = as_user_pipeline(base_pipeline, folder)
    pipeline.set_progress_bar_config(disable=True)

    def found(images: Images) -> dict[str, np.ndarray]:
        return qualities(read(images), list(texts))

    base = found(Sampler(str(asset("testbed", "pipeline")))(texts, seeds))
    rows: dict[str, Any] = {}
    for axis, name in ENDS.items():
        ends = {}
        for sign in "+-":
            pipeline.set_user(f"{sign}{name}")
            ends[sign] = found(generate(pipeline, texts, seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE, batch_size=BATCH))
        mean, low, high = paired_bootstrap(WEIGHTS[axis] * (ends["+"][name] - ends["-"][name]))
        rows[name] = {"between_ends": {"mean": mean, "low": low, "high": high}} | {
            sign: {other: float(WEIGHTS[a] * (end[other] - base[other]).mean()) for a, other in ENDS.items()}
            | {"follow": float((end["follow"] - base["follow"]).mean())}
            for sign, end in ends.items()
        }
    return rows


def axes_table(result: dict[str, Any]) -> str:
    """The numbers for people."""
    names = list(ENDS.values())
    lines = [f"| asked for | {' | '.join(names)} | following |", "|---" * (len(names) + 2) + "|"]
    for name, row in result["axes"].items():
        for sign in "+-":
            lines.append(f"| {sign}{name} | {' | '.join(f'{row[sign][x]:+.2f}' for x in names)} | {row[sign]['follow']:+.3f} |")
    apart = (
        f"{name} {x['mean']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for name, row in result["axes"].items() for x in [row["between_ends"]]
    )
    return "\n".join([*lines, "between the ends: " + ", ".join(apart)])
