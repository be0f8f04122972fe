"""Archives in webdataset layout: consecutive members `<key>.<field>` make a row. Indexed once, read by offset, never unpacked."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from diffpref.data.rows import ListRows, digest_of, files_identity, number_in
from diffpref.data.schema import Problem
from diffpref.data.stored import ArchivedImage

_VERSION = 1  # of the stored index; a change of what is stored asks for another
_MAX_TEXT_BYTES = 1_000_000
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_TEXT_SUFFIXES = (".txt", ".caption")

Fields = dict[str, object]
Places = dict[str, tuple[str, int, int]]
"""Name of an image -> member, offset, size: how it stands in a stored index, as JSON."""


def read_archives(paths: Sequence[Path], cache_dir: Path) -> ListRows:
    """The rows of `paths` in order: images by place, everything else in memory. The index of each archive is kept in `cache_dir`.

    A row is made of `<key>.json` (an object), text files (`<key>.caption.txt`, `<key>.label_0.txt`) and images (`<key>.jpg_0` or
    `<key>.jpg_0.jpg`). Keys may repeat in another archive.

    Raises:
        ValueError: an archive is damaged, ends early or is compressed.
    """
    columns: dict[str, list[object]] = {}
    problems: dict[int, Problem] = {}
    size = 0
    # Reading the headers of hundreds of archives takes minutes.
    for path in tqdm(paths, desc="indexing archives", delay=5, mininterval=2, leave=False, disable=len(paths) < 2):
        rows, bad = _index(path, cache_dir)
        problems |= {size + place: problem for place, problem in bad.items()}
        for fields, places in rows:
            row = fields | {name: ArchivedImage(path, *place) for name, place in places.items()}
            for name in row.keys() - columns.keys():
                columns[name] = [None] * size
            for name, column in columns.items():
                column.append(row.get(name))
            size += 1
    return ListRows(columns, size, problems, identity=files_identity(paths))


def _index(path: Path, cache_dir: Path) -> tuple[list[tuple[Fields, Places]], dict[int, Problem]]:
    """The rows of one archive and which of them are bad, from the stored index if the archive has not changed since."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"archive {str(path)!r} cannot be read: {error.strerror}") from error
    stored = cache_dir / "archives" / f"{digest_of(_VERSION, str(path.absolute()), stat.st_size, stat.st_mtime_ns)}.json"
    try:
        rows, problems = json.loads(stored.read_text(encoding="utf-8"))
        return rows, {int(row): (column, reason) for row, (column, reason) in problems.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or damaged: made anew
        pass
    rows, problems = [], {}
    for row in _rows(path):
        if isinstance(row[0], str):
            problems[len(rows)] = row
        rows.append(({}, {}) if isinstance(row[0], str) else row)
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        hidden = stored.with_name(f".{stored.name}.{os.getpid()}")
        hidden.write_text(json.dumps([rows, problems]), encoding="utf-8")
        hidden.replace(stored)
    except OSError:
        pass  # a full or read-only cache costs time at the next start, nothing else
    return rows, problems


class _Member(tarfile.TarInfo):
    """A header whose size leads forward: Python before 3.11.14 follows a negative one in circles (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.HeaderError("negative size")
        return int(super()._block(count))  # type: ignore[misc]  # what the standard library calls for every size


def _rows(path: Path) -> Iterator[tuple[Fields, Places] | Problem]:
    key: str | None = None
    members: list[tuple[str, tarfile.TarInfo]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # the list would grow with every member
                its_key, field = _split(member.name)
                if its_key != key and members:
                    yield _row(members, file)
                    members = []
                key = its_key
                if not member.isdir():
                    members.append((field, member))
            if members:
                yield _row(members, file)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no member begins at byte {archive.offset}")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"archive {str(path)!r} cannot be read: {error}; it is damaged, incomplete or compressed (only plain .tar can be read in "
            f"place): copy it again, or unpack a .tar.gz"
        ) from error


def _split(name: str) -> tuple[str, str]:
    """(key, field) of a member: the field begins at the first dot of the last part of the path."""
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}/{stem}", field.lower()


def _row(members: Sequence[tuple[str, tarfile.TarInfo]], file: BinaryIO) -> tuple[Fields, Places] | Problem:
    """One row, or why it cannot be used. Nothing of it is written anywhere, so a name can lead nowhere."""
    fields: Fields = {}
    places: Places = {}
    seen: set[str] = set()
    for field, member in members:
        problem = _member_problem(field, member, seen)
        if problem is not None:
            return problem
        if field == "json" or field == "txt" or field.endswith(_TEXT_SUFFIXES):
            found = _text_fields(field, member, file)
            if isinstance(found, tuple):
                return found
            fields |= found
        else:
            name = next((field.removesuffix(suffix) for suffix in _IMAGE_SUFFIXES if field.endswith(suffix)), field)
            places[name] = (member.name, member.offset_data, member.size)
    return fields, places


def _member_problem(field: str, member: tarfile.TarInfo, seen: set[str]) -> Problem | None:
    if PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts:
        return field, f"unsafe name: {member.name!r}"
    if not member.isreg() or member.sparse is not None:
        return field, f"not a plain file: {member.name!r}"
    if field in seen:
        return field, f"duplicate member: {member.name!r}"
    seen.add(field)
    return None


def _text_fields(field: str, member: tarfile.TarInfo, file: BinaryIO) -> Fields | Problem:
    if member.size > _MAX_TEXT_BYTES:
        return field, f"too long: {member.size} bytes, at most {_MAX_TEXT_BYTES}"
    file.seek(member.offset_data)
    data = file.read(member.size)
    try:
        text = data.decode("utf-8-sig")
        if field != "json":
            name = field.rsplit(".", 1)[0] if "." in field else "caption"
            is_number = name.endswith(("_0", "_1")) or name == "margin"
            return {name: number_in(text) if is_number else text.strip("\r\n")}
        found = json.loads(text)
    except UnicodeDecodeError as error:
        return field, f"not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return field, f"not JSON: {str(error)[:80]}"
    return found if isinstance(found, dict) else (field, f"not an object: {type(found).__name__}")
