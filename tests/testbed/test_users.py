"""Simulated users: who they are, that they disagree, and what is made of rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffpref.data.pairs import load_pairs
from diffpref.testbed.checker import read
from diffpref.testbed.pairs import through_jpeg
from diffpref.testbed.reward import qualities
from diffpref.testbed.users import AXES, HELD_OUT, Candidates, all_users, score_of, seen_users, write_user_pairs
from diffpref.testbed.users_results import UsersConfig, gap_closed, measure_group, settings_of
from diffpref.testbed.world import render, sample_scenes


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    """Three renders of each of 40 scenes that differ in what is not stated."""
    scenes = sample_scenes(np.random.default_rng(0), 40)
    other = [sample_scenes(np.random.default_rng(seed), 40) for seed in (1, 2)]
    unstated = ("x", "y", "companion", "companion_angle", "saturation", "value")
    drawn = [scenes, *(type(scenes)(**scenes.__dict__ | {k: getattr(o, k) for k in unstated}) for o in other)]
    pictures = [through_jpeg((render(s) * 255).round().astype(np.uint8)) for s in drawn]
    prompts = scenes.captions()
    found = [qualities(read(images), prompts) for images, _ in pictures]
    return Candidates(prompts, np.stack([i for i, _ in pictures]), [list(e) for _, e in pictures], found)


def test_users_disagree_and_new_ones_combine_known_tastes(candidates: Candidates) -> None:
    assert len(all_users()) == 24
    assert set(HELD_OUT) < set(all_users())
    assert len(seen_users()) == 16
    tastes = {taste for axis in AXES.values() for taste in axis}
    assert {taste for user in seen_users() for taste in user.split("+")} == tastes
    assert {taste for user in HELD_OUT for taste in user.split("+")} == tastes
    found = candidates.found[0]
    together = score_of("left+high", found) + score_of("right+low", found) - 4 * found["follow"]
    assert np.ptp(together) < 1e-5  # what one gains the other loses
    with pytest.raises(ValueError, match="user 'tall' is not one of"):
        score_of("tall", found)


def test_pairs_follow_their_user(candidates: Candidates, tmp_path: Path) -> None:
    write_user_pairs(candidates, tmp_path)
    seen = pq.read_table(tmp_path / "seen" / "train.parquet")
    assert sorted(set(seen["user_id"].to_pylist())) == sorted(seen_users())
    pairs = load_pairs(str(tmp_path / "left+high"), check_images=False)
    assert set(pairs.user_ids) == {"left+high"}
    images = [through_jpeg(candidates.images[:, i])[0] for i in range(2)]
    assert images[0].shape == (3, 64, 64, 3)
    other = load_pairs(str(tmp_path / "right+low"), check_images=False)
    assert not set(pairs.pair_ids) & set(other.pair_ids)
    scores = np.stack([score_of("left+high", found) for found in candidates.found])
    gain = scores.max(0) - scores.min(0)
    by_prompt = {candidates.encoded[int(scores[:, i].argmax())][i] for i in range(40)}
    chosen = [pairs.row(i) for i in range(len(pairs))]
    right = np.array([(row.image_0 if row.p0 > 0.5 else row.image_1) in by_prompt for row in chosen])
    assert 0.75 < right.mean() < 1  # 90 % of the labels agree with the user's reward
    assert gain.min() > 0


def test_numbers_of_a_group(candidates: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UsersConfig(out=str(tmp_path), num_prompts=40)
    monkeypatch.setattr("diffpref.testbed.users_results.prompts_of", lambda config: candidates.prompts)
    users = ("left+high", "alone+muted")
    (tmp_path / "pictures").mkdir()

    def best(user: str) -> np.ndarray:
        picked = np.stack([score_of(user, found) for found in candidates.found]).argmax(0)
        return candidates.images[picked, np.arange(40)]

    pictures = {"base": candidates.images[0], "all": candidates.images[1]}
    pictures |= {f"{kind}-{user}": best(user) for user in users for kind in ("ppd", "separate")}
    for name, images in pictures.items():
        np.savez(tmp_path / "pictures" / f"{name}-test-40.npz", images=images)
    found = measure_group(config, users)
    assert found["gap_closed"]["share"] == pytest.approx(1)
    assert found["differences"]["ppd - all"]["low"] > 0
    assert found["differences"]["ppd - swapped"]["low"] > 0
    assert found["win_rates"]["ppd against all"]["rate"] > 0.7
    assert found["reward"]["ppd"] > found["reward"]["swapped"]


def test_gap_and_settings() -> None:
    rng = np.random.default_rng(0)
    rewards = {"all": rng.normal(size=(2, 200)), "separate": rng.normal(4, 1, (2, 200)), "ppd": rng.normal(2, 1, (2, 200))}
    found = gap_closed(rewards)
    assert found["low"] < 0.5 < found["high"]
    assert 0.4 < found["share"] < 0.6
    config = UsersConfig()
    ours, everyone = settings_of(config, "ppd"), settings_of(config, "all")
    same = ("train_batch_size", "beta", "lr_scheduler", "seed")
    assert {k: ours[k] for k in same} == {k: everyone[k] for k in same}
    assert (ours["method"], everyone["method"]) == ("ppd", "diffusion_dpo")
    with pytest.raises(ValueError, match="seen or unseen has 'left\\+vivid'"):
        UsersConfig(seen=("left+vivid",))
