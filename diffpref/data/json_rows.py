"""JSON lines, and JSON arrays of objects, as rows. A line that is no object costs that line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from diffpref.data.rows import ListRows, files_identity
from diffpref.data.schema import Problem

MAX_LINE_BYTES = 16_000_000

_NAMES_FROM = 1000  # objects that are looked at to learn the names of the columns

Wanted = Callable[[Sequence[str]], Sequence[str]]
"""Names of all columns -> names of those to keep; raises ValueError when the form is not an accepted one."""


def read_json(paths: Sequence[Path], wanted: Wanted) -> ListRows:
    """The rows of `paths` in order, with the columns that `wanted` keeps. Paths of images are relative to the files' folder.

    Raises:
        ValueError: a file cannot be read, or `wanted` refuses the columns.
    """
    try:
        heads = itertools.islice(itertools.chain.from_iterable(map(_objects, paths)), _NAMES_FROM)
        seen = dict.fromkeys(name for found in heads if isinstance(found, dict) for name in found)
        names = list(wanted([name for name in seen if isinstance(name, str)]))
        columns: dict[str, list[object]] = {name: [] for name in names}
        problems: dict[int, Problem] = {}
        size = 0
        for found in itertools.chain.from_iterable(map(_objects, paths)):
            if isinstance(found, tuple):
                problems[size] = found
            row = found if isinstance(found, dict) else {}
            for name, column in columns.items():
                column.append(row.get(name))
            size += 1
    except OSError as error:
        raise ValueError(f"file {str(error.filename)!r} cannot be read: {error.strerror}") from error
    folder = paths[0].parent
    roots = dict.fromkeys([folder, *(folder / path.stem for path in paths)])  # HPDv2 keeps the images of train.json in train/
    return ListRows(columns, size, problems, tuple(roots), files_identity(paths))


def _objects(path: Path) -> Iterator[dict[str, object] | Problem]:
    """The objects of one file, or why one of them cannot be used."""
    with path.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"["):
            yield from map(_as_object, _array(path, file.read()))
            return
        for line in _lines(file.readline):
            if isinstance(line, tuple):
                yield line
            elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield _line_object(line)


def _lines(readline: Callable[[int], bytes]) -> Iterable[bytes | Problem]:
    while line := readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = readline(MAX_LINE_BYTES)
        yield "line", f"too long: more than {MAX_LINE_BYTES} bytes"


def _line_object(line: bytes) -> dict[str, object] | Problem:
    try:
        return _as_object(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return "line", f"not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:  # also raised for numbers of thousands of digits
        return "line", f"not JSON: {str(error)[:80]}"


def _as_object(found: object) -> dict[str, object] | Problem:
    return found if isinstance(found, dict) else ("line", f"not an object: {type(found).__name__}")


def _array(path: Path, data: bytes) -> Iterator[object]:
    """The items of an array one by one, so that a large file is never a large tree of objects."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error
    decoder, place = json.JSONDecoder(), _skip_blank(text, text.index("[") + 1)
    try:
        while text[place] != "]":
            found, place = decoder.raw_decode(text, place)
            yield found
            place = _skip_blank(text, place)
            if text[place] == ",":
                place = _skip_blank(text, place + 1)
            elif text[place] != "]":
                raise ValueError("a comma or the end of the array is missing")
    except (ValueError, RecursionError, IndexError) as error:
        reason = "it ends early" if isinstance(error, IndexError) else str(error)[:120]
        raise ValueError(
            f"file {str(path)!r} is not readable JSON from character {place} on: {reason}; it is damaged or incomplete"
        ) from error


def _skip_blank(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place
