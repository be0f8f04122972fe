"""A CLIP of a few thousand parameters, pairs whose brighter picture is preferred, and runs on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.reward_loop import fit
from diffpref.training.reward_run import RewardRun, prepare

TEXTS = ("a red circle", "a blue ring", "a green cross")

Settings = dict[str, Any]


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a CLIP of a few thousand parameters for pictures of 16 pixels."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **ids, **tower}
    config = {"projection_dim": 8, "text_config": text, "vision_config": {"image_size": 16, "patch_size": 8, **tower}}
    (folder / "config.json").write_text(json.dumps(config))
    return {"clip_config": str(folder / "config.json"), "tokenizer_name": str(folder / "tokenizer")}


def grey(level: int, seed: int) -> bytes:
    """A PNG of 26 x 20 pixels around one grey level."""
    import io

    noise = np.random.default_rng(seed).integers(-90, 91, (20, 26, 3))
    buffer = io.BytesIO()
    Image.fromarray((level + noise).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pairs whose brighter picture is preferred; the prompts have 3, 1 and 2 of every 6 pairs, and every fifth pair is a tie."""
    rows = range(36)
    prompts = [TEXTS[(0, 0, 0, 1, 2, 2)[row % 6]] + ("" if row < 18 else f" {row // 9}") for row in rows]
    p0 = [0.5 if row % 5 == 4 else float(row % 2) for row in rows]
    levels = [(135, 115) if p == 1 else (115, 135) if p == 0 else (125, 125) for p in p0]
    columns = {
        "caption": prompts,
        "jpg_0": [grey(a, 2 * row) for row, (a, _) in zip(rows, levels, strict=True)],
        "jpg_1": [grey(b, 2 * row + 1) for row, (_, b) in zip(rows, levels, strict=True)],
        "label_0": p0,
        "label_1": [1 - p for p in p0],
    }
    path = tmp_path_factory.mktemp("brightness") / "train.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def base(tiny_clip: Settings, brightness: Path, table_cache: Path) -> Settings:
    """Settings of a run of six updates of four pairs."""
    return {
        **tiny_clip,
        "train_data_dir": str(brightness),
        "cache_dir": str(table_cache),
        "check_images": False,
        "held_out_pairs": 6,
        "max_train_steps": 6,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "lr_warmup_steps": 2,
        "validation_steps": 2,
        "checkpointing_steps": 3,
        "checkpoints_total_limit": None,
        "dataloader_num_workers": 2,
    }


@pytest.fixture
def start(base: Settings, tmp_path: Path) -> Iterator[Callable[..., RewardRun]]:
    """start(folder name, **settings) -> a run that is ready; its files are closed at the end of the test."""
    opened: list[RewardRun] = []

    def make(name: str, **settings: Any) -> RewardRun:
        opened.append(prepare(RewardModelConfig(**base | {"output_dir": str(tmp_path / name)} | settings)))
        return opened[-1]

    yield make
    for run in opened:
        run.log.close()


@pytest.fixture
def go(base: Settings, tmp_path: Path) -> Callable[..., Path]:
    """go(folder name, **settings) -> the folder of a finished run."""

    def run(name: str, **settings: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the precision of the run before
        GradientState._reset_state()
        return fit(RewardModelConfig(**base | {"output_dir": str(tmp_path / name)} | settings)).folder

    return run
