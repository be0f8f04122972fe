"""The two geometries against the processors they stand for, and where they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffpref.scorers.preprocessing import LongestSidePad, ShortestSideCrop, normalise
from tests.scorers import straight_line as plain

Pictures = tuple[Image.Image, ...]


def clip_processor(size: int) -> object:
    """transformers' CLIP processor that works with Pillow, whatever this release calls it."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.mark.parametrize("size", [28, 37])
def test_crop_is_that_of_the_clip_processor(size: int, pictures: Pictures) -> None:
    processor, ours = clip_processor(size), ShortestSideCrop(size)
    for image in (p for p in pictures if p.mode != "RGBA"):  # its releases disagree about transparency
        wanted = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(normalise(ours.image(image)[None]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("torchvision", [False, True])
def test_crop_is_the_formula(torchvision: bool, pictures: Pictures) -> None:
    for image in pictures:
        ours = normalise(ShortestSideCrop(28, torchvision).image(image)[None])
        torch.testing.assert_close(ours, plain.crop_input(image, 28, torchvision), rtol=0, atol=1e-6)


def test_conventions_of_the_crop_differ_on_an_odd_margin() -> None:
    image = Image.linear_gradient("L").resize((28, 31)).convert("RGB")  # a margin of 3: offset 1 or 2
    first, second = (ShortestSideCrop(28, torchvision).image(image) for torchvision in (False, True))
    assert torch.equal(first[:, 1:], second[:, :-1])
    assert not torch.equal(first, second)


def test_pixels_are_resized_like_images_up_to_the_rounding_of_pillow(pictures: Pictures) -> None:
    for image in pictures:
        image = image.convert("RGB")
        pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
        for geometry in (ShortestSideCrop(28), ShortestSideCrop(28, torchvision=True)):
            eight_bits = geometry.image(image) / 255  # rounded after each of two passes
            torch.testing.assert_close(geometry.pixels(pixels)[0], eight_bits, rtol=0, atol=5 / 255)


@pytest.mark.parametrize("antialias", [True, False])
def test_pad_is_the_formula(antialias: bool, pictures: Pictures) -> None:
    for image in pictures:
        ours = normalise(LongestSidePad(28, antialias).image(image)[None])
        torch.testing.assert_close(ours, plain.pad_input(image, 28, antialias), rtol=0, atol=1e-6)


def test_pad_keeps_the_whole_picture_in_the_middle_of_black() -> None:
    padded = LongestSidePad(28).image(Image.new("RGB", (56, 20), "white"))
    assert padded.shape == (3, 28, 28)
    torch.testing.assert_close(padded[:, 9:19], torch.ones(3, 10, 28), rtol=0, atol=1e-5)
    assert padded[:, :9].abs().max() == 0
    assert padded[:, 19:].abs().max() == 0


def test_smaller_picture_of_the_right_longer_side_is_padded_too() -> None:
    assert LongestSidePad(28).image(Image.new("RGB", (28, 3))).shape == (3, 28, 28)


def test_thread_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="1 x 300000 is too long and narrow"):
        ShortestSideCrop(224).image(Image.new("1", (1, 300_000)))
