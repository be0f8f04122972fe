"""The world, its checker and its reward: what is drawn is read back, and no pixel filter can win."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffpref.testbed.checker import follows, parse, read
from diffpref.testbed.measure import FILTERS, apply_filter, measure
from diffpref.testbed.reward import PREFERRED_POINT, TASTES, WEIGHTS, qualities, reward, reward_parts, user_score
from diffpref.testbed.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scenes, render, sample_scenes


def pictures(scenes: Scenes) -> np.ndarray:
    return (render(scenes) * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(np.random.default_rng(5), 300)


@pytest.fixture(scope="module")
def drawn(scenes: Scenes) -> np.ndarray:
    return pictures(scenes)


def one(**values: object) -> Scenes:
    """A single upright red square without companion, with some values replaced."""
    defaults: dict[str, object] = {
        "colour": 0, "shape": 1, "size": 1, "background": len(COLOURS) + 1, "template": 0, "radius": 13.5, "x": 32.0, "y": 32.0,
        "tilt": 0.0, "companion": False, "companion_angle": 0.0, "companion_radius": 5.5, "companion_gap": 3.0, "saturation": 0.9,
        "value": 0.9, "background_saturation": 0.0, "background_value": 0.5, "hue_shift": 0.0, "shading": 0.0, "shading_angle": 0.0,
    }  # fmt: skip
    return Scenes(**{name: np.array([value]) for name, value in (defaults | values).items()})


def test_scenes_stay_in_the_picture_and_never_repeat_a_hue(scenes: Scenes) -> None:
    assert not (np.array(BACKGROUNDS)[scenes.background] == np.array(COLOURS)[scenes.colour]).any()
    assert scenes.x.min() >= 20
    assert scenes.x.max() <= IMAGE_SIZE - 20
    assert 0.65 < scenes.companion.mean() < 0.85
    again = sample_scenes(np.random.default_rng(5), 300)
    for field in dataclasses.fields(Scenes):
        np.testing.assert_array_equal(getattr(scenes, field.name), getattr(again, field.name))


def test_checker_reads_renders(scenes: Scenes, drawn: np.ndarray) -> None:
    reading = read(drawn)
    for name, right in follows(reading, scenes.captions()).items():
        assert right.mean() >= 0.99, name
    assert np.hypot(reading.x - scenes.x, reading.y - scenes.y).mean() < 0.1
    assert (reading.companion == scenes.companion).mean() >= 0.99
    both = reading.companion & scenes.companion
    gap = (reading.companion_angle[both] - scenes.companion_angle[both] + 180) % 360 - 180
    assert np.abs(gap).mean() < 1
    assert np.nanmean(np.abs(reading.tilt - np.abs(scenes.tilt))) < 3


def test_captions_are_parsed_back(scenes: Scenes) -> None:
    wanted = [parse(caption) for caption in scenes.captions()]
    for name in ("colour", "background", "shape", "size"):
        assert [w[name] for w in wanted] == getattr(scenes, name).tolist()


@pytest.mark.parametrize("prompt", ["a cat", "a red circle", "a small red circle", "circle small red on blue", "a small circle on red"])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        parse(prompt)


def test_reward_parts_mean_what_they_say() -> None:
    caption = one().captions()
    x, y = PREFERRED_POINT
    near, far = reward_parts(pictures(one(x=x, y=y)), caption), reward_parts(pictures(one(x=42.0, y=42.0)), caption)
    assert near["place"][0] > 0.97
    assert far["place"][0] < 0.05
    upright, leaning = reward_parts(pictures(one()), caption), reward_parts(pictures(one(tilt=27.0)), caption)
    assert upright["upright"][0] > 0.9 > 0.3 > leaning["upright"][0]
    right = reward_parts(pictures(one(companion=True, companion_angle=0.0)), caption)
    left = reward_parts(pictures(one(companion=True, companion_angle=180.0)), caption)
    assert right["beside"][0] > 0.97
    assert left["beside"][0] < 0.03
    assert upright["beside"][0] == 0
    wrong = reward_parts(pictures(one(shape=0)), caption)
    assert upright["form"][0] == 1
    assert wrong["form"][0] == 0.5


def test_reward_is_the_weighted_sum_of_its_parts(scenes: Scenes, drawn: np.ndarray) -> None:
    parts = reward_parts(drawn, scenes.captions())
    np.testing.assert_allclose(reward(drawn, scenes.captions()), sum(WEIGHTS[k] * parts[k] for k in WEIGHTS))
    assert all((part >= 0).all() and (part <= 1).all() for part in parts.values())


@pytest.mark.parametrize("name", FILTERS)
def test_no_pixel_filter_wins(name: str, scenes: Scenes, drawn: np.ndarray) -> None:
    prompts = scenes.captions()[:120]
    base, filtered = measure(drawn[:120], prompts), measure(apply_filter(name, drawn[:120]), prompts)
    gain = (filtered.score - base.score).mean()
    assert gain < 0.15 * base.score.std(), gain


def test_tastes_contradict_each_other(scenes: Scenes, drawn: np.ndarray) -> None:
    names = list(TASTES)
    assert len(names) >= 6
    for first, second in zip(names[::2], names[1::2], strict=True):
        scores = [user_score(n, drawn, scenes.captions()) for n in (first, second)]
        assert np.corrcoef(*scores)[0, 1] < 0, (first, second)
    with pytest.raises(ValueError, match="taste 'sweet' is not one of left"):
        user_score("sweet", drawn, scenes.captions())
    assert set(qualities(read(drawn[:5]), scenes.captions()[:5])) >= {key for taste in TASTES.values() for key in taste}


def test_every_stated_value_occurs(scenes: Scenes) -> None:
    assert set(scenes.shape) == set(range(len(SHAPES)))
    assert set(scenes.size) == set(range(len(SIZES)))
    assert set(scenes.background) == set(range(len(BACKGROUNDS)))
