"""Broken and hostile data: a bad row costs that row and changes nothing else, bad data ends the run before a model is opened."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.hostile_files import encoded, noise, png_with_header, text_bomb
from tests.reliability.faults import Fault
from tests.reliability.harness import Outcome, Trainer, leftovers

Tried = Callable[..., None]
Row = dict[str, Any]
Reasons = list[tuple[str, str]]
MODEL = Fault("exit", "open", r"diffusion_pytorch_model|model\.safetensors", lasting=True)
"""The process is gone, with exit code 0, as soon as it opens the weights of a model."""


def truncated() -> list[tuple[Row, str, str]]:
    """Files that end early, in three formats."""
    files = [encoded(77, kind) for kind in ("JPEG", "PNG", "WEBP")]
    return [({"jpg_1": data[: int(len(data) * share)]}, "jpg_1", "") for data in files for share in (0.01, 0.5, 0.99)]


def no_pictures() -> list[tuple[Row, str, str]]:
    """Bytes that are no picture, and no bytes."""
    wanted = [(None, "null"), (b"", "empty"), (b"no picture", "not a JPEG"), (b"\xff\xd8\xff", ""), (bytes(1000), "not a JPEG")]
    return [({"jpg_0": data}, "jpg_0", reason) for data, reason in wanted]


def bombs() -> list[tuple[Row, str, str]]:
    """Small files that would become large pictures."""
    frames = {"save_all": True, "append_images": [noise(1), noise(2)]}
    files = [
        (encoded(Image.new("RGB", (8000, 8000), "red").convert("P")), "too many pixels"),
        (png_with_header(12_961, 12_961), "too many pixels"),
        (png_with_header(20_000, 20_000), "too many pixels"),
        (png_with_header(100_001, 1), "side too long"),
        (encoded(0, "PNG", **frames), "several frames"),
        (encoded(0, "WEBP", **frames), "several frames"),
        (text_bomb(), "broken header"),
    ]
    return [({"jpg_0": data}, "jpg_0", reason) for data, reason in files]


def no_labels() -> list[tuple[Row, str, str]]:
    """Labels that are no probabilities, and a pair of one picture. The ties among them are counted elsewhere."""
    wrong = [
        (None, 0.0, "null"),
        (float("nan"), 0.0, "not finite"),
        (2.0, 0.0, "outside"),
        (1.0, 1.0, "labels do not sum to 1"),
        (float("inf"), 0.0, "not finite"),
        (-0.1, 1.1, "outside"),
    ]
    same = encoded(5)
    pair = ({"jpg_0": same, "jpg_1": same, "image_0_uid": "one", "image_1_uid": "one"}, "image_1_uid", "identical images")
    return [*(({"label_0": a, "label_1": b}, "label_", reason) for a, b, reason in wrong), pair]


def no_captions() -> list[tuple[Row, str, str]]:
    """Captions that say nothing, or too much."""
    return [
        ({"caption": text}, "caption", why) for text, why in ((None, "null"), ("", "empty"), (" \n", "empty"), ("x" * 10_001, "too long"))
    ]


def other_formats() -> list[tuple[Row, str, str]]:
    """Whole pictures in formats whose decoders are not to be reached."""
    return [({"jpg_1": encoded(1, kind)}, "jpg_1", "not a JPEG") for kind in ("EPS", "GIF", "TIFF", "BMP", "PPM", "ICO")]


BAD_ROWS = {"D1": truncated, "D2": no_pictures, "D3": bombs, "D7": no_labels, "D8": no_captions, "S5": other_formats}


@pytest.fixture
def trained(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., Outcome]:
    """trained(rows or a path, *faults, **settings) -> how a run on them into tmp_path/run ended. Every picture is looked at first."""

    def go(data: Sequence[Row] | Path, *given: Fault, resume: bool = False, **settings: Any) -> Outcome:
        path = data
        if not isinstance(data, Path):
            path = tmp_path / "data.parquet"
            pq.write_table(pa.Table.from_pylist(list(data)), path)
        common = {"train_data_dir": path, "cache_dir": tmp_path / "cache", "check_images": True}
        return make_trainer(**common | settings).run(tmp_path / "run", *given, resume=resume)

    return go


def rejected(folder: Path) -> list[Row]:
    """What the run lists as bad."""
    return [json.loads(line) for line in (folder / "rejected_rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.reliability_full(case)) for case in BAD_ROWS])
def test_bad_rows_cost_themselves(
    case: str, rows: list[Row], trained: Callable[..., Outcome], trainer: Trainer, whole: str, tmp_path: Path, tried: Tried
) -> None:
    """Put between the rows of a run, they are listed with their reasons, and the run ends as it does without them, bit for bit."""
    found = BAD_ROWS[case]()
    bad = [rows[12 + i] | change for i, (change, _, _) in enumerate(found)]
    mixed = [*bad[:2], *rows[:3], *bad[2:5], rows[3], *bad[5:], *rows[4:12]]
    before = peak_of_a_run(trained, rows, tmp_path) if case == "D3" else 0
    outcome = trained(mixed)
    assert outcome.code == 0, outcome.errors
    assert trainer.result(tmp_path / "run") == whole
    assert leftovers(tmp_path / "run") == []
    if case == "D3":
        assert outcome.peak_mb is not None
        assert outcome.peak_mb - before < 100
    listed = rejected(tmp_path / "run")
    assert [line["row"] for line in listed] == [mixed.index(row) for row in bad]
    for line, (_, column, reason) in zip(listed, found, strict=True):
        assert line["column"].startswith(column)
        assert line["reason"].startswith(reason), line
        tried(case, 0)


def peak_of_a_run(trained: Callable[..., Outcome], rows: list[Row], folder: Path) -> float:
    """MB of memory that the good rows alone take; the folder is free again."""
    peak = trained(rows[:12]).peak_mb
    assert peak is not None
    (folder / "run").rename(folder / "good")
    return peak


@pytest.mark.reliability_full("D7")
def test_ties_are_counted(rows: list[Row], trained: Callable[..., Outcome], trainer: Trainer, whole: str, tmp_path: Path) -> None:
    tie = {"label_0": 0.5, "label_1": 0.5}
    outcome = trained([rows[20] | tie, *rows[:4], rows[21] | tie, *rows[4:12]])
    assert outcome.code == 0, outcome.errors
    assert "2 ties" in outcome.errors
    assert trainer.result(tmp_path / "run") == whole


def turned(image: Image.Image) -> bytes:
    """Stored upside down, with the EXIF mark that says so."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(image.rotate(180), "PNG", exif=exif)


COLOURS: dict[str, Callable[[Image.Image], bytes]] = {
    "opaque": lambda image: encoded(image.convert("RGBA")),
    "EXIF": turned,
    "WebP": lambda image: encoded(image, "WEBP", lossless=True, exact=True),
    "ICC": lambda image: encoded(image, "PNG", icc_profile=b"no profile" * 20),
}
GREYS: dict[str, Callable[[Image.Image], bytes]] = {
    "one channel": encoded,
    "palette": lambda image: encoded(image.convert("P")),
    "16 bit": lambda image: encoded(Image.fromarray(np.asarray(image).astype(np.uint16) * 257)),
    "grey and alpha": lambda image: encoded(image.convert("LA")),
}


@pytest.mark.reliability_full("D4")
def test_the_same_pixels_in_another_form_train_the_same(
    rows: list[Row], trained: Callable[..., Outcome], trainer: Trainer, whole: str, tmp_path: Path, tried: Tried
) -> None:
    def run(name: str, form: Callable[[Image.Image], bytes], is_grey: bool) -> str:
        images = {n: [Image.open(io.BytesIO(row[n])).convert("L" if is_grey else "RGB") for row in rows[:8]] for n in ("jpg_0", "jpg_1")}
        outcome = trained([row | {n: form(images[n][i]) for n in images} for i, row in enumerate(rows[:8])])
        assert outcome.code == 0, (name, outcome.errors)
        result = trainer.result((tmp_path / "run").rename(tmp_path / name))
        tried("D4", 0)
        return result

    for name, form in COLOURS.items():
        assert run(name, form, is_grey=False) == whole, name
    grey = run("grey as RGB", lambda image: encoded(image.convert("RGB")), is_grey=True)
    assert grey != whole
    for name, form in GREYS.items():
        assert run(name, form, is_grey=True) == grey, name
    bits = run("bits", lambda image: encoded(image.convert("1").convert("L")), is_grey=True)
    assert run("1 bit", lambda image: encoded(image.convert("1")), is_grey=True) == bits != grey


@pytest.mark.reliability_full("D5")
def test_pictures_of_any_shape_are_trained_on(rows: list[Row], trained: Callable[..., Outcome], tmp_path: Path, tried: Tried) -> None:
    shapes = [(1, 1), (300, 7), (7, 300), (16, 24), (500, 500), (31, 33), (32, 64)]
    data = [row | {"jpg_0": encoded(Image.open(io.BytesIO(row["jpg_0"])).resize(shape))} for row, shape in zip(rows, shapes, strict=False)]
    outcome = trained(data)
    assert outcome.code == 0, outcome.errors
    assert not (tmp_path / "run" / "rejected_rows.jsonl").exists() or not rejected(tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert np.isfinite(losses).all()
    for _ in shapes:
        tried("D5", 0)


def refused(outcome: Outcome, folder: Path, *words: str) -> None:
    """The run ended with one line for its user, before a model was opened and anything was written."""
    assert outcome.code == 2, outcome.errors
    assert outcome.errors.count("Traceback") == 0
    for word in words:
        assert word in outcome.errors, (word, outcome.errors)
    assert not folder.exists() or [path.name for path in folder.iterdir()] == ["rejected_rows.jsonl"]


@pytest.mark.reliability_full("D6")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caption": "captions"}, ("'caption' (nearest: captions)",)),
        ({"jpg_0": "image_a"}, ("'jpg_0'", "Accepted")),
        ({"label_0": "label", "label_1": "other"}, ("label",)),
    ],
    ids=["caption", "picture", "labels"],
)
def test_renamed_columns(
    change: dict[str, str], words: tuple[str, ...], rows: list[Row], trained: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = trained([{change.get(name, name): value for name, value in row.items()} for row in rows], MODEL)
    refused(outcome, tmp_path / "run", "Found: ", *words)


@pytest.mark.reliability_full("D6")
@pytest.mark.parametrize("change", [{"jpg_0": "/etc/passwd"}, {"label_0": "left"}, {"caption": ["a"]}], ids=["picture", "label", "caption"])
def test_columns_of_another_type(change: Row, rows: list[Row], trained: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = trained([row | change for row in rows], MODEL)
    (name,) = change
    refused(outcome, tmp_path / "run", f"24  {name}", "none of 24 rows can be used")


@pytest.mark.reliability_full("D8")
def test_odd_captions_are_captions(rows: list[Row], trained: Callable[..., Outcome], tried: Tried) -> None:
    odd = ["x" * 10_000, "<b>&amp;</b>", "\x07\x1b[31m", "\N{CAT}" * 100, "\u202egnp.elif", "a\nb", "{0} %s ${HOME}"]
    outcome = trained([row | {"caption": text} for row, text in zip(rows, odd, strict=False)])
    assert outcome.code == 0, outcome.errors
    for _ in odd:
        tried("D8", 0)


@pytest.mark.reliability_full("D9")
def test_few_rows(rows: list[Row], trained: Callable[..., Outcome], make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    one = trained(rows[:1], max_train_samples=1)
    assert one.code == 0, one.errors
    (tmp_path / "run").rename(tmp_path / "one")
    few = trained(rows[:3], train_batch_size=4)
    assert few.code == 0, few.errors
    (tmp_path / "run").rename(tmp_path / "few")
    path = tmp_path / "none.parquet"
    pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), path)
    refused(trained(path, MODEL), tmp_path / "run", "0 rows")


@pytest.mark.reliability_full("D10")
def test_data_that_is_damaged_or_changes(
    rows: list[Row], trained: Callable[..., Outcome], trainer: Trainer, tmp_path: Path, tried: Tried
) -> None:
    path = tmp_path / "pairs" / "train-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    refused(trained(path.parent, MODEL), tmp_path / "run", "train-0.parquet' cannot be read")
    tried("D10", 0)
    path.write_bytes(good)
    assert trained(path.parent, Fault("SIGKILL", "backward", count=9), check_images=False).code == -9
    pq.write_table(pa.Table.from_pylist([rows[0] | {"label_0": 1 - rows[0]["label_0"], "label_1": rows[0]["label_0"]}, *rows[1:]]), path)
    changed = trained(path.parent, resume=True, check_images=False)
    assert changed.code == 2, changed.errors
    assert "train_data_dir" in changed.last_line
    assert "other pairs than the checkpoint was trained on" in changed.last_line
    tried("D10", 0)


@pytest.mark.reliability_full("D13")
def test_too_many_bad_rows_end_the_run(rows: list[Row], trained: Callable[..., Outcome], tmp_path: Path) -> None:
    bad = [row | {"jpg_0": b"no picture"} for row in rows[:10]] + [rows[10] | {"caption": ""}]
    outcome = trained([*bad, *rows[11:]], MODEL, max_train_samples=20)
    refused(outcome, tmp_path / "run", "11 of 24 rows (45.8 %) are bad", "10  jpg_0        not a JPEG", "1  caption      empty")
