"""The leaderboard: its protocol, its controls, its choice of settings, its tables, and one run of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from diffpref.locations import asset, config_file
from diffpref.methods.recipes import RECIPES
from diffpref.models.backbone import load_pipeline
from diffpref.testbed import leaderboard
from diffpref.testbed.cost import counted_evaluations, update_cost
from diffpref.testbed.labellings import relabelled
from diffpref.testbed.leaderboard import LeaderboardConfig, Work, choose, do_run, is_done, prepared, run_leaderboard, with_latents
from diffpref.testbed.protocol import Protocol, Run, load_protocol
from diffpref.testbed.standings import FINDINGS, spearman, write_standings
from diffpref.testbed.stored_runs import Results
from diffpref.training.align import align

PROMPTS = 6


def small_protocol(*methods: str, **changes: Any) -> Protocol:
    """The shipped protocol for some of its methods, at a size for tests."""
    loaded = yaml.safe_load(config_file("testbed", "leaderboard.yaml").read_text())
    loaded |= {"updates": 4, "seeds": [0, 1], "control_seeds": [0], "test_prompts": PROMPTS, "choice_prompts": PROMPTS} | changes
    for part in ("methods", "variants"):
        loaded[part] = {name: entry for name, entry in loaded[part].items() if name in methods}
    loaded["findings"] = [further for further in loaded["findings"] if further["method"] in methods]
    return load_protocol(yaml.safe_dump(loaded))


def test_the_shipped_protocol_gives_every_method_the_same() -> None:
    protocol = load_protocol()
    assert {len(entry.grid) for entry in protocol.entries.values()} == {protocol.grid_size}
    assert protocol.grid_size <= 9
    assert set(protocol.entries) <= set(RECIPES)
    assert len(protocol.seeds) >= 3
    assert protocol.test_prompts >= 500  # what a claim about a win rate needs
    assert protocol.choice_seed not in protocol.seeds
    groups = {method: protocol.entries[method].pictures_per_group for method in ("diffusion_dpo", "rank_dpo", "diffusion_kto", "tkto")}
    assert groups == {"diffusion_dpo": 2, "rank_dpo": 4, "diffusion_kto": 1, "tkto": 2}
    names = [run.name for method in protocol.entries for run in [*protocol.choices(method), *protocol.runs(method, True)]]
    assert len(names) == len(set(names))
    rows = {(run.regime, run.labels) for run in protocol.runs("diffusion_dpo", True)}
    assert rows >= {("own", "given"), ("own", "shuffled"), ("own", "inverted"), ("noisy", "given"), ("mismatch", "given")}


@pytest.mark.parametrize("method", load_protocol().entries)
def test_every_setting_of_a_grid_is_a_setting_of_the_method(method: str, tmp_path: Path) -> None:
    protocol = load_protocol()
    for setting in protocol.entries[method].grid:
        work = work_of(protocol, protocol.choices(method)[0], tmp_path, setting)
        config, objective = prepared(work, tmp_path / "run", 5)
        assert config.learning_rate == setting["learning_rate"]
        for name in setting.keys() - {"learning_rate"}:
            assert getattr(objective.method, name) == setting[name]
        for name, value in protocol.entries[method].settings.items():
            found = [getattr(part, name, None) for part in (config, *objective.parts)]
            assert value in [list(x) if isinstance(x, tuple) else x for x in found]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_size": 5}, "4 settings in its grid; the protocol gives every method 5"),
        ({"findings": [{"method": "sft", "regime": "own", "labels": "reversed", "budget": "pairs"}]}, "labels of a finding is 'reversed'"),
        ({"findings": [{"method": "sft", "regime": "other", "labels": "given", "budget": "pairs"}]}, "regime of a finding is 'other'"),
    ],
)
def test_a_protocol_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    loaded = yaml.safe_load(config_file("testbed", "leaderboard.yaml").read_text())
    with pytest.raises(ValueError, match=message):
        load_protocol(yaml.safe_dump(loaded | changes))


def test_equal_time_gives_a_dearer_method_fewer_updates() -> None:
    protocol = small_protocol("inpo", updates=100)
    run = next(run for run in protocol.runs("inpo", True) if run.budget == "time")
    assert protocol.updates_of(run, 2.5) == 40
    assert not [run for run in protocol.runs("inpo", False) if run.budget == "time"]


def pairs_table(rows: int = 40) -> pa.Table:
    scores = np.arange(2 * rows, dtype=float).reshape(rows, 2)[:, ::-1].copy()  # image 0 has the higher score
    return pa.table(
        {
            "caption": [f"scene {i}" for i in range(rows)],
            "jpg_0": [f"{i} first".encode() for i in range(rows)],
            "jpg_1": [f"{i} second".encode() for i in range(rows)],
            "label_0": pa.array([0.0] * rows),
            "label_1": pa.array([1.0] * rows),
            **{f"testbed_pickscore_{k}": pa.array(scores[:, k]) for k in (0, 1)},
        }
    )


def test_controls_exchange_pictures_and_nothing_else() -> None:
    table = pairs_table()
    inverted, shuffled = relabelled(table, "inverted"), relabelled(table, "shuffled")
    assert inverted.column("jpg_0").to_pylist() == table.column("jpg_1").to_pylist()
    moved = np.array(shuffled.column("jpg_0").to_pylist()) != np.array(table.column("jpg_0").to_pylist())
    assert 8 < moved.sum() < 32  # a coin per row
    for changed in (inverted, shuffled):
        assert changed.drop_columns(["jpg_0", "jpg_1"]).equals(table.drop_columns(["jpg_0", "jpg_1"]))
        both = zip(changed.column("jpg_0").to_pylist(), changed.column("jpg_1").to_pylist(), strict=True)
        assert all({a.split()[0], b.split()[0]} == {str(i).encode()} for i, (a, b) in enumerate(both))
    assert relabelled(table, "given").equals(table)


def test_the_scorer_labels_by_the_higher_score() -> None:
    assert relabelled(pairs_table(), "scorer").column("label_0").to_pylist() == [1.0] * 40
    with pytest.raises(ValueError, match="labels are 'scorer'"):
        relabelled(pairs_table().drop_columns(["testbed_pickscore_0"]), "scorer")


def test_controls_of_lists_move_pictures_between_ranks() -> None:
    table = pa.table({"images": [[b"third", b"best", b"second"]] * 30, "ranks": [[3, 1, 2]] * 30})
    assert relabelled(table, "inverted").column("images").to_pylist() == [[b"best", b"third", b"second"]] * 30
    shuffled = relabelled(table, "shuffled").column("images").to_pylist()
    assert all(sorted(images) == [b"best", b"second", b"third"] for images in shuffled)
    assert len({tuple(images) for images in shuffled}) == 6
    assert relabelled(table, "shuffled").column("ranks").equals(table.column("ranks"))


def test_evaluations_of_an_update_are_counted() -> None:
    unet = load_pipeline(str(asset("testbed", "pipeline"))).unet
    cond = torch.zeros(2, 24, 96)
    added = {"text_embeds": torch.zeros(2, 64), "time_ids": torch.zeros(2, 6)}

    def train(updates: int) -> None:
        for _ in range(updates):
            unet(torch.zeros(2, 8, 8, 8), 5, cond, added_cond_kwargs=added)
            with torch.no_grad():
                for _ in range(3):
                    unet(torch.zeros(2, 8, 8, 8), 5, cond, added_cond_kwargs=added)

    with counted_evaluations() as counts:
        train(1)
    assert (counts.with_gradient, counts.without_gradient) == (2, 6)
    cost = update_cost(train, pictures_per_update=2)
    assert (cost["evaluations_with_gradient"], cost["evaluations_without_gradient"]) == (1, 3)
    assert cost["cpu_seconds_per_update"] > 0


def test_what_the_first_training_of_a_process_sets_up_is_no_cost_of_an_update() -> None:
    def spend(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    starts: list[int] = []

    def train(updates: int) -> None:
        spend(0.02 * updates + (0 if starts else 0.2))
        starts.append(updates)

    assert update_cost(train, pictures_per_update=2)["cpu_seconds_per_update"] == pytest.approx(0.02, rel=0.2)


def stored(folder: Path, run: Run, scores: np.ndarray, **more: Any) -> None:
    content = {
        "run": vars(run),
        "win_rate": float((scores > 0).mean()),
        "scores": scores.tolist(),
        "score_difference": float(scores.mean()),
        "following": dict.fromkeys(("colour", "background", "shape", "size", "all"), 1.0),
        "diversity": 1.0,
        "picture_change": 3.0,
        "held_out": {"implicit_accuracy": 0.8, "gain_chosen": 0.01, "gain_rejected": -0.01},
        **more,
    }
    (folder / f"{run.name}.json").write_text(json.dumps(content))


def base_file(folder: Path) -> None:
    part = {"scores": [0.0] * PROMPTS, "following": {"colour": 1.0, "background": 1.0}}
    (folder / "base.json").write_text(json.dumps({"model": "m", "test": part, "validation": part}))


def test_the_best_setting_that_keeps_colours_is_chosen(tmp_path: Path) -> None:
    protocol = small_protocol("diffusion_dpo")
    base_file(tmp_path)
    kept, lost = {"colour": 0.98, "background": 1.0}, {"colour": 1.0, "background": 0.9}
    for run, gain, following in zip(protocol.choices("diffusion_dpo"), (0.2, 0.5, 0.4, 0.9), (kept, kept, kept, lost), strict=True):
        stored(tmp_path, run, np.full(PROMPTS, gain), following=following)
    assert choose(tmp_path, "diffusion_dpo", protocol) == 1
    for run, background in zip(protocol.choices("diffusion_dpo"), (0.7, 0.8, 0.9, 0.6), strict=True):
        stored(tmp_path, run, np.full(PROMPTS, 1.0), following={"colour": 1.0, "background": background})
    assert choose(tmp_path, "diffusion_dpo", protocol) == 2  # none keeps them: the one that loses least


def test_tables_findings_and_picture_of_stored_runs(tmp_path: Path) -> None:
    protocol = small_protocol("diffusion_dpo", "sft", "diffusion_kto", "diffusion_sdpo")
    base_file(tmp_path)
    gains = {"diffusion_dpo": 1.0, "sft": -0.5, "diffusion_kto": 0.4, "diffusion_sdpo": 0.8}
    factor = {"given": 1.0, "shuffled": 0.05, "inverted": -1.0, "scorer": 0.9}
    for method, gain in gains.items():
        for run in protocol.runs(method, False):
            scores = gain * factor[run.labels] + 0.01 * np.arange(PROMPTS)
            proxy = {"base": 0.1, "aligned": {"pairs": 0.2, "times4": 0.3, "times12": 0.4}.get(run.budget, 0.0)}
            held_out = {"implicit_accuracy": 0.8, "gain_chosen": 0.02 if method == "diffusion_sdpo" else 0.01, "gain_rejected": -0.01}
            stored(tmp_path, run, scores - (0.5 if run.budget == "times12" else 0.0), proxy=proxy, held_out=held_out)
        cost = {"cpu_seconds_per_update": 1.0, "evaluations_with_gradient": 1.0, "evaluations_without_gradient": 1.0, "peak_memory_mb": 9.0}
        (tmp_path / f"{method}-cost.json").write_text(json.dumps(cost))
    write_standings(tmp_path, protocol)
    text = (tmp_path / "standings.md").read_text()
    order = [text.index(f"| `{method}` | 100.0 %") for method in ("diffusion_dpo", "diffusion_sdpo", "diffusion_kto")]
    assert order == sorted(order)
    assert "| `diffusion_dpo` | 2.0 + 2.0 | 0.0312 |" in text
    results = Results(tmp_path, protocol)
    shown = {finding.claim: found[1] > 0 for finding in FINDINGS if (found := finding.measure(results))}
    assert shown == {
        "SFT hurts when the base is better than the data": True,
        "SDPO lowers the winner's error": True,
        "random labels gain little": True,
        "training long against a proxy over-optimises": True,
        "KTO works from unpaired labels": True,
    }
    picture = np.asarray(Image.open(tmp_path / "standings.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def work_of(protocol: Protocol, run: Run, folder: Path, setting: dict[str, Any]) -> Work:
    settings = {**protocol.common, "train_batch_size": 4, **protocol.entries[run.method].settings, **setting}
    data, results = str(asset("testbed", "pairs")), str(folder / "results")
    return Work(run, settings, 2, data, str(folder), results, PROMPTS, PROMPTS, 30, 8, protocol.version)


def test_a_run_leaves_its_file_and_is_not_repeated(tmp_path: Path) -> None:
    few = {"max_train_samples": 30, "split": "own", "held_out_pairs": 8}
    protocol = small_protocol("diffusion_dpo", common=load_protocol().common | few)
    run = Run(method="diffusion_dpo", regime="own", labels="given", budget="pairs", seed=0)
    work = work_of(protocol, run, tmp_path, {"learning_rate": 1e-3, "beta": 200})
    Path(work.results).mkdir()
    assert not is_done(work)
    assert do_run(work).startswith("diffusion_dpo-own-given-pairs-0: win rate")
    found = json.loads((Path(work.results) / f"{run.name}.json").read_text())
    assert len(found["scores"]) == PROMPTS
    assert found["held_out"].keys() == {"implicit_accuracy", "gain_chosen", "gain_rejected"}
    assert found["picture_change"] > 0
    assert is_done(work)
    assert not (tmp_path / "runs" / run.name).exists()
    assert (tmp_path / "latents" / "pairs-pairs-4" / "index.safetensors").exists()  # for the next run on these rows
    other = work_of(protocol, run, tmp_path, {"learning_rate": 1e-3, "beta": 300})
    with pytest.raises(ValueError, match="was measured with"):
        is_done(other)


@pytest.mark.parametrize("method", ["rank_dpo", "tkto"])
def test_what_is_drawn_by_seed_is_encoded_for_that_seed(method: str, tmp_path: Path) -> None:
    """Held-out pairs are no rows of ranked lists, and edited captions are drawn."""
    pairs = pq.read_table(asset("testbed", "pairs") / "own.parquet").slice(0, 60)
    if method == "rank_dpo":
        first, second = pairs.column("jpg_0").to_pylist(), pairs.column("jpg_1").to_pylist()
        images = [[first[2 * i], second[2 * i], first[2 * i + 1], second[2 * i + 1]] for i in range(30)]
        lists = {"images": images, "ranks": [[1, 2, 3, 4]] * 30, "caption": pairs.column("caption").to_pylist()[::2]}
        pairs = pa.table(lists)
    (tmp_path / "rows").mkdir()
    pq.write_table(pairs, tmp_path / "rows" / "own.parquet")
    protocol = small_protocol(method, common=load_protocol().common | {"held_out_pairs": 8})
    for seed in (0, 1):
        run = Run(method=method, regime="own", labels="given", budget="pairs", seed=seed)
        work = dataclasses.replace(work_of(protocol, run, tmp_path, protocol.entries[method].grid[0]), data=str(tmp_path / "rows"))
        config, objective = prepared(work, tmp_path / run.name, 1)
        align(with_latents(config, objective, work), objective)
        assert (tmp_path / run.name / "unet").exists()


def test_bad_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LeaderboardConfig(out=str(tmp_path), results=str(tmp_path), methods=("dpo",))
    with pytest.raises(ValueError, match="methods has 'dpo'; accepted: diffusion_dpo"):
        run_leaderboard(config)
    base_file(tmp_path)
    monkeypatch.setattr(leaderboard, "fingerprint", lambda _: "another")
    with pytest.raises(ValueError, match="belong to base model m, this one is another"):
        run_leaderboard(LeaderboardConfig(out=str(tmp_path), results=str(tmp_path), methods=("sft",)))
