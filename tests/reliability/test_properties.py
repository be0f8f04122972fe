"""Whatever the input, what reads it answers with a value or with the one error that is its own."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffpref.data.images import ImageError, ImageLimits, decode_image, image_size
from diffpref.data.json_rows import read_json
from diffpref.data.schema import caption_problem, label_problem, number_problem, probability, share_of_votes
from diffpref.data.stored import FileImage, path_problem
from diffpref.training.config import TrainConfig
from diffpref.training.settings import build, names_of, parse_flags, read_yaml

T = TypeVar("T")
FEW, MANY = 40, 2_000  # cases per property
LIMITS = ImageLimits(max_pixels=100_000, max_side=2_000, max_bytes=100_000)


def answer(call: Callable[[], T], refusal: type[Exception]) -> tuple[T | None, str]:
    """(value, "") or (None, why it was refused); any other error is a defect."""
    try:
        return call(), ""
    except refusal as error:
        return None, str(error) or pytest.fail("a refusal says why")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


def encoded(kind: str) -> bytes:
    """A small valid file."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


FILES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP")}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with some bytes changed, taken out or put in; or no file at all."""
    data = bytearray(draw(st.sampled_from(list(FILES.values())) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if how == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif how == "insert":
            data[place:place] = draw(st.binary(max_size=20))
        else:
            del data[place:]
    return bytes(data)


def images(data: bytes) -> None:
    image, _ = answer(lambda: decode_image(data, LIMITS), ImageError)
    size, _ = answer(lambda: image_size(data, LIMITS), ImageError)
    if image is not None:
        assert image.mode == "RGB"
        assert size == image.size[::-1]
        assert 0 < image.width * image.height <= LIMITS.max_pixels


def labels_votes_and_captions(first: object, second: object) -> None:
    for found in (probability(first, second), probability(first, has_both=False), share_of_votes(first, second)):
        if isinstance(found, float):
            assert 0 <= found <= 1
            assert not math.isnan(found)
        else:
            assert all(isinstance(word, str) and word for word in found)
    for problem in (label_problem(first), number_problem(first), caption_problem(first)):
        assert problem is None or problem
    assert caption_problem(first) is not None or isinstance(first, str)


paths = st.lists(st.sampled_from(["..", ".", "", "a", "b.png", "~", "C:", "\\", "\0", "etc", "link", "x" * 300]), max_size=6).map("/".join)


def paths_stay_in_the_data_folder(name: object) -> None:
    home = _home()
    if path_problem(name) is None:
        assert isinstance(name, str)
        assert os.path.normpath(os.path.join(home, name)).startswith(str(home))
    if isinstance(name, str):
        try:
            found = FileImage((home,), name).read()
        except ImageError:
            return
        assert found == b"inside"


def _home() -> Path:
    """A data folder with a file, a link out of it, and a secret beside it."""
    if not hasattr(_home, "folder"):
        _home.keep = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
        outer = Path(_home.keep.name).resolve()  # type: ignore[attr-defined]
        (outer / "data" / "a").mkdir(parents=True)
        (outer / "secret.png").write_bytes(b"outside")
        (outer / "data" / "b.png").write_bytes(b"inside")
        (outer / "data" / "link").symlink_to(outer)
        (outer / "data" / "a" / "b.png").symlink_to(outer / "secret.png")
        _home.folder = outer / "data"  # type: ignore[attr-defined]
    return _home.folder  # type: ignore[attr-defined,no-any-return]


NAMES = names_of(TrainConfig)
values = scalars | st.lists(scalars, max_size=3) | st.sampled_from(["true", "1e400", "nan", "-1", "0", "lora", "none", "9" * 400])


def settings_are_taken_or_refused_by_name(given_settings: dict[str, object]) -> None:
    config, why = answer(lambda: build(TrainConfig, given_settings), ValueError)
    assert config is not None or any(name in why for name in NAMES)


def flags(words: list[str]) -> None:
    found, _ = answer(lambda: parse_flags(words, NAMES), ValueError)
    assert found is None or found.keys() <= set(NAMES)


yaml_text = st.lists(
    st.sampled_from(["seed", ": ", "\n", "- ", "[", "]", "{", "}", "&a ", "*a", "!!python/name:os.system", "2001-01-01", "0x", "|", ">"])
)


def config_files(text: str) -> None:
    path = _home() / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found, why = answer(lambda: read_yaml(path, ["seed"]), ValueError)
    assert "run.yaml" in why if found is None else found.keys() <= {"seed"}


json_lines = st.lists(
    st.dictionaries(st.sampled_from(["caption", "label_0", "x"]), anything.map(repr) | st.none() | st.floats(), max_size=3).map(
        lambda row: json.dumps(row).encode()
    )
    | st.binary(max_size=20)
    | st.sampled_from(
        [b"[", b"]", b"{}", b"null", b'{"x": 1', b"\xef\xbb\xbf", b"9" * 5000, b"[" * 2000, b'{"x": NaN}', rb'{"x": "\ud800"}']
    ),
    max_size=5,
)


def json_rows(lines: list[bytes]) -> None:
    path = _home() / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows, why = answer(lambda: read_json([path], lambda names: names), ValueError)
    if rows is None:
        assert "rows.jsonl" in why
    else:
        assert all(place in range(len(rows)) for place in rows.problems)
        assert all(len(column) == len(rows) for column in rows.columns.values())


PROPERTIES: dict[Callable[..., None], tuple[st.SearchStrategy[Any], ...]] = {
    images: (damaged(),),
    labels_votes_and_captions: (anything, anything),
    paths_stay_in_the_data_folder: (paths | st.text(max_size=30) | scalars,),
    settings_are_taken_or_refused_by_name: (st.dictionaries(st.sampled_from(NAMES), values, max_size=4),),
    flags: (st.lists(st.sampled_from([f"--{name}" for name in NAMES[:10]]) | st.text(max_size=12), max_size=6),),
    json_rows: (json_lines,),
    config_files: (yaml_text.map("".join) | st.text(max_size=60),),
}


def check(holds: Callable[..., None], number: int) -> int:
    """How many different inputs a property was tried with; always the same ones."""
    seen = set()

    def counted(values: tuple[Any, ...]) -> None:
        seen.add(repr(values))
        holds(*values)

    asked = settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    asked(given(st.tuples(*PROPERTIES[holds]))(counted))()
    return len(seen)


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
def test_property(holds: Callable[..., None]) -> None:
    assert check(holds, FEW) > FEW // 2


@pytest.mark.slow
def test_ten_thousand_cases() -> None:
    found = {holds.__name__: check(holds, MANY) for holds in PROPERTIES}
    print(sum(found.values()), "different inputs:", found)
    assert sum(found.values()) >= 10_000
