"""Settings of training runs on the testbed: its recipes, its model, its pairs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from diffpref.data.prompts import PromptSet
from diffpref.locations import asset, config_file
from diffpref.scorers.weights import sha256
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.sampling import GUIDANCE, STEPS
from diffpref.training.config import TrainConfig
from diffpref.training.objective import all_names
from diffpref.training.settings import Settings, build, names_of, read_yaml

TESTBED_EVALUATION: Settings = {"scorers": ["testbed"], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
"""How models of the testbed are evaluated when nothing else is said."""


def evaluation_prompts(count: int | None) -> PromptSet:
    """The first test prompts of the testbed, 200 when not given."""
    return PromptSet("testbed test prompts", texts := draw_prompts("test", count or 200).texts, [""] * len(texts), [])


def read_recipe(name: str) -> Settings:
    """The settings of configs/testbed/<name>.yaml, those of the method among them, with the testbed's model and pairs.

    A method that samples its own pairs gets the testbed's prompts for training instead.
    """
    found = read_yaml(config_file("testbed", f"{name}.yaml"), [*names_of(TrainConfig), *all_names()])
    found["pretrained_model_name_or_path"] = str(asset("testbed", "pipeline"))
    if "step_scorer" not in found:
        return found | {"train_data_dir": str(asset("testbed", "pairs"))}
    return found | {"prompt_set": str(asset("prompts", "testbed.txt"))}


def scored_pairs() -> Path:
    """Folder with the shipped pairs and the scores of the testbed's own reward model, made at the first call; for SmPO and ODPO."""
    from diffpref.testbed.labellings import with_scores

    folder = Path("outputs", "testbed", "scored")
    path = folder / f"own-{sha256(asset('testbed', 'scorer', 'model.safetensors'))[:8]}.parquet"
    if not path.exists():
        print("scoring the testbed's pairs with its own reward model, once", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        hidden = path.with_suffix(f".{os.getpid()}")
        pq.write_table(with_scores(pq.read_table(asset("testbed", "pairs", "own.parquet"))), hidden, compression="zstd")
        hidden.replace(path)
    return folder


def recipe_config(recipe: str = "diffusion_dpo", **changes: Any) -> TrainConfig:
    """The run settings of a recipe without the method's own, for a loss of one's own: `align(recipe_config(), MyLoss())`.

    `changes` are fields of TrainConfig. Raises ValueError for a recipe that is not there and for values that cannot be.
    """
    names = names_of(TrainConfig)
    settings = {name: value for name, value in read_recipe(recipe).items() if name in names}
    return build(TrainConfig, settings | changes)
