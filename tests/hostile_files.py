"""Files that nobody sends by accident: pictures that no encoder writes, archives, pickles, and safetensors that lie."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int) -> Image.Image:
    """12 x 16 pixels of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def encoded(image: Image.Image | int, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file; a seed makes a picture of noise."""
    buffer = io.BytesIO()
    (noise(image) if isinstance(image, int) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with_header(width: int, height: int, *extra: bytes) -> bytes:
    """A grey PNG with any header; its pixel data is a stub, which a check of the header never reaches."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + png_chunk(b"IDAT", zlib.compress(b"\0" * 64)) + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small PNG with a comment of 100 MB, compressed."""
    return png_with_header(8, 8, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 1)))


def write_tar(path: Path, members: dict[str, Any]) -> Path:
    """An archive of {name: bytes, text, object or TarInfo}; what follows a | in a name only tells two of the same name apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
            info = tarfile.TarInfo(member.split("|")[0])
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def safetensors(content: Any, size: int | None = None, body: bytes = b"") -> bytes:
    """A safetensors file with any header and any claim about its length."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE_SAFETENSORS = {
    "empty": b"",
    "huge header": safetensors({"a": F32}, 2**62, bytes(8)),
    "long header": safetensors({"a": F32}, 200_000_000, bytes(8)),
    "no JSON": safetensors(b"{" * 1000),
    "overlap": safetensors({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, body=bytes(12)),
    "out of range": safetensors({"a": F32 | {"data_offsets": [0, 8_000_000]}}, body=bytes(8)),
    "shape lies": safetensors({"a": F32 | {"shape": [2**40, 2**40]}}, body=bytes(8)),
    "unknown dtype": safetensors({"a": F32 | {"dtype": "OBJECT"}}, body=bytes(8)),
    "names of paths": safetensors({"../../canary": F32, "/canary": F32 | {"data_offsets": [8, 16]}}, body=bytes(16)),
    "a million tensors": None,
    "negative": safetensors({"a": F32 | {"data_offsets": [-8, 0]}}, body=bytes(8)),
}


def hostile_safetensors(case: str) -> bytes:
    """The file of a case; the one with a million tensors of no elements is a header of 60 MB."""
    known = HOSTILE_SAFETENSORS[case]
    if known is not None:
        return known
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return safetensors(("{" + ",".join(f'"{i}":{entry}' for i in range(1_000_000)) + "}").encode(), body=bytes(16))


HOSTILE_YAML = {
    "object": "seed: !!python/object/apply:os.mkdir [canary]",
    "alias": "a: &a [x, x]\nseed: [*a, *a]",
    "deep list": "seed: " + "[" * 20_000,
    "deep mapping": "seed: " + "{a: " * 5_000,
    "large": "x" * 200_000,
    "no date": "seed: 2020-99-99",
    "list as key": "? [a]\n: b",
    "null": "\x00",
}
