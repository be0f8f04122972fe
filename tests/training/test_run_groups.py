"""Runs on what is no pair: lists, single pictures, two captions of one picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffpref.training.align import align
from diffpref.training.cache_command import build_cache
from diffpref.training.cache_config import CacheConfig
from diffpref.training.config import TrainConfig
from diffpref.training.objective import build_objective
from diffpref.training.run import Run, prepare_run

Settings = dict[str, Any]
EDITS = {"caption_edits": ("red green", "circle square"), "proportion_empty_prompts": 0.0}


@pytest.fixture
def lists_file(pair_columns: dict[str, list[Any]], tmp_path: Path) -> Path:
    """Eight lists of three pictures, of one rank order each."""
    pictures = [*pair_columns["jpg_0"], *pair_columns["jpg_1"]]
    table = {
        "prompt": [f"a red circle, list {i}" for i in range(8)],
        "images": [pictures[3 * i : 3 * i + 3] for i in range(8)],
        "ranks": [[1 + (i + k) % 3 for k in range(3)] for i in range(8)],
    }
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture
def prepared(base_settings: Settings, tmp_path: Path) -> Callable[..., Run]:
    """prepared(recipe, **settings) -> a run before its first step."""

    def make(recipe: str, **settings: Any) -> Run:
        config = TrainConfig(**base_settings | {"method": recipe, "output_dir": str(tmp_path / "run")} | settings)
        return prepare_run(config, build_objective(recipe, {"beta": 100.0}))

    return make


@pytest.mark.parametrize("recipe", ["rank_dpo", "diffusion_kto", "tdpo"])
def test_groups_from_a_cache_on_disk_are_those_of_the_data(
    recipe: str, lists_file: Path, prepared: Callable[..., Run], pairs_file: Path, tmp_path: Path
) -> None:
    own: Settings = {"train_data_dir": str(lists_file if recipe == "rank_dpo" else pairs_file)} | (EDITS if recipe == "tdpo" else {})
    fresh = prepared(recipe, **own, label_noise_prob=0.5, flip_mode="independent", output_dir=str(tmp_path / "fresh"))
    cached = dataclasses.replace(fresh.config, latent_cache=str(tmp_path / "cache"))
    if recipe != "tdpo":  # which shows only the better picture of a pair
        cached = dataclasses.replace(cached, label_noise_prob=0.0)
    build_cache(cached, CacheConfig(), fresh.objective.groups)
    stored = prepared(recipe, **own, label_noise_prob=0.5, flip_mode="independent", latent_cache=cached.latent_cache)
    for _ in range(3):
        a, b = next(fresh.source), next(stored.source)
        assert (a.pair_ids, a.visits) == (b.pair_ids, b.visits)
        for x, y in ((a.latents, b.latents), (a.relevance, b.relevance), (a.cond.prompt_embeds, b.cond.prompt_embeds)):
            assert x is not None
            assert y is not None
            assert torch.equal(x, y)
    fresh.log.close()
    stored.log.close()


@pytest.mark.parametrize("recipe", ["rank_dpo", "list_mle"])
def test_lists_train_alike_from_disk_and_from_kept_latents_and_resume(
    recipe: str, lists_file: Path, base_settings: Settings, tmp_path: Path, read_state: Callable[[Path, int], dict[str, torch.Tensor]]
) -> None:
    def go(name: str, steps: int = 4, **more: Any) -> Path:
        own = {"train_data_dir": str(lists_file), "max_train_steps": steps, "output_dir": str(tmp_path / name), "method": recipe}
        return align(TrainConfig(**base_settings | own | more), build_objective(recipe, {"beta": 100.0})).folder

    whole = read_state(go("disk"), 4)
    assert any("lora_B" in name and bool(x.any()) for name, x in whole.items())
    kept = read_state(go("kept", cache_latents=True), 4)
    go("parts", 2, held_out_pairs=0)
    parts = read_state(go("parts", resume_from_checkpoint="latest"), 4)
    for other in (kept, parts):
        assert [name for name in whole if not torch.equal(whole[name], other[name])] == []


def test_a_list_is_one_group_with_its_relevance(lists_file: Path, prepared: Callable[..., Run]) -> None:
    run = prepared("lipo", train_data_dir=str(lists_file), label_noise_prob=1.0)
    batch = next(run.source)
    run.log.close()
    assert batch.latents.shape[:2] == (2, 3)
    assert batch.relevance.tolist() == [[1, 0.5, 0]] * 2


def test_single_pictures_are_drawn_in_proportion(prepared: Callable[..., Run]) -> None:
    run = prepared("diffusion_kto", train_batch_size=4, desirable_share=0.75)
    for _ in range(3):
        batch = next(run.source)
        assert batch.latents.shape[:2] == (4, 1)
        assert sorted(batch.relevance[:, 0].tolist()) == [0, 1, 1, 1]
    run.log.close()


def test_one_picture_under_two_captions_is_encoded_once(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared("tdpo", held_out_pairs=4, validation_steps=6, **EDITS)
    batch = next(run.source)
    assert batch.latents.shape[:2] == (2, 2)
    assert torch.equal(batch.latents[:, 0], batch.latents[:, 1])
    words = batch.cond.prompt_embeds
    assert words is not None
    assert not torch.equal(words[:, 0], words[:, 1])
    assert run.validation is not None
    assert run.validation.accuracy is not None
    assert run.validation.accuracy()["eval/implicit_accuracy"] == 0.5  # an untouched policy
    run.log.close()


def test_equal_captions_are_diffusion_dpo_bit_for_bit(
    base_settings: Settings, pair_columns: dict[str, list[Any]], tmp_path: Path, read_state: Callable[[Path, int], dict[str, torch.Tensor]]
) -> None:
    columns = pair_columns | {"caption_0": pair_columns["caption"], "caption_1": pair_columns["caption"]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    states = []
    for recipe in ("diffusion_dpo", "dcpo"):
        own = {"train_data_dir": str(tmp_path / "train.parquet"), "max_train_steps": 2, "output_dir": str(tmp_path / recipe)}
        folder = align(TrainConfig(**base_settings | own), build_objective(recipe, {"beta": 100.0})).folder
        states.append(read_state(folder, 2))
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("diffusion_dpo", {"desirable_share": 0.5}, "draws no single pictures"),
        ("diffusion_dpo", {"list_size": 3}, "groups of kind pairs"),
        ("diffusion_dpo", {"caption_edits": ("red green",)}, "takes one caption per pair"),
        ("tdpo", {"proportion_empty_prompts": 0.0}, "no column caption_negative; add it"),
        ("tdpo", EDITS | {"proportion_empty_prompts": 0.2}, "under the empty prompt there is nothing to compare"),
        ("diffusion_kto", {"train_batch_size": 1}, "holds 1 image over all processes; raise train_batch_size"),
    ],
)
def test_what_does_not_fit_is_named(recipe: str, settings: Settings, said: str, prepared: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match=said):
        prepared(recipe, **settings)
