"""Encoded image bytes to pixels: a strict decoder for untrusted files, and the geometry of a pair.

Conversion to RGB is defined: EXIF rotation is applied; transparency, also of a palette, is composited onto white; 16 bits
become 8 by their high byte; CMYK, grey and 1-bit images go through Pillow's own conversion. ICC profiles are not applied:
every image is taken as sRGB.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")

_PNG_END = b"IEND\xaeB`\x82"
_PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that can hold an orientation
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap width and height
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"

# `warnings.catch_warnings` changes the filters of the whole process, so threads that open images take turns.
_open_lock = threading.Lock()


class ImageError(ValueError):
    """An image that is refused; the message reads "kind: detail" or "kind"."""


@dataclass(frozen=True)
class ImageLimits:
    """What the header of an image may claim before any pixel is decoded."""

    max_pixels: int = 32_000_000
    """Width times height."""
    max_side: int = 16_384
    """Longest side in pixels."""
    max_bytes: int = 64_000_000
    """Size of the encoded file in bytes."""


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode one JPEG, PNG or WebP file to an RGB image.

    Size, format and number of frames are checked on the header, before memory for the pixels is allocated.

    Raises:
        ImageError: the bytes are not one complete image of an accepted format within `limits`.
        ValueError: Pillow's process-wide switch for truncated images is on.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, accepted: False. With it truncated images would pass as grey areas; "
            "remove the line that sets it (some packages do so on import)."
        )
    with _open(data, limits) as image:
        _check_header(image, limits)
        if not _is_complete(data, str(image.format)):
            raise ImageError(f"truncated: the end of the {image.format} file is missing")
        return _decode(image)


def image_size(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) that `decode_image` would give, in pixels and after EXIF rotation, from the header alone.

    Only a PNG that keeps metadata behind its pixels has to be decoded. Damage behind the header goes unnoticed.

    Raises:
        ImageError: the header is not that of an accepted image within `limits`.
    """
    with _open(data, limits) as image:
        _check_header(image, limits)
        if image.format == "PNG" and _has_late_text(data):
            width, height = _decode(image).size
            return height, width
        try:
            orientation = Image.Image.getexif(image).get(_ORIENTATION)  # the method of PNG files would decode the pixels
        except Exception as error:
            raise ImageError(f"cannot be decoded: {error}") from error
        width, height = image.size
        return (width, height) if orientation in _TURNED else (height, width)


def _has_late_text(data: bytes) -> bool:
    """Whether a PNG has chunks behind its pixels that can hold an orientation."""
    position, kinds = 8, set()
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        if kind in _PNG_TEXTS and b"IDAT" in kinds:
            return True
        kinds.add(kind)
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """Read the header only. Everything Pillow raises on hostile bytes becomes an ImageError."""
    if not data:
        raise ImageError("empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(f"file too large: {len(data)} bytes, at most {limits.max_bytes}")
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ImageError("not a JPEG, PNG or WebP image") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(f"too many pixels: {error}") from error
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(f"broken header: {error}") from error


def _check_header(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise ImageError(f"several frames: {frames}, accepted 1")
    if image.format not in FORMATS:
        raise ImageError(f"not a JPEG, PNG or WebP image: {image.format}")
    if min(width, height) < 1:
        raise ImageError(f"no pixels: {width} x {height}")
    if max(width, height) > limits.max_side:
        raise ImageError(f"side too long: {width} x {height}, at most {limits.max_side}")
    if width * height > limits.max_pixels:
        raise ImageError(f"too many pixels: {width} x {height}, at most {limits.max_pixels}")


def _is_complete(data: bytes, image_format: str) -> bool:
    """Whether the file has its end. Pillow accepts some files that lost only their last bytes; we do not."""
    if image_format == "PNG":
        return _PNG_END in data
    if image_format == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)


def _decode(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more, depending on where the damage lies.
        kind = "truncated" if "truncated" in str(error) else "cannot be decoded"
        raise ImageError(f"{kind}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its high byte, as Pillow itself reduces colour of 16 bits; its own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64).clip(0, 65_535)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def prepare_images(
    images: Sequence[Image.Image],
    size: tuple[int, int],
    crop: tuple[float, float] | None = None,
    flips: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Bring the U RGB images of a group to one `size` (height H, width W) with one shared crop.

    Each image is resized (bilinear, antialiased) until it just covers H x W, then an H x W window is cut out. `crop` None takes
    the centre; (top, left), each in [0, 1), places the window at these fractions of each image's own slack. `flips` (U,) mirror the
    images left and right before cropping, so that the offsets describe an image as it is shown. An H x W image passes untouched.

    Returns pixels (U, 3, H, W) float32 in [-1, 1] and time_ids (U, 6) float32: original height and width, crop top and left
    in pixels of the resized image, H, W.

    Raises:
        ValueError: `size` or `crop` is out of range.
    """
    if min(size) < 1:
        raise ValueError(f"size is {size[0]} x {size[1]}, accepted: whole numbers of pixels from 1, for example 512 x 512")
    if crop is not None and not all(0 <= fraction < 1 for fraction in crop):
        raise ValueError(f"crop is {crop}, accepted: None for the centre, or (top, left) with both in [0, 1)")
    prepared = [_prepare(image, size, crop, flip) for image, flip in zip(images, flips or [False] * len(images), strict=True)]
    pixels, time_ids = zip(*prepared, strict=True)
    return torch.stack(pixels), torch.stack(time_ids)


def _prepare(image: Image.Image, size: tuple[int, int], crop: tuple[float, float] | None, flip: bool) -> tuple[Tensor, Tensor]:
    width, height = image.size
    target_height, target_width = size
    if width * target_height >= height * target_width:  # relatively wider than the target: its height decides
        resized_height, resized_width = target_height, target_height * width // height
    else:
        resized_height, resized_width = target_width * height // width, target_width
    top, left = _offset(resized_height - target_height, crop, 0), _offset(resized_width - target_width, crop, 1)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Resizing only the window gives the same pixels as resizing everything, without the memory that a 16384 x 1 image would take.
    scale_x, scale_y = width / resized_width, height / resized_height
    right, bottom = min(width, (left + target_width) * scale_x), min(height, (top + target_height) * scale_y)
    window = image.resize((target_width, target_height), Image.Resampling.BILINEAR, box=(left * scale_x, top * scale_y, right, bottom))
    pixels = torch.from_numpy(np.array(window)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
    time_ids = torch.tensor([height, width, top, left, target_height, target_width], dtype=torch.float32)
    return pixels, time_ids


def _offset(slack: int, crop: tuple[float, float] | None, axis: int) -> int:
    """First row or column of the window, 0..slack."""
    return round(slack / 2) if crop is None else int(crop[axis] * (slack + 1))
