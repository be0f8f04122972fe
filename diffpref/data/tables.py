"""Opens a source of pairs as one memory-mapped table with our column names, without reading image bytes."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable

from diffpref.data.schema import COLUMNS, IMAGE_COLUMNS, REQUIRED_COLUMNS

Source: TypeAlias = str | Path | Dataset | pa.Table

_DECIDING = ("caption", "label_0", "label_1", "image_0_uid", "image_1_uid", "user_id")

_log = logging.getLogger(__name__)


def open_table(source: Source, split: str, columns: Mapping[str, str] | None, cache_dir: str | Path | None) -> Dataset:
    """The rows of `source` as a Dataset in Arrow format that holds only the columns we know, under our names.

    `source` is a parquet file, a folder of parquet files, a `save_to_disk` folder, a hub id, or a table in memory. Parquet and
    hub sources are converted once to a memory-mapped Arrow copy under `cache_dir` (of about the same size).

    Raises:
        ValueError: the source does not exist or cannot be read, or a required column is missing.
    """
    if isinstance(source, Dataset):
        return _project(source, columns)
    if isinstance(source, pa.Table):
        return _project(Dataset(InMemoryTable(source), fingerprint="in-memory"), columns)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"source {str(path)!r} is a file of type {path.suffix!r}, accepted: .parquet; convert it, or give a folder")
        return _open_parquet([path], columns, cache_dir)
    if path.is_dir():
        return _open_folder(path, split, columns, cache_dir)
    if _looks_like_path(str(source)):
        raise ValueError(f"source {str(source)!r} does not exist; give a parquet file, a folder of them, a save_to_disk folder or a hub id")
    return _project(_open_hub(str(source), split, cache_dir), columns)


def _looks_like_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.endswith(".parquet") or source.count("/") > 1


def _open_folder(folder: Path, split: str, columns: Mapping[str, str] | None, cache_dir: str | Path | None) -> Dataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _project(_open_saved(folder, split), columns)
    files = _visible_parquet(folder) or _visible_parquet(folder / "data")
    if not files:
        raise ValueError(
            f"source {str(folder)!r} is a folder without pairs, accepted: *.parquet in it or in its data/ folder, or a folder made "
            f"by save_to_disk; check the path"
        )
    return _open_parquet(_files_of_split(files, split), columns, cache_dir)


def _visible_parquet(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def _files_of_split(files: list[Path], split: str) -> list[Path]:
    """Files named after the split, or all. An exact first word wins: split `test` does not read `test_unique-0.parquet`."""
    exact = re.compile(re.escape(split) + r"[-.]")
    chosen = [path for path in files if exact.match(path.name)] or [path for path in files if path.name.startswith(split)]
    if not chosen:
        _log.warning("no parquet file in %s starts with the split name %r: all %d files are read", files[0].parent, split, len(files))
    return chosen or files


def _open_saved(folder: Path, split: str) -> Dataset:
    """A folder made by `save_to_disk`; a single dataset has no splits, so `split` does not act on it."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"source {str(folder)!r} looks like a save_to_disk folder but cannot be read: {error}; save it again") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"split is {split!r}, accepted for {str(folder)!r}: {', '.join(sorted(loaded))}")
    return loaded[split]


def _open_hub(name: str, split: str, cache_dir: str | Path | None) -> Dataset:
    try:
        return datasets.load_dataset(name, split=split, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:
        # The hub client raises its own, requests' and httpx's types; for the user they all mean: not available.
        raise ValueError(
            f"source {name!r} is no local file or folder, and loading split {split!r} of the dataset of that name from the hub failed "
            f"({type(error).__name__}: {str(error).strip()[:300]}). Pick-a-Pic v1 and v2 are reported gone from their hub names. "
            f"To use a local copy, put its parquet files into one folder and give source=/path/to/folder; columns as in Pick-a-Pic v2: "
            f"{', '.join(COLUMNS)}"
        ) from error


def _open_parquet(files: Sequence[Path], columns: Mapping[str, str] | None, cache_dir: str | Path | None) -> Dataset:
    common: list[str] = []
    for index, path in enumerate(files):
        names = _footer_names(path)
        found_columns(names, columns, str(path))
        common = names if index == 0 else [name for name in common if name in names]
    theirs = list(found_columns(common, columns, str(files[0].parent)).values())
    try:
        table = Dataset.from_parquet([str(path) for path in files], columns=theirs, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:
        # The builder hides the cause and the file in its own exception types.
        raise ValueError(_conversion_failure(files, theirs, error)) from error
    return _project(table, columns)


def _footer_names(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"parquet file {str(path)!r} cannot be read: {error}; it is damaged or incomplete, copy it again") from error


def _conversion_failure(files: Sequence[Path], columns: list[str], error: Exception) -> str:
    """Names the damaged file by reading each one; only done after a failure."""
    for path in files:
        try:
            for _ in pq.ParquetFile(path).iter_batches(batch_size=256, columns=columns):
                pass
        except (OSError, pa.ArrowException) as cause:
            return f"parquet file {str(path)!r} cannot be read: {cause}; it is damaged or incomplete, copy it again"
    return (
        f"the parquet files in {str(files[0].parent)!r} can be read one by one but not joined ({error.__cause__ or error}); "
        f"check that all have the same column types, and the free space of the cache"
    )


def _project(table: Dataset, columns: Mapping[str, str] | None) -> Dataset:
    """Keep the columns we know and give them our names; no data is copied.

    In Arrow format rows come back as stored, whatever decoding the source's Image feature asks for.
    """
    found = found_columns(table.column_names, columns, "the dataset")
    renames = {theirs: ours for ours, theirs in found.items() if ours != theirs}
    projected = table.select_columns(list(found.values())).with_format("arrow")
    return projected.rename_columns(renames) if renames else projected


def found_columns(names: Iterable[str], columns: Mapping[str, str] | None, where: str) -> dict[str, str]:
    """{our name: their name} of the columns present among `names`.

    Raises:
        ValueError: `columns` uses an unknown name of ours, or a required or mapped column is missing.
    """
    present, mapping = list(names), dict(columns or {})
    unknown = [ours for ours in mapping if ours not in COLUMNS]
    if unknown:
        raise ValueError(f"columns has the unknown name {unknown[0]!r}{_nearest(unknown[0], COLUMNS)}; accepted: {', '.join(COLUMNS)}")
    wanted = {ours: mapping.get(ours, ours) for ours in COLUMNS}
    missing = [ours for ours in COLUMNS if wanted[ours] not in present and (ours in REQUIRED_COLUMNS or ours in mapping)]
    if missing:
        details = ", ".join(f"{wanted[ours]!r}{_nearest(wanted[ours], present)}" for ours in missing)
        raise ValueError(
            f"columns missing in {where}: {details}. Found: {', '.join(present) or 'none'}. Expected: {', '.join(REQUIRED_COLUMNS)}. "
            f"Map other names with columns={{our name: name in the data}}, for example columns={{{missing[0]!r}: 'other_name'}}"
        )
    _check_distinct(wanted, present)
    return {ours: theirs for ours, theirs in wanted.items() if theirs in present}


def _check_distinct(wanted: Mapping[str, str], present: Sequence[str]) -> None:
    users: dict[str, str] = {}
    for ours, theirs in wanted.items():
        if theirs in present and theirs in users:
            raise ValueError(f"columns maps both {users[theirs]!r} and {ours!r} to {theirs!r}; give each its own column")
        users[theirs] = ours


def _nearest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


def metadata(table: Dataset) -> dict[str, list[object]]:
    """The columns that decide about a row, as Python lists of (N,) values; image bytes are not touched."""
    names = [name for name in _DECIDING if name in table.column_names]
    scanned: pa.Table = table.select_columns(names)[:]
    return {name: scanned.column(name).to_pylist() for name in names}


def encoded_images(table: Dataset, rows: Sequence[int]) -> list[tuple[object, object]]:
    """The stored values of jpg_0 and jpg_1 at `rows`, not decoded and not checked."""
    found: pa.Table = table.select_columns(list(IMAGE_COLUMNS))[list(rows)]
    return list(zip(*(found.column(name).to_pylist() for name in IMAGE_COLUMNS), strict=True))
