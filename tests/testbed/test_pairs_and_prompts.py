"""Prompts, labels, stored pairs and the tokenizer of the testbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffpref.data.pairs import load_pairs
from diffpref.testbed.pairs import judge, pick_a_pic_table, restyle, through_jpeg
from diffpref.testbed.prompts import draw_prompts, is_unseen
from diffpref.testbed.tokenizer import WORDS, write_tokenizer
from diffpref.testbed.world import render, sample_scenes


def test_prompts_are_fixed_and_purposes_differ() -> None:
    test = draw_prompts("test", 500)
    assert test.texts[:50] == draw_prompts("test", 50).texts
    assert test.texts[:50] != draw_prompts("validation", 50).texts
    assert 0.1 < test.unseen.mean() < 0.3


def test_pairs_avoid_unseen_scenes() -> None:
    pairs = draw_prompts("pairs", 400)
    assert len(pairs.texts) == 400
    assert not any(is_unseen(int(scene)) for scene in pairs.scene_ids)


@pytest.mark.parametrize(("agreement", "ties"), [(0.7, 0.0), (0.6, 0.12)])
def test_judge_has_the_wanted_agreement_and_ties(agreement: float, ties: float) -> None:
    difference = np.random.default_rng(0).normal(size=4000)
    labels = judge(difference, agreement, ties, seed=1)
    assert (labels.p0 == 0.5).mean() == pytest.approx(ties, abs=1e-3)
    assert labels.agreement(difference) == pytest.approx(agreement, abs=0.02)
    np.testing.assert_array_equal(labels.p0, judge(difference, agreement, ties, seed=1).p0)
    if ties:
        tied = labels.p0 == 0.5
        assert np.abs(difference[tied]).max() <= np.abs(difference[~tied]).min()


def test_stored_pairs_are_read_back(tmp_path: Path) -> None:
    scenes = sample_scenes(np.random.default_rng(0), 12)
    images = (render(scenes) * 255).round().astype(np.uint8)
    seen, encoded = through_jpeg(images)
    assert np.abs(seen.astype(int) - images).mean() < 3
    p0 = np.array([1.0, 0.0, 0.5] * 4)
    pq.write_table(pick_a_pic_table(scenes.captions(), encoded, encoded[::-1], p0, 0, "m"), tmp_path / "own.parquet")
    pairs = load_pairs(str(tmp_path), split="own", tie_policy="keep")
    assert pairs.prompts == scenes.captions()
    assert pairs.ties == 4
    np.testing.assert_array_equal(pairs.p0, p0)
    assert pairs.row(3).image_0 == encoded[3]


def test_restyle_mutes() -> None:
    image = (render(sample_scenes(np.random.default_rng(1), 1))[0] * 255).astype(np.uint8)
    spread = [np.ptp(x.astype(int), axis=-1).mean() for x in (image, restyle(image))]
    assert spread[1] < 0.8 * spread[0]


def test_every_caption_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "!")
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer("a photo of a zebra").input_ids[0] == tokenizer.bos_token_id
    assert (tmp_path / "vocab.json").exists()
    assert (tmp_path / "merges.txt").exists()
