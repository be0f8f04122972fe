"""Which shapes there are, and which of them a pair gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from diffpref.data.buckets import MAX_ASPECT, Buckets, bucket_shapes, read_sizes
from diffpref.data.pairs import load_pairs


def test_shapes_by_hand() -> None:
    assert bucket_shapes(32, 8) == ((64, 16), (56, 16), (48, 16), (40, 24), (32, 32), (24, 40), (16, 48), (16, 56), (16, 64))


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 64), (768, 32), (512, 8), (96, 32)])
def test_shapes_have_about_as_many_pixels_as_the_square(resolution: int, step: int) -> None:
    shapes = bucket_shapes(resolution, step)
    aspects = [width / height for height, width in shapes]
    assert aspects == sorted(set(aspects))
    assert shapes[len(shapes) // 2] == (resolution, resolution)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert (width, height) in shapes
        assert resolution**2 - step * max(height, width) < height * width <= resolution**2
        assert max(height, width) <= MAX_ASPECT * min(height, width)


def test_shapes_of_sdxl() -> None:
    shapes = bucket_shapes(1024, 64)
    assert {(1152, 896), (1216, 832), (1344, 768), (1536, 640), (2048, 512), (512, 2048)} <= set(shapes)
    assert len(shapes) == 33


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"resolution is 1000; .* multiple of bucket_step 64, such as 1024"):
        bucket_shapes(1000, 64)
    with pytest.raises(ValueError, match="bucket_step is 64, which leaves only the square at resolution 64"):
        bucket_shapes(64, 64)


def bucket(*pictures: tuple[int, int]) -> tuple[int, int]:
    """The shape at resolution 32 of one pair of pictures, given as height and width."""
    buckets = Buckets.of_sizes(np.array([pictures]), 32, 8)
    return buckets.shapes[buckets.of_pair[0]]


def test_a_pair_gets_the_shape_nearest_to_the_mean_of_both() -> None:
    assert bucket((100, 100), (500, 500)) == (32, 32)
    assert bucket((100, 150), (100, 150)) == (24, 40)  # 1.5 is nearer to 5/3 than to 1
    assert bucket((100, 125), (100, 125)) == (32, 32)  # 1.25 is nearer to 1
    assert bucket((100, 100), (100, 300)) == (24, 40)  # the mean is the root of 3
    assert bucket((200, 100), (100, 200)) == (32, 32)
    assert bucket((400, 100), (400, 100)) == (64, 16)
    assert bucket((100, 300), (100, 100)) == bucket((100, 100), (100, 300))


def test_an_elongated_picture_counts_as_four_to_one() -> None:
    assert bucket((1, 16_384), (1, 16_384)) == (16, 64)
    assert bucket((16_384, 1), (16_384, 1)) == (64, 16)
    assert bucket((1, 16_384), (100, 100)) == bucket((100, 400), (100, 100)) == (24, 40)


def test_a_pair_between_two_shapes_gets_the_taller() -> None:
    height, width = 100, 100 * (5 / 3) ** 0.5  # the middle of 1 and 5/3
    between = np.array([[[height, width]] * 2, [[width, height]] * 2])
    buckets = Buckets.of_sizes(between, 32, 8)
    assert [buckets.shapes[b] for b in buckets.of_pair] == [(32, 32), (40, 24)]


def test_enlarged_and_elongated_pairs_are_counted() -> None:
    sizes = np.array(
        [
            [[32, 32], [40, 32]],  # large enough
            [[32, 31], [99, 99]],  # one column short
            [[25, 100], [25, 100]],  # exactly 4:1
            [[25, 101], [25, 100]],  # beyond
            [[1, 16], [16, 16]],  # beyond and short
        ]
    )
    buckets = Buckets.of_sizes(sizes, 32, 8)
    assert (buckets.num_enlarged, buckets.num_elongated) == (2, 2)
    assert buckets.counts() == {(32, 32): 2, (24, 40): 1, (16, 64): 2}
    table = buckets.table(batch_size=2)
    assert "3 of 9 aspect-ratio buckets have pairs" in table
    rows = [line.split() for line in table.splitlines()[2:5]]
    assert rows == [["32", "x", "32", "2", "1"], ["24", "x", "40", "1", "1"], ["16", "x", "64", "2", "1"]]
    assert "filled with pairs of its next pass: 1 pairs" in table
    assert "2 pairs have a picture that is smaller than its bucket" in table
    assert "2 pairs have a picture beyond 4:1" in table
    assert len(Buckets.of_sizes(sizes[:1], 32, 8).table(1).splitlines()) == 3  # nothing to tell beyond the rows


def test_sizes_are_read_in_order(make_columns: Any, encode: Any) -> None:
    images = [encode(Image.new("RGB", size)) for size in ((10, 20), (30, 5), (8, 8), (9, 7))]
    pairs = load_pairs(pa.table(make_columns(2, jpg_0=images[::2], jpg_1=images[1::2])))
    want = [sizes if p >= 0.5 else sizes[::-1] for sizes, p in zip([[[20, 10], [5, 30]], [[8, 8], [7, 9]]], pairs.p0, strict=True)]
    assert read_sizes(pairs).tolist() == want


def test_an_unreadable_header_is_named(make_columns: Any) -> None:
    uids = {"image_0_uid": ["a", "b"], "image_1_uid": ["c", "d"]}
    columns = make_columns(2, **uids)
    columns["jpg_1"][1] = b"x"
    pairs = load_pairs(pa.table(columns), check_images=False)
    with pytest.raises(ValueError, match=f"pair {pairs.pair_ids[1]}, jpg_1: not a JPEG"):
        read_sizes(pairs)
