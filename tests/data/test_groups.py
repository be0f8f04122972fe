"""Groups made of pairs: ranked lists, single pictures, captions per picture; and the order in which single ones are drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from torch import Tensor

from diffpref.data.groups import Groups, arranged, edited, with_captions
from diffpref.data.loader import PairPixels, batches
from diffpref.data.pairs import PairDataset, load_pairs
from diffpref.data.sampler import PairSampler

RULES = ("red green blue", "small large")


def picture(seed: int) -> bytes:
    """A PNG of 16 x 16 pixels, different for every seed."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def lists_of(ranks: list[list[int]], **settings: Any) -> PairDataset:
    """Ranked lists of pictures that are all different."""
    images = [[picture(100 * row + i) for i in range(len(found))] for row, found in enumerate(ranks)]
    table = pa.table({"prompt": [f"list {i}" for i in range(len(ranks))], "images": images, "ranks": ranks})
    return load_pairs(table, **settings)


def found(groups: Groups | None) -> Groups:
    """Groups that are there."""
    assert groups is not None
    return groups


def seeds_of(groups: Groups, index: int) -> list[int]:
    """Which pictures a group of `lists_of` shows."""
    known = {picture(100 * row + i): i for row in range(4) for i in range(5)}
    return [known[data] for data in groups.group(index).images]


def test_lists_come_back_from_their_pairs_best_first() -> None:
    groups = found(arranged(lists_of([[2, 1, 4, 3], [1, 2, 2, 3]]), "lists"))
    assert len(groups) == 2
    assert groups.slots == (0, 1, 2, 3)
    assert seeds_of(groups, 0) == [1, 0, 3, 2]
    np.testing.assert_allclose(groups.relevance, [[1, 2 / 3, 1 / 3, 0], [1, 0.5, 0.5, 0]])  # a tie is half a win
    assert groups.prompts == [("list 0",) * 4, ("list 1",) * 4]
    assert not groups.group(0).is_in_order
    assert groups.group(1).is_in_order


def test_flipped_labels_turn_a_list_round() -> None:
    pairs = lists_of([[2, 1, 4, 3]])
    groups = found(arranged(replace(pairs, p0=1 - pairs.p0), "lists"))
    assert seeds_of(groups, 0) == [2, 3, 0, 1]


def test_lists_of_rows_with_one_picture_each() -> None:
    rows = [("a", 2, 0), ("b", 1, 100), ("a", 1, 1), ("b", 2, 101), ("a", 3, 2), ("b", 3, 102)]
    table = pa.table(
        {
            "prompt": [f"prompt {name}" for name, _, _ in rows],
            "image": [picture(seed) for _, _, seed in rows],
            "rank": [rank for _, rank, _ in rows],
            "prompt_id": [name for name, _, _ in rows],
        }
    )
    groups = found(arranged(load_pairs(table), "lists"))
    assert [seeds_of(groups, i) for i in range(2)] == [[1, 0, 2], [0, 1, 2]]


def test_lists_of_unequal_lengths_need_a_size() -> None:
    pairs = lists_of([[1, 2, 3, 4, 5], [2, 1], [3, 1, 2]])
    with pytest.raises(ValueError, match=r"ranked lists have 2 and 3 and 5 pictures.*give list_size"):
        arranged(pairs, "lists")
    said: list[str] = []
    groups = found(arranged(pairs, "lists", 3, said.append))
    assert [seeds_of(groups, i) for i in range(2)] == [[0, 2, 4], [1, 2, 0]]
    assert said == ["2 ranked lists of 3 pictures, 1 shorter ones left out"]
    with pytest.raises(ValueError, match="longest ranked list has 5 pictures"):
        arranged(pairs, "lists", 6)
    with pytest.raises(ValueError, match="at least two"):
        arranged(pairs, "lists", 1)
    with pytest.raises(ValueError, match="list_size is 3, but the method has groups of kind pairs"):
        arranged(pairs, "pairs", 3)


def test_pairs_are_lists_of_two(pairs_file: Path, table_cache: Path) -> None:
    pairs = load_pairs(pairs_file, cache_dir=table_cache)
    assert arranged(pairs, "lists") is None
    assert arranged(pairs, "pairs") is None
    with pytest.raises(ValueError, match="data has pairs"):
        arranged(pairs, "lists", 3)


def voted(make_columns: Callable[..., dict[str, Any]]) -> PairDataset:
    """a beats b, c beats a, d and e tie, all for one prompt."""
    shown = [("a", "b", 1.0), ("c", "a", 1.0), ("d", "e", 0.5)]
    columns = make_columns(3, image_0_uid=[x for x, _, _ in shown], image_1_uid=[y for _, y, _ in shown])
    columns |= {"label_0": [p for _, _, p in shown], "caption": ["one prompt"] * 3, "s_0": [1.0, 2.0, 3.0], "s_1": [4.0, 5.0, 6.0]}
    if "label_1" in columns:
        columns["label_1"] = [1 - p for _, _, p in shown]
    return load_pairs(pa.table(columns), tie_policy="keep")


def test_a_picture_that_was_preferred_once_is_desirable(make_columns: Callable[..., dict[str, Any]]) -> None:
    pairs = voted(make_columns)
    groups = found(arranged(pairs, "images"))
    assert groups.cells.tolist() == [[[0, 0]], [[0, 1]], [[1, 0]]]  # a, b, c; a lost once, too
    assert groups.relevance.tolist() == [[1], [0], [1]]
    assert groups.slots == (0,)
    assert groups.scores["s"].tolist() == [[1], [4], [2]]
    assert len(set(groups.group_ids)) == 3
    assert groups.group(1).images == (pairs.row(0).image_1,)


def test_labelled_pictures_are_read() -> None:
    table = {"image": [picture(i) for i in range(4)], "caption": ["x", "y", "z", "u"], "label": [True, False, True, False]}
    pairs = load_pairs(pa.table(table))
    groups = found(arranged(pairs, "images"))
    assert groups.relevance[:, 0].tolist() == [1, 0, 1, 0]
    assert [groups.group(i).images for i in range(4)] == [(data,) for data in table["image"]]
    for kind in ("pairs", "lists", "captioned"):
        with pytest.raises(ValueError, match=r"data holds single ones \(form labelled\)"):
            arranged(pairs, kind)  # type: ignore[arg-type]
    table["label"] = [1.0, 0.0, -1.0, 0.0]
    bad = load_pairs(pa.table(table))
    assert [(entry.row, entry.reason) for entry in bad.rejected] == [(2, "outside [0, 1]: -1.0")]


def test_two_captions_of_the_preferred_picture(pairs_file: Path, table_cache: Path) -> None:
    plain = load_pairs(pairs_file, cache_dir=table_cache, max_samples=4)
    pairs = with_captions(plain, "captions", RULES, seed=0)
    groups = found(arranged(pairs, "captions"))
    assert groups.slots == (0, 0)
    for i in range(4):
        row = plain.row(i)
        assert groups.group(i).images == (row.image_0 if row.p0 > 0.5 else row.image_1,)
        right, wrong = groups.prompts[i]
        assert right == plain.prompts[i]
        assert wrong in (right.replace("red", "green"), right.replace("red", "blue"))
    turned = found(arranged(replace(pairs, p0=1 - pairs.p0), "captions"))  # flipped labels: the wrong caption is preferred
    assert turned.prompts == [both[::-1] for both in groups.prompts]
    assert [turned.group(i).images for i in range(4)] == [groups.group(i).images for i in range(4)]


def test_captions_from_columns(make_columns: Callable[..., dict[str, Any]]) -> None:
    columns = make_columns(3) | {"caption_0": ["l", "m", "n"], "caption_1": ["p", None, "r"]}
    said: list[str] = []
    pairs = with_captions(load_pairs(pa.table(columns)), "captioned", (), 0, said.append)
    assert said == ["1 pairs without a second caption left out"]
    groups = found(arranged(pairs, "captioned"))
    both = [("l", "p"), ("n", "r")]
    assert groups.prompts == [b if p >= 0.5 else b[::-1] for b, p in zip(both, pairs.p0, strict=True)]
    columns = make_columns(2) | {"caption_negative": ["no", "none"]}
    pairs = with_captions(load_pairs(pa.table(columns)), "captioned", (), 0)
    wanted = list(zip(pairs.prompts, ["no", "none"], strict=True))
    assert found(arranged(pairs, "captioned")).prompts == wanted
    with pytest.raises(ValueError, match="no column caption_negative and no columns caption_0, caption_1; add it, or give caption_edits"):
        with_captions(load_pairs(pa.table(make_columns(2))), "captioned", (), 0)


def test_one_picture_per_row_with_two_captions() -> None:
    table = {"image": [picture(i) for i in range(2)], "caption": ["x", "y"], "caption_negative": ["not x", "y"]}
    pairs = with_captions(load_pairs(pa.table(table)), "captions", (), 0)
    groups = found(arranged(pairs, "captions"))
    assert groups.prompts == [("x", "not x")]  # equal captions would teach nothing
    assert groups.group(0).images == (table["image"][0],)


def test_edits_exchange_one_word_within_its_set() -> None:
    rules = [tuple(words.split()) for words in RULES]
    texts = {edited("a small red ring, blue background", rules, 0, str(i)) for i in range(60)}
    assert texts == {
        "a large red ring, blue background",
        "a small green ring, blue background",
        "a small red ring, green background",
    }
    assert edited("A Red ring", rules, 0, "k") in ("A green ring", "A blue ring")
    assert edited("a pink ring", rules, 0, "k") is None
    assert edited("red green blue", rules, 0, "k") is None


def pixels_of(groups: Groups, **settings: Any) -> PairPixels:
    return PairPixels(groups.pairs, 16, groups=groups, **settings)


def test_batches_of_groups_have_their_shapes() -> None:
    groups = found(arranged(lists_of([[2, 1, 3], [1, 2, 3]]), "lists"))
    (batch,) = batches(pixels_of(groups), lambda: [[(0, 0), (1, 0)]])
    assert batch["pixels"].shape == (2, 3, 3, 16, 16)
    assert batch["time_ids"].shape == (2, 3, 6)
    relevance: Tensor = batch["relevance"]
    assert relevance.tolist() == [[1, 0.5, 0], [1, 0.5, 0]]
    assert batch["prompts"] == [("list 0",) * 3, ("list 1",) * 3]


def test_independent_flips_belong_to_pictures_and_not_to_ranks() -> None:
    pairs = lists_of([[2, 1, 3]])
    flips = []
    for labels in (pairs.p0, 1 - pairs.p0):
        pixels = pixels_of(found(arranged(replace(pairs, p0=labels), "lists")), flip_probability=0.5, flip_mode="independent")
        assert pixels.groups is not None
        places = pixels.groups.places[0].tolist()
        flips.append([[flip for _, flip in sorted(zip(places, pixels.draws(0, v)[1], strict=True))] for v in range(8)])
    assert flips[0] == flips[1]
    assert len({tuple(f) for f in flips[0]}) > 2


@pytest.mark.parametrize("share", [0.5, 0.8, 0.3])
def test_good_and_bad_pictures_are_dealt_in_proportion(share: float) -> None:
    good = np.arange(50) < 10
    sampler = PairSampler(50, 3, balance=(good, share))
    layout = {"batch_size": 4, "accumulation": 2, "world_size": 2}
    places = [(step, micro, rank) for step in range(25) for micro in range(2) for rank in range(2)]
    seen = [item for place in places for item in sampler.micro_batch(*place, **layout)]
    counts = np.cumsum([good[i] for i, _ in seen])
    assert np.abs(counts - share * np.arange(1, len(seen) + 1)).max() <= 1
    for wanted in (True, False):  # within a class every picture comes before any comes again
        visits = [item for item in seen if good[item[0]] == wanted]
        size = int((good == wanted).sum())
        assert all(len({i for i, _ in visits[k : k + size]}) == size for k in range(0, len(visits) - size + 1, size))
        assert [v for _, v in visits] == [k // size for k in range(len(visits))]
    whole = sampler.micro_batch(3, 0, 0, batch_size=16, accumulation=1, world_size=1)
    assert seen[48:64] == whole  # the same draws, however they are spread


def test_a_balance_needs_both_classes() -> None:
    with pytest.raises(ValueError, match="0 good and 5 bad"):
        PairSampler(5, 0, balance=(np.zeros(5, bool), 0.5))
    with pytest.raises(ValueError, match=r"desirable_share is 1\.0"):
        PairSampler(2, 0, balance=(np.array([True, False]), 1.0))
