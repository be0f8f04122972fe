"""A data file must not decide which local files are opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffpref.data.images import ImageError, decode_image
from diffpref.data.stored import ArchivedImage, FileImage, image_bytes, path_problem

LEADING_OUT = [
    ("/etc/passwd", "absolute path"),
    ("C:\\x.png", "absolute path"),
    ("\\\\host\\share\\x.png", "absolute path"),
    ("../x.png", "outside the data folder"),
    ("a/../../x.png", "outside the data folder"),
    ("https://example.org/x.png", "a URL"),
    ("file:x.png", "a URL"),
    ("data:image/png;base64,AAAA", "a URL"),
    ("", "not a path"),
    ("x\0.png", "not a path"),
    (None, "null"),
    (3, "not a path"),
    (["x.png"], "not a path"),
]


@pytest.mark.parametrize(("name", "kind"), LEADING_OUT)
@pytest.mark.reliability("S4")
def test_names_that_no_image_may_have(name: object, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"secret")
    assert str(path_problem(name)).split(":", 1)[0] == kind
    if isinstance(name, str):
        with pytest.raises(ImageError, match=kind):
            FileImage((tmp_path / "data",), name).read()


def test_files_below_the_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "x.png").write_bytes(b"x")
    (tmp_path / "data" / "a" / "link.png").symlink_to("../x.png")
    for name in ("x.png", "./x.png", "a/../x.png", "a/link.png"):
        assert image_bytes(FileImage((tmp_path / "data",), name)) == b"x"
    assert FileImage((tmp_path / "no", tmp_path / "data"), "x.png").read() == b"x"


@pytest.mark.reliability("S4")
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "data-2").mkdir()
    (tmp_path / "data-2" / "x").write_bytes(b"secret")
    (data / "file").symlink_to(tmp_path / "secret")
    (data / "folder").symlink_to(tmp_path)
    (data / "neighbour").symlink_to(tmp_path / "data-2")
    for name in ("file", "folder/secret", "folder/data/../secret", "neighbour/x"):
        with pytest.raises(ImageError, match="outside the data folder"):
            FileImage((data,), name).read()


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "loop").symlink_to("loop")
    for name, kind in (
        ("pipe", "not a file"),
        (".", "not a file"),
        ("no", "no such file"),
        ("loop", "no such file"),
        ("x" * 300, "no such"),
    ):
        with pytest.raises(ImageError, match=kind):
            FileImage((tmp_path,), name).read()
    assert FileImage((tmp_path,), "no").signature() is None


def test_large_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(64_000_001)
    for image in (FileImage((tmp_path,), "large.png"), ArchivedImage(tmp_path / "large.png", "x", 0, 64_000_001)):
        with pytest.raises(ImageError, match="file too large"):
            image.read()


def test_an_archive_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"0123")
    assert ArchivedImage(tmp_path / "x.tar", "x", 1, 2).read() == b"12"
    with pytest.raises(ImageError, match="truncated"):
        ArchivedImage(tmp_path / "x.tar", "x", 3, 2).read()


def test_decoded_pictures_lose_nothing(encode: Any) -> None:
    picture = decode_image(encode(3))
    assert decode_image(image_bytes(picture)).tobytes() == picture.tobytes()
    assert isinstance(picture, Image.Image)
