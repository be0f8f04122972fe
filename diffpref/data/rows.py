"""The rows of a source before anything is decided about them: columns under their own names, images left where they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from diffpref.data.schema import Problem
from diffpref.data.stored import ArchivedImage, FileImage

Cell = tuple[int, int]
"""A place in a column: the row, and the position in that row's list, -1 for a column that holds no lists."""


class Rows(Protocol):
    """M rows of named columns. A reader makes one of them; all that follows is the same for every source."""

    names: list[str]
    problems: Mapping[int, Problem]  # rows that could not be read
    identity: str | None  # changes when the source changes; None when that cannot be told

    def __len__(self) -> int:
        """M, bad rows included."""

    def values(self, name: str) -> list[object]:
        """A column as Python values (M,); None where a row lacks it. Not for columns of encoded images."""

    def numbers(self, name: str) -> np.ndarray | None:
        """A column as float64 (M,), NaN where a row lacks it; lists of one number count. None if it holds anything else."""

    def image_names(self, name: str) -> list[object] | None:
        """Names (M,) of the images of a column that stay as long as the source does, lists of them for lists.

        None when the images lie in the rows themselves and have no names.
        """

    def holds_lists(self, name: str) -> bool:
        """Whether each value of a column is a list."""

    def sizes(self, name: str) -> list[int | None]:
        """Lengths (M,) of the lists of a column; None for what is no list."""

    def stored(self, name: str, cells: Sequence[Cell]) -> list[object]:
        """The images at `cells`: bytes, a place to read them from, or whatever the source has there."""

    def at(self, row: int, names: Sequence[str]) -> dict[str, object]:
        """Some columns of one row."""


_IMAGE_OR_TEXT = re.compile(r"\.(jpe?g|png|webp|txt)$", re.IGNORECASE)
_NUMBER_AS_TEXT = re.compile(r"(_[01]|^margin)$")


class TableRows:
    """Rows of a `datasets` table in Arrow format, memory-mapped or in memory.

    Names lose what the webdataset format adds to them: the suffix of a file (`jpg_0.jpg` is jpg_0, and the number in
    `label_0.txt` is a number), and the members of a `json` column count as columns.
    """

    def __init__(self, table: Dataset, roots: tuple[Path, ...] = (), identity: str | None = None) -> None:
        self.table = table.with_format("arrow")
        self.roots = roots
        self.identity = identity
        self.problems: Mapping[int, Problem] = {}
        self.fields = plain_names(table.features.arrow_schema)
        self.names = list(self.fields)
        self._views: dict[str, Dataset] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def _view(self, column: str) -> Dataset:
        if column not in self._views:
            self._views[column] = self.table.select_columns([column])
        return self._views[column]

    def _type(self, name: str) -> pa.DataType:
        column, member = self.fields[name]
        found = self.table.features.arrow_schema.field(column).type
        return found if member is None else found.field(found.get_field_index(member)).type

    def values(self, name: str) -> list[object]:
        """See Rows."""
        column, member = self.fields[name]
        found: list[object] = self._view(column)[:].column(0).to_pylist()
        if member is not None:
            return [value.get(member) if isinstance(value, dict) else None for value in found]
        if column != name and _NUMBER_AS_TEXT.search(name):
            return [number_in(value) for value in found]
        return found

    def numbers(self, name: str) -> np.ndarray | None:
        """See Rows."""
        kind = _element(self._type(name))
        column, _ = self.fields[name]
        is_number_as_text = column != name and _NUMBER_AS_TEXT.search(name)
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_number_as_text):
            return None
        return as_numbers(self.values(name))

    def image_names(self, name: str) -> list[object] | None:
        """See Rows."""
        kind = _element(self._type(name))
        return self.values(name) if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None

    def holds_lists(self, name: str) -> bool:
        """See Rows."""
        return _is_list(self._type(name))

    def sizes(self, name: str) -> list[int | None]:
        """See Rows."""
        if not self.holds_lists(name):
            return [None] * len(self)
        chunks = self._view(self.fields[name][0]).iter(batch_size=64)  # a selected table is copied when it is read
        return [size for chunk in chunks for size in pc.list_value_length(chunk.column(0)).to_pylist()]

    def stored(self, name: str, cells: Sequence[Cell]) -> list[object]:
        """See Rows."""
        column, member = self.fields[name]
        rows = sorted({row for row, _ in cells})
        read: pa.Table = self._view(column)[rows]
        at = {row: place for place, row in enumerate(rows)}
        found = []
        for row, position in cells:
            value = read.column(0)[at[row]]
            if position >= 0:
                value = value[position] if value.is_valid else None
            value = None if value is None else value.as_py()
            found.append(placed(value.get(member) if member is not None and value else value, self.roots))
        return found

    def at(self, row: int, names: Sequence[str]) -> dict[str, object]:
        """See Rows."""
        found = {}
        for name in names:
            column, member = self.fields[name]
            value = self._view(column)[[row]].column(0)[0].as_py()
            found[name] = value.get(member) if member is not None and value else value
        return found


class ListRows:
    """Rows in Python lists: text, numbers, paths and places in archives; encoded images only where they are few."""

    def __init__(
        self,
        columns: Mapping[str, list[object]],
        size: int,
        problems: Mapping[int, Problem] | None = None,
        roots: tuple[Path, ...] = (),
        identity: str | None = None,
    ) -> None:
        self.columns = columns
        self.names = list(columns)
        self.size = size
        self.problems: Mapping[int, Problem] = problems or {}
        self.roots = roots
        self.identity = identity

    def __len__(self) -> int:
        """Number of rows."""
        return self.size

    def values(self, name: str) -> list[object]:
        """See Rows."""
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray | None:
        """See Rows."""
        found = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in self.columns[name]]
        if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in found):
            return None
        return as_numbers(found)

    def image_names(self, name: str) -> list[object] | None:
        """See Rows."""
        found = self.columns[name]
        if any(map(_is_embedded, found)):
            return None
        return [f"{v.archive.name}/{v.member}" if isinstance(v, ArchivedImage) else v for v in found]

    def holds_lists(self, name: str) -> bool:
        """See Rows."""
        return any(isinstance(value, list) for value in self.columns[name])

    def sizes(self, name: str) -> list[int | None]:
        """See Rows."""
        return [len(value) if isinstance(value, list) else None for value in self.columns[name]]

    def stored(self, name: str, cells: Sequence[Cell]) -> list[object]:
        """See Rows."""
        column = self.columns[name]
        values = (column[row] if position < 0 else column[row][position] for row, position in cells)  # type: ignore[index]
        return [placed(value, self.roots) for value in values]

    def at(self, row: int, names: Sequence[str]) -> dict[str, object]:
        """See Rows."""
        return {name: self.columns[name][row] for name in names}


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _element(kind: Any) -> pa.DataType:
    """The type of what a list holds, or `kind` itself."""
    return kind.value_type if _is_list(kind) else kind


def placed(value: object, roots: tuple[Path, ...]) -> object:
    """`value`, or the file that it names when there is a data folder to look in."""
    if roots and isinstance(value, str):
        return FileImage(roots, value)
    if roots and isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return FileImage(roots, value["path"])
    return value


def _is_embedded(value: object) -> bool:
    """Whether a value holds an encoded image, or a list of them, and no name of one."""
    if isinstance(value, list):
        return any(map(_is_embedded, value))
    return isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)


def plain_names(schema: pa.Schema) -> dict[str, tuple[str, str | None]]:
    """{name that people use: (column, member of it or None)} for tables that come out of webdataset archives; others stay."""
    fields: dict[str, tuple[str, str | None]] = {}
    for column in schema:
        fields.setdefault(_IMAGE_OR_TEXT.sub("", column.name), (column.name, None))
    if "json" in schema.names and pa.types.is_struct(schema.field("json").type):
        for member in schema.field("json").type:
            fields.setdefault(member.name, ("json", member.name))
    return fields


def plain_lists(batch: Mapping[str, list[object]]) -> dict[str, list[object]]:
    """The same for columns that are Python lists, with the numbers that stand as text in files."""
    columns: dict[str, list[object]] = {}
    for name, values in batch.items():
        plain = _IMAGE_OR_TEXT.sub("", name)
        is_number_as_text = plain != name and _NUMBER_AS_TEXT.search(plain)
        columns.setdefault(plain, [number_in(value) for value in values] if is_number_as_text else values)
    members = [value if isinstance(value, dict) else {} for value in batch.get("json", [])]
    for name in dict.fromkeys(name for found in members for name in found):
        columns.setdefault(name, [found.get(name) for found in members])
    return columns


def number_in(value: object) -> object:
    """The number that a text file holds, or `value` as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def as_numbers(values: Sequence[object]) -> np.ndarray:
    """Float64 (M,) from numbers, lists of one number and None; what is none of these becomes NaN."""
    out = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, int | float):
            try:
                out[place] = value
            except OverflowError:  # a whole number beyond float64
                out[place] = np.inf
    return out


def digest_of(*parts: object) -> str:
    """32 hex digits over the text of `parts`."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def files_identity(paths: Sequence[Path]) -> str | None:
    """32 hex digits over names, sizes and times of change; None if there are no files."""
    if not paths:
        return None
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return digest_of(*stats)
