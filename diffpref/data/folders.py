"""Folders of pairs: `w/` and `l/`, or `chosen/` and `rejected/`, with files of equal stems and their captions as text files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffpref.data.images import ImageError
from diffpref.data.rows import ListRows, digest_of
from diffpref.data.schema import MAX_CAPTION_LENGTH, Problem
from diffpref.data.stored import FileImage

SIDES = (("w", "l"), ("chosen", "rejected"))
CAPTION_SUFFIXES = (".txt", ".caption")

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
"""Also formats that are refused: such a file is a bad row, not one that was never there."""


def pair_folders(folder: Path) -> list[tuple[Path, tuple[str, str]]]:
    """The folders that hold both sides of pairs: `folder` itself, or those in it; with the names of the sides."""
    for candidates in ([folder], sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))):
        found = [(path, sides) for path in candidates for sides in SIDES if all((path / side).is_dir() for side in sides)]
        if found:
            return found
    return []


def read_folders(folder: Path) -> ListRows:
    """The pairs below `folder`, chosen first, ordered by name. A file without a partner or a caption costs its pair.

    Raises:
        ValueError: a folder has both kinds of names for its sides.
    """
    columns: dict[str, list[object]] = {"chosen": [], "rejected": [], "caption": []}
    problems: dict[int, Problem] = {}
    found = pair_folders(folder)
    doubled = [path for path in {path for path, _ in found} if len([1 for other, _ in found if other == path]) > 1]
    if doubled:
        raise ValueError(f"folder {str(doubled[0])!r} has w/, l/ and also chosen/, rejected/; leave one pair of them in it")
    for path, sides in found:
        prefix = "" if path == folder else f"{path.name}/"
        files = [_by_stem(path / side, f"{prefix}{side}/") for side in sides]
        beside = _by_stem(path, prefix)
        for stem in sorted({stem for side in files for stem, names in side.items() if _images(names)}):
            row = len(columns["caption"])
            names = [_images(side.get(stem, [])) for side in files]
            problem = _partner_problem(stem, sides, names)
            caption = None if problem else _caption(folder, [*files, beside], stem)
            if isinstance(caption, tuple):
                problem = caption
            if problem:
                problems[row] = problem
            for column, value in zip(columns, [*(side[0] if side else None for side in names), caption], strict=True):
                columns[column].append(value if not problem else None)
    size = len(columns["caption"])
    return ListRows(columns, size, problems, (folder,), digest_of(str(folder.absolute()), columns, problems))


def _by_stem(folder: Path, prefix: str) -> dict[str, list[str]]:
    """{stem: its files below the data folder, in order of name}; hidden files are left alone."""
    found: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        found.setdefault(os.path.splitext(name)[0], []).append(prefix + name)
    return found


def _images(names: Iterable[str]) -> list[str]:
    return [name for name in names if os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES]


def _partner_problem(stem: str, sides: tuple[str, str], names: list[list[str]]) -> Problem | None:
    for column, side, found in zip(("jpg_0", "jpg_1"), sides, names, strict=True):
        if len(found) > 1:
            return column, f"duplicate stem: {', '.join(found)}"
        if not found:
            other = next(name for side_names in names for name in side_names)
            return column, f"no partner: {other} has no {side}/{stem} image"
    return None


def _caption(folder: Path, places: list[Mapping[str, list[str]]], stem: str) -> str | Problem:
    """The one caption of a pair, beside either image or in the folder above; several must agree."""
    found: dict[str, str] = {}
    for place in places:
        for name in place.get(stem, []):
            if os.path.splitext(name)[1].lower() in CAPTION_SUFFIXES:
                text = _text(folder, name)
                if isinstance(text, tuple):
                    return text
                found.setdefault(text, name)
    if not found:
        return "caption", f"no caption: there is no {stem}.txt or {stem}.caption"
    if len(found) > 1:
        return "caption", f"captions differ: {', '.join(found.values())}"
    return next(iter(found))


def _text(folder: Path, name: str) -> str | Problem:
    try:
        path = FileImage((folder,), name).path()
        with path.open("rb") as file:
            data = file.read(4 * MAX_CAPTION_LENGTH + 5)
    except ImageError as error:
        return "caption", str(error)
    except OSError as error:
        return "caption", f"cannot be read: {name!r}, {error.strerror}"
    if len(data) > 4 * MAX_CAPTION_LENGTH + 4:  # a character takes at most 4 bytes, and there may be a line end
        return "caption", f"too long: {name!r} has more than {MAX_CAPTION_LENGTH} characters"
    try:
        return data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        return "caption", f"not UTF-8: {name!r}, {error.reason} at byte {error.start}"
