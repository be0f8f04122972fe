"""What a run learns beside its weights and what it draws when: curriculum, rarity, moving references, reliability of annotators."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffpref.data.loader import PairPixels
from diffpref.data.pairs import load_pairs
from diffpref.data.sampler import PairSampler, Stages
from diffpref.training.align import align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective
from diffpref.training.order import group_weights, new_sampler
from diffpref.training.run import prepare_run

Settings = dict[str, Any]
SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TRAJECTORY = {"num_steps": 2, "guidance_scale": 1.0, "beta": 100.0}
"""Two steps per pair: the backward pass of two ranks then has to average once, at the last one."""
EVERYTHING = {
    "method": "lcpo",
    "curriculum_stages": 2,
    "curriculum_steps": 2,
    "curriculum_score": "s",
    "rarity_score": "s",
    "rarity_bins": 4,
    "reference_update_steps": 2,
    "reference_decay": 0.5,
    "proportion_empty_prompts": 0.0,
}


@pytest.fixture(scope="module")
def scored_file(pair_columns: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 pairs with gaps 0, 1, ... 23 by the scorer s, and two annotators."""
    count = len(pair_columns["caption"])
    columns = pair_columns | {"s_0": [float(i) for i in range(count)], "s_1": [0.0] * count}
    columns |= {"flat_0": [1.0] * count, "flat_1": [1.0] * count, "user_id": [["ann", "bob"][i % 2] for i in range(count)]}
    path = tmp_path_factory.mktemp("scored") / "train.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def pixels_of(path: Path, **settings: Any) -> PairPixels:
    return PairPixels(load_pairs(path), 32, **settings)


def test_a_stage_draws_its_members_and_no_draw_comes_twice() -> None:
    sampler = PairSampler(9, 5, stages=Stages([np.array([1, 2]), np.array([1, 2, 4, 7]), np.arange(9)], 3))
    layout = {"batch_size": 2, "accumulation": 1, "world_size": 2}
    steps = [[item for rank in (0, 1) for item in sampler.micro_batch(step, 0, rank, **layout)] for step in range(12)]
    seen = [{index for items in steps[i : i + 3] for index, _ in items} for i in (0, 3, 6)]
    assert seen[0] == {1, 2}
    assert seen[1] == {1, 2, 4, 7}
    assert seen[2] == set(range(9))
    drawn = [item for items in steps for item in items]
    assert len(set(drawn)) == len(drawn)
    twice = {"batch_size": 2, "accumulation": 2, "world_size": 1}
    assert steps[7] == [item for micro in (0, 1) for item in sampler.micro_batch(7, micro, 0, **twice)]


def test_large_gaps_come_first(scored_file: Path) -> None:
    config = TrainConfig(train_data_dir=str(scored_file), curriculum_stages=4, curriculum_steps=5, curriculum_score="s")
    stages = new_sampler(config, pixels_of(scored_file))._stages
    assert stages is not None
    assert [len(members) for members in stages.members] == [6, 12, 18, 23]  # a gap of 0 is never drawn
    assert stages.members[0].tolist() == list(range(18, 24))


def test_gaps_in_rank_come_from_lists(pair_columns: dict[str, list[Any]]) -> None:
    table = {"prompt": ["p", "q"], "images": [pair_columns["jpg_0"][:3], pair_columns["jpg_1"][:3]], "ranks": [[1, 3, 2], [2, 1, 1]]}
    pixels = PairPixels(load_pairs(pa.table(table)), 32)
    stages = new_sampler(TrainConfig(train_data_dir="x", curriculum_stages=2), pixels)._stages
    assert stages is not None
    shown = [[pixels.pairs.table.picks[pixels.pairs.rows[i]].tolist() for i in members] for members in stages.members]  # type: ignore[index]
    assert shown[0] == [[[0, 0], [0, 1]], [[0, 0], [0, 2]], [[0, 1], [0, 2]], [[1, 0], [1, 1]], [[1, 0], [1, 2]]]
    two = new_sampler(TrainConfig(train_data_dir="x", curriculum_stages=1), pixels)._stages
    assert two is not None
    assert len(two.members[0]) == len(pixels)


def test_rare_gaps_weigh_more(scored_file: Path) -> None:
    pixels = pixels_of(scored_file)
    assert group_weights(TrainConfig(train_data_dir="x"), pixels) is None
    weights = group_weights(TrainConfig(train_data_dir="x", rarity_score="s", rarity_bins=2), pixels)
    assert weights is not None
    np.testing.assert_allclose(weights, 1)  # both halves hold the same number
    shares = np.array([5 / 24] * 5 + [5 / 24] * 5 + [14 / 24] * 14)
    assert weights.dtype == np.float32
    table = pq.read_table(scored_file).to_pydict() | {"s_0": [0.0] * 5 + [5.0] * 5 + [10.0] * 14}
    skewed = PairPixels(load_pairs(pa.table(table)), 32)
    found = group_weights(TrainConfig(train_data_dir="x", rarity_score="s", rarity_bins=3, rarity_exponent=2), skewed)
    assert found is not None
    np.testing.assert_allclose(found, (shares.mean() / shares) ** 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"curriculum_stages": 2}, "no ranked lists to take gaps from; add curriculum_score"),
        ({"curriculum_stages": 2, "curriculum_score": "t"}, "curriculum_score is 't', but the data has s, flat"),
        ({"curriculum_stages": 2, "curriculum_score": "flat"}, "no pair has the gap of"),
        ({"curriculum_stages": 2, "num_train_epochs": 1}, "together with num_train_epochs 1"),
        ({"curriculum_steps": 3}, "which only curriculum_stages uses"),
        ({"rarity_score": "t"}, "rarity_score is 't', but the data has s, flat"),
        ({"rarity_bins": 3}, "which only rarity_score uses"),
        ({"reference_decay": 0.9}, "which only reference_update_steps uses"),
        ({"reference_update_steps": 3, "method": "mapo"}, "mapo has no reference"),
        ({"reference_update_steps": 0}, "reference_update_steps is 0; it must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings: Settings, said: str, base_settings: Settings, scored_file: Path, tmp_path: Path) -> None:
    given = base_settings | {"train_data_dir": str(scored_file), "output_dir": str(tmp_path / "run")} | settings
    with pytest.raises(ValueError, match=said):
        prepare_run(TrainConfig(**given), build_objective(given.get("method", "diffusion_dpo"), {}))


def state_of(folder: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    parts = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
    return {f"{p.stem}/{name}": x for p in parts for name, x in load_file(p).items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def go(base_settings: Settings, scored_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """go(folder, **settings) -> the folder of a finished run on the scored pairs."""

    def run(name: str, **settings: Any) -> Path:
        given = base_settings | {"train_data_dir": str(scored_file), "output_dir": str(tmp_path / name), "max_train_steps": 4} | settings
        way = given.pop("path", None)
        objective = build_objective(given.get("method", "diffusion_dpo"), TRAJECTORY if way else {"beta": 100.0}, way)
        return align(TrainConfig(**given), objective).folder

    return run


def test_everything_that_is_learned_resumes_bit_for_bit(go: Callable[..., Path]) -> None:
    whole = state_of(go("whole", **EVERYTHING), 4)
    go("parts", **EVERYTHING | {"max_train_steps": 3})
    parts = state_of(go("parts", **EVERYTHING, resume_from_checkpoint="latest"), 4)
    assert different(whole, parts) == []
    eta = whole["reliability/eta"]
    assert eta.shape == (2,)
    assert (eta != 0.9).all()
    moved = [name for name in whole if name.startswith("reference/") and not torch.equal(whole[name], whole[f"weights/{name[10:]}"])]
    assert moved, "a decay of one half is no copy"


def test_a_reference_that_is_copied_every_step_is_the_policy_before_it(go: Callable[..., Path], base_settings: Settings) -> None:
    folder = go("full", tune="full", learning_rate=1e-4, reference_update_steps=1, max_train_steps=2)
    found = state_of(folder, 2)
    pairs = [(x, found[f"reference/{name[8:]}"]) for name, x in found.items() if name.startswith("weights/")]
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx([np.log(2)] * 2, abs=1e-5)  # the reference has caught up at every step


def test_two_ranks_learn_what_one_does_on_whole_trajectories(
    go: Callable[..., Path], base_settings: Settings, scored_file: Path, tmp_path: Path
) -> None:
    one = state_of(go("one", **EVERYTHING, gradient_accumulation_steps=2, path="trajectory"), 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (
        base_settings
        | EVERYTHING
        | TRAJECTORY
        | {"train_data_dir": scored_file, "output_dir": tmp_path / "two", "max_train_steps": 4, "path": "trajectory"}
    )
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run([*launcher, str(SCRIPT), *words], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    two = state_of(tmp_path / "two", 4)
    assert one.keys() == two.keys()
    torch.testing.assert_close(two["reliability/eta"], one["reliability/eta"], rtol=1e-7, atol=0)
    moved = [name for name in one if name.startswith(("weights/", "reference/"))]
    assert max(float(one[name].abs().max()) for name in moved if "lora_B" in name) > 1e-2
    for name in moved:  # the steps of a pair are summed in another order, so that only rounding may differ
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
