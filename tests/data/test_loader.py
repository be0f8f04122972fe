"""What a pair looks like depends on seed, pair id and visit; never on workers, batches or the order of the data."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from diffpref.data import loader
from diffpref.data.buckets import Buckets
from diffpref.data.loader import PairPixels, batches
from diffpref.data.pairs import PairDataset, load_pairs
from diffpref.data.sampler import PairSampler


@pytest.fixture
def pairs(make_columns: Any, write_parquet: Any, tmp_path: Path) -> PairDataset:
    return load_pairs(write_parquet(make_columns(6)), cache_dir=tmp_path / "cache")


def _run(pixels: PairPixels, num_workers: int) -> list[dict[str, Any]]:
    sampler = PairSampler(len(pixels), seed=4)
    stream = batches(pixels, lambda: sampler.micro_batches(0, batch_size=4, accumulation=1, world_size=1), num_workers)
    got = list(itertools.islice(stream, 5))
    stream.close()
    return got


def test_workers_change_nothing(pairs: PairDataset) -> None:
    pixels = PairPixels(pairs, resolution=8, seed=1, flip_probability=0.5, random_crop=True)
    state = torch.get_rng_state()
    alone, shared = _run(pixels, 0), _run(pixels, 2)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(alone, shared, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            equal = torch.equal(one[name], two[name]) if isinstance(one[name], torch.Tensor) else one[name] == two[name]
            assert equal, name


def test_batch_shapes(pairs: PairDataset) -> None:
    batch = _run(PairPixels(pairs, resolution=8), 0)[0]
    assert batch["pixels"].shape == (4, 2, 3, 8, 8)
    assert batch["time_ids"].shape == (4, 2, 6)
    assert batch["index"].dtype == batch["visit"].dtype == torch.int64
    assert (batch["chosen_first"].dtype, batch["relevance"].dtype) == (torch.bool, torch.float32)
    assert batch["pair_id"] == [pairs.pair_ids[index] for index in batch["index"]]
    assert batch["prompts"] == [(pairs.prompts[index],) * 2 for index in batch["index"]]


def test_a_finite_order_ends(pairs: PairDataset) -> None:
    order = [[(0, 0), (1, 0)], [(5, 2)]]
    got = [batch["index"].tolist() for batch in batches(PairPixels(pairs, resolution=8), lambda: order)]
    assert got == [[0, 1], [5]]


def test_the_chosen_image_comes_first(make_columns: Any) -> None:
    columns = make_columns(3, label_0=[1.0, 0.2, 0.5], label_1=[0.0, 0.8, 0.5])
    turned = columns | {"jpg_0": columns["jpg_1"], "jpg_1": columns["jpg_0"], "label_0": columns["label_1"], "label_1": columns["label_0"]}
    straight = PairPixels(load_pairs(pa.table(columns), tie_policy="keep"), resolution=8)
    other = PairPixels(load_pairs(pa.table(turned), tie_policy="keep"), resolution=8)
    samples = [straight[index, 0] for index in range(3)]
    assert [sample["chosen_first"] for sample in samples] == [True, False, True]
    assert [float(sample["relevance"][0]) for sample in samples] == pytest.approx([1.0, 0.8, 0.5])
    for index in range(2):
        assert torch.equal(samples[index]["pixels"], other[index, 0]["pixels"])
    assert torch.equal(samples[2]["pixels"], other[2, 0]["pixels"].flip(0))


def test_draws_are_keyed_by_pair_and_visit(pairs: PairDataset) -> None:
    pixels = PairPixels(pairs, resolution=8, seed=1, flip_probability=0.5, random_crop=True)
    moved = PairPixels(pairs.select([3, 2]), resolution=8, seed=1, flip_probability=0.5, random_crop=True)
    assert torch.equal(pixels[3, 5]["pixels"], moved[0, 5]["pixels"])
    seen = {tuple(pixels[3, visit]["time_ids"][0].tolist()) for visit in range(20)}
    assert len(seen) > 1


def test_flip_is_shared_and_optional(pairs: PairDataset) -> None:
    plain = PairPixels(pairs, resolution=12)[0, 0]["pixels"]
    flipping = PairPixels(pairs, resolution=12, flip_probability=0.5)
    flips = []
    for visit in range(30):
        got = flipping[0, visit]["pixels"]
        flips.append(not torch.equal(got, plain))
        assert torch.equal(got, plain.flip(-1) if flips[-1] else plain)
    assert 5 <= sum(flips) <= 25


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.reliability("D11")
def test_a_damaged_image_is_named(make_columns: Any, num_workers: int) -> None:
    uids = {"image_0_uid": ["a"], "image_1_uid": ["b"]}
    pairs = load_pairs(pa.table(make_columns(1, jpg_1=[b"x"], **uids)), check_images=False)
    with pytest.raises(ValueError, match=rf"pair {pairs.pair_ids[0]}, jpg_1: not a JPEG"):
        next(batches(PairPixels(pairs, resolution=8), lambda: [[(0, 0)]], num_workers))


@dataclass(frozen=True, eq=False)
class Hanging(PairPixels):
    """Never comes back."""

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        time.sleep(60)
        raise AssertionError


@pytest.mark.reliability("D11")
def test_a_worker_that_hangs_is_given_up(pairs: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WORKER_TIMEOUT", 1)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        next(batches(Hanging(pairs, resolution=8), lambda: [[(0, 0)]], num_workers=1))
    assert time.monotonic() - begun < 30


def test_wrong_number_of_workers(pairs: PairDataset) -> None:
    with pytest.raises(ValueError, match="num_workers is -1"):
        next(batches(PairPixels(pairs, resolution=8), lambda: [], -1))


def test_independent_flips_are_drawn_for_each_image(pairs: PairDataset) -> None:
    plain = PairPixels(pairs, resolution=12)
    flipping = PairPixels(pairs, resolution=12, flip_probability=0.5, flip_mode="independent")
    seen = Counter()
    for index, visit in itertools.product(range(6), range(12)):
        _, flips = flipping.draws(index, visit)
        seen[flips] += 1
        for got, before, flip in zip(flipping[index, visit]["pixels"], plain[index, visit]["pixels"], flips, strict=True):
            assert torch.equal(got, before.flip(-1) if flip else before)
    assert len(seen) == 4  # both, none, and each alone
    assert min(seen.values()) >= 9  # of 72, about 18 each
    shared = PairPixels(pairs, resolution=12, flip_probability=0.5)
    assert {shared.draws(index, visit)[1] for index, visit in itertools.product(range(6), range(12))} == {(True, True), (False, False)}


def test_a_label_does_not_decide_what_an_image_looks_like(pairs: PairDataset) -> None:
    turned = replace(pairs, p0=1 - pairs.p0)
    settings = {"resolution": 8, "flip_probability": 0.5, "flip_mode": "independent", "random_crop": True}
    differ = 0
    for index, visit in itertools.product(range(6), range(5)):
        a, b = PairPixels(pairs, **settings)[index, visit], PairPixels(turned, **settings)[index, visit]
        assert torch.equal(a["pixels"], b["pixels"].flip(0))
        assert torch.equal(a["time_ids"], b["time_ids"].flip(0))
        flips = PairPixels(pairs, **settings).draws(index, visit)[1]
        differ += flips[0] != flips[1]
    assert differ > 5


def test_a_pair_takes_the_shape_of_its_bucket(pairs: PairDataset) -> None:
    buckets = Buckets(((16, 8), (8, 8), (8, 16)), np.array([0, 2, 1, 2, 0, 2]), 0, 0)
    pixels = PairPixels(pairs, resolution=8, buckets=buckets)
    assert [tuple(pixels[i, 0]["pixels"].shape[-2:]) for i in range(6)] == [(16, 8), (8, 16), (8, 8), (8, 16), (16, 8), (8, 16)]
    # the images are 12 x 16: in 16 x 8 they become 16 x 21, in 8 x 16 they become 12 x 16
    assert pixels[0, 0]["time_ids"].tolist() == [[12, 16, 0, 6, 16, 8]] * 2
    assert pixels[1, 0]["time_ids"].tolist() == [[12, 16, 2, 0, 8, 16]] * 2
    assert pixels.chunks(range(6), 2) == [[(0, 0), (4, 0)], [(1, 0), (3, 0)], [(5, 0)], [(2, 0)]]
    assert PairPixels(pairs, resolution=8).chunks([4, 1, 3], 2) == [[(4, 0), (1, 0)], [(3, 0)]]
    (batch,) = batches(pixels, lambda: [[(1, 0), (3, 0)]])
    assert batch["pixels"].shape == (2, 2, 3, 8, 16)
