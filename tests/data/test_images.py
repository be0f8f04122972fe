"""Hostile files are refused from their header; odd but valid files have one defined conversion."""

from __future__ import annotations

import math
import resource
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from diffpref.data.images import ImageError, ImageLimits, decode_image, image_size, prepare_images
from tests.hostile_files import png_with_header, text_bomb


def _noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.reliability("D1")
def test_truncated_files_are_refused(encode: Any, kind: str, share: float) -> None:
    data = encode(_noise(64, 48), kind)
    assert decode_image(data).size == (48, 64)
    with pytest.raises(ImageError):
        decode_image(data[: min(int(len(data) * share), len(data) - 1)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_half_a_file_is_called_truncated(encode: Any, kind: str) -> None:
    data = encode(_noise(64, 48), kind)
    with pytest.raises(ImageError, match=r"^truncated"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_missing_last_bytes_are_noticed(encode: Any, kind: str) -> None:
    data = encode(_noise(64, 48), kind)
    for lost in (1, 2):
        with pytest.raises(ImageError, match=r"^truncated"):
            decode_image(data[:-lost])


def test_pixels_damaged_inside_a_png_are_noticed(encode: Any) -> None:
    data = bytearray(encode(_noise(64, 48)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError):
        decode_image(bytes(data))


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "BMP", "PPM", "ICO"])
@pytest.mark.reliability("S5")
def test_other_formats_are_refused(encode: Any, kind: str) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP"):
        decode_image(encode(1, kind))


@pytest.mark.parametrize("data", [b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", bytes(1000)])
@pytest.mark.reliability("D2")
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


@pytest.mark.reliability("D3")
def test_bombs_are_refused_before_decoding(encode: Any) -> None:
    bomb = encode(Image.new("RGB", (8000, 8000), "red").convert("P"))
    assert len(bomb) < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=r"^too many pixels: 8000 x 8000, at most 32000000"):
        decode_image(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(("width", "height", "message"), [(12_961, 12_961, "pixels"), (20_000, 20_000, "pixels"), (100_001, 1, "side")])
@pytest.mark.filterwarnings("error")
@pytest.mark.reliability("D3")
def test_headers_beyond_the_limits_are_refused(width: int, height: int, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(png_with_header(width, height))


def test_limits_are_settable(encode: Any) -> None:
    data = encode(3)
    assert decode_image(data, ImageLimits(max_pixels=192, max_side=16, max_bytes=len(data))).size == (16, 12)
    for limits in (ImageLimits(max_pixels=191), ImageLimits(max_side=15), ImageLimits(max_bytes=len(data) - 1)):
        with pytest.raises(ImageError, match="at most"):
            decode_image(data, limits)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.reliability("D3")
def test_animations_are_refused(encode: Any, kind: str) -> None:
    data = encode(_noise(8, 8), kind, save_all=True, append_images=[_noise(8, 8, 1), _noise(8, 8, 2)])
    with pytest.raises(ImageError, match=r"^several frames: 3"):
        decode_image(data)


@pytest.mark.reliability("D3")
def test_text_chunk_bomb_is_refused() -> None:
    with pytest.raises(ImageError, match="broken header"):
        decode_image(text_bomb())


def test_a_process_that_allows_truncated_images_is_stopped(encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is True") as caught:
        decode_image(encode(1))
    assert not isinstance(caught.value, ImageError)


def test_rgb_passes_unchanged(encode: Any) -> None:
    image = _noise(5, 7)
    assert np.array_equal(np.asarray(decode_image(encode(image))), np.asarray(image))


@pytest.mark.reliability("D4")
def test_cmyk_becomes_rgb(encode: Any) -> None:
    pixel = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)).getpixel((4, 4))
    assert np.abs(np.subtract(pixel, (255, 0, 0))).max() <= 3


def test_transparency_is_composited_onto_white(encode: Any) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 51))
    decoded = decode_image(encode(image))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (204, 204, 204)]


@pytest.mark.reliability("D4")
def test_palette_transparency_is_composited_onto_white(encode: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, transparency=1))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_key_colour_transparency_of_grey(encode: Any) -> None:
    image = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    decoded = decode_image(encode(image, transparency=9))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(7, 7, 7), (255, 255, 255)]


@pytest.mark.reliability("D4")
def test_16_bit_grey_is_scaled_to_8(encode: Any) -> None:
    values = np.array([[0, 257, 128 * 257, 65_535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values))))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.ptp(decoded, axis=2).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_and_1_bit(encode: Any, mode: str) -> None:
    image = Image.new("L", (2, 1), 255).convert(mode)
    image.putpixel((0, 0), 0 if mode != "LA" else (0, 255))
    decoded = decode_image(encode(image))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.reliability("D4")
def test_exif_orientation_is_applied(encode: Any, orientation: int) -> None:
    shown = np.asarray(_noise(3, 5))
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(Image.fromarray(np.ascontiguousarray(undo(shown))), exif=exif))
    assert np.array_equal(np.asarray(decoded), shown)


def test_orientation_of_16_bit_grey(encode: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(Image.fromarray(np.array([[0, 65_535]], dtype=np.uint16)), exif=exif)
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [255, 0]


def test_text_in_a_png_is_harmless(encode: Any) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat", zip=True)
    assert decode_image(encode(_noise(4, 4), pnginfo=info)).size == (4, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_is_that_of_the_decoded_image(encode: Any, kind: str, orientation: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    data = encode(_noise(30, 50), kind, **({"exif": exif} if orientation else {}))
    height, width = image_size(data)
    assert (width, height) == decode_image(data).size
    assert (height, width) == ((50, 30) if orientation in (6, 8) else (30, 50))


def test_the_size_needs_no_pixels(encode: Any) -> None:
    cut = {kind: encode(_noise(30, 50), kind)[:800] for kind in ("JPEG", "PNG")}
    assert [image_size(data) for data in cut.values()] == [(30, 50), (30, 50)]


def test_the_orientation_of_a_png_may_come_behind_its_pixels(encode: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(_noise(30, 50), exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert decode_image(moved).size == (30, 50)
    assert image_size(moved) == (50, 30)


def test_a_header_that_is_refused_has_no_size(encode: Any) -> None:
    for data in (b"", b"no image", encode(1, "GIF"), png_with_header(100_001, 1), encode(1)[:20]):
        with pytest.raises(ImageError):
            image_size(data)


def _to_bytes(pixels: torch.Tensor) -> np.ndarray:
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_an_image_of_the_right_size_passes_untouched() -> None:
    first, second = _noise(16, 16, 1), _noise(16, 16, 2)
    pixels, time_ids = prepare_images([first, second], (16, 16), crop=(0.99, 0.5))
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert np.array_equal(_to_bytes(pixels[0]), np.asarray(first))
    assert np.array_equal(_to_bytes(pixels[1]), np.asarray(second))
    assert time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_crop_is_shared_as_a_share_of_the_slack() -> None:
    wide, tall = _noise(8, 20, 1), _noise(40, 16, 2)
    pixels, time_ids = prepare_images([wide, tall], (8, 8), crop=(0.5, 0.25))
    assert time_ids.tolist() == [[8, 20, 0, 3, 8, 8], [40, 16, 6, 0, 8, 8]]
    assert np.array_equal(_to_bytes(pixels[0]), np.asarray(wide)[:, 3:11])


def test_random_crops_reach_both_ends() -> None:
    image = _noise(8, 20)
    lefts = {int(prepare_images([image, image], (8, 8), crop=(0.0, (i + 0.5) / 26))[1][0, 3]) for i in range(26)}
    assert lefts == set(range(13))


def test_flip_mirrors_what_is_shown_and_its_offsets() -> None:
    image = _noise(8, 21)
    pixels, time_ids = prepare_images([image, image], (8, 8), crop=(0.0, 0.0), flips=(True, True))
    assert np.array_equal(_to_bytes(pixels[0]), np.asarray(image)[:, ::-1][:, :8])
    assert torch.equal(pixels[0], pixels[1])
    assert time_ids[0, 3] == 0


@pytest.mark.parametrize(("height", "width"), [(30, 47), (90, 33), (128, 64), (5, 9)])
@pytest.mark.reliability("D5")
def test_equals_resize_then_centre_crop(height: int, width: int) -> None:
    image, size = _noise(height, width), 24
    short = min(height, width)
    resized = image.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    pixels, time_ids = prepare_images([image, image], (size, size))
    top, left = int(time_ids[0, 2]), int(time_ids[0, 3])
    assert (top, left) == (round((resized.height - size) / 2), round((resized.width - size) / 2))
    want = np.asarray(resized).astype(int)[top : top + size, left : left + size]
    assert np.abs(_to_bytes(pixels[0]).astype(int) - want).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(90, 33), (30, 120), (24, 16), (7, 300), (200, 1)])
@pytest.mark.parametrize("size", [(32, 16), (16, 40)])
@pytest.mark.parametrize("crop", [None, (0.9, 0.3)])
def test_other_shapes_are_covered_and_cut(height: int, width: int, size: tuple[int, int], crop: tuple[float, float] | None) -> None:
    image = _noise(height, width)
    scale = max(Fraction(size[0], height), Fraction(size[1], width))
    covered = (math.floor(height * scale), math.floor(width * scale))
    assert size[0] in covered or size[1] in covered
    slack = covered[0] - size[0], covered[1] - size[1]
    top, left = (round(slack[i] / 2) if crop is None else int(crop[i] * (slack[i] + 1)) for i in (0, 1))
    want = np.asarray(image.resize(covered[::-1], Image.Resampling.BILINEAR)).astype(int)[top : top + size[0], left : left + size[1]]
    pixels, time_ids = prepare_images([image, image], size, crop)
    assert pixels.shape == (2, 3, *size)
    assert time_ids.tolist() == [[height, width, top, left, *size]] * 2
    assert np.abs(_to_bytes(pixels[0]).astype(int) - want).max() <= 1


def test_time_ids_of_a_portrait_and_a_panorama_in_one_bucket() -> None:
    portrait, panorama = _noise(60, 40), _noise(20, 100)
    _, time_ids = prepare_images([portrait, panorama], (24, 32))
    # 60 x 40 to 48 x 32, 24 rows too many; 20 x 100 to 24 x 120, 88 columns too many
    assert time_ids.tolist() == [[60, 40, 12, 0, 24, 32], [20, 100, 0, 44, 24, 32]]


def test_each_image_has_its_own_flip() -> None:
    image = _noise(8, 12)
    plain, _ = prepare_images([image, image], (8, 12))
    for flips in ((True, False), (False, True), (True, True)):
        pixels, _ = prepare_images([image, image], (8, 12), flips=flips)
        for got, before, flip in zip(pixels, plain, flips, strict=True):
            assert torch.equal(got, before.flip(-1) if flip else before)


def test_extreme_aspect_needs_little_memory() -> None:
    pixels, time_ids = prepare_images([Image.new("RGB", (16_384, 1), "white"), _noise(9, 9)], (512, 512))
    assert pixels[0].min() == 1
    assert time_ids[0].tolist() == [1, 16_384, 0, (16_384 * 512 - 512) / 2, 512, 512]


def test_wrong_settings_are_named() -> None:
    image = _noise(8, 8)
    with pytest.raises(ValueError, match="size is 8 x 0"):
        prepare_images([image, image], (8, 0))
    with pytest.raises(ValueError, match=r"crop is \(0\.5, 1\.0\)"):
        prepare_images([image, image], (8, 8), crop=(0.5, 1.0))
