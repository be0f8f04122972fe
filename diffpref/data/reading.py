"""Opens a source of pairs, wherever it lies, as rows: files, folders, archives, the hub, tables in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, get_args

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable

from diffpref.data.archives import read_archives
from diffpref.data.folders import pair_folders, read_folders
from diffpref.data.forms import COLUMN_FLAGS, FORMS, Layout, choose
from diffpref.data.json_rows import read_json
from diffpref.data.rows import Rows, TableRows, files_identity, plain_names
from diffpref.data.schema import RankedPairs, TiePolicy

Source: TypeAlias = str | Path | Dataset | pa.Table

PLACES = {"parquet": "*.parquet", "jsonl": "*.jsonl or *.json", "webdataset": "*.tar", "folder": "w/ and l/, or chosen/ and rejected/"}
"""Kinds of local data whose rows lie in files, by the name that `data_format` gives them, with what shows them."""

DATA_FORMATS = ("auto", *FORMS, *PLACES)

_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tar": "webdataset"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a source is to be read; the names are those of the settings of a run."""

    split: str = "train"
    data_format: str = "auto"
    given: Mapping[str, str] = field(default_factory=dict)  # caption_column, image_0_column, ... -> column in the data
    dataset_config_name: str | None = None
    ranked_pairs: RankedPairs = "all"
    choice_model: str | None = None
    dreamlike_pairs_only: bool = False
    tie_policy: TiePolicy = "drop"
    max_samples: int | None = None
    check_images: bool = True
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is not accepted, whatever the data holds."""
        choices = {"data_format": DATA_FORMATS, "ranked_pairs": get_args(RankedPairs), "tie_policy": get_args(TiePolicy)}
        for name, accepted in choices.items():
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"{name} is {value!r}, accepted: {', '.join(accepted)}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples is {self.max_samples}, accepted: 1 or more, or None for all")
        if self.choice_model and (label := self.given.get("label_column")):
            raise ValueError(f"label_column is {label!r} and choice_model {self.choice_model!r}: only one can decide; drop the other")

    @property
    def store(self) -> Path:
        """Where we keep what takes long to find out again."""
        return Path(self.cache_dir or datasets.config.HF_DATASETS_CACHE) / "diffpref"

    def layout(self, names: Sequence[str], where: str) -> Layout:
        """The form that the columns `names` of `where` fit. Raises ValueError if it is not exactly one."""
        return choose(names, where, self.data_format, self.given, self.choice_model)


def request_of(settings: object, **changes: Any) -> Request:
    """The request of a command's settings, which name its fields as `Request` does, but for max_train_samples and the columns."""
    own = {f.name: getattr(settings, f.name) for f in fields(Request) if hasattr(settings, f.name)}
    given = {flag: column for flag in COLUMN_FLAGS if (column := getattr(settings, flag, None)) is not None}
    return Request(**own | {"given": given, "max_samples": getattr(settings, "max_train_samples", None)} | changes)


def open_rows(source: Source, request: Request) -> tuple[Rows, Layout, str]:
    """(rows, what their columns mean, where they were found). Parquet and the hub's files become a memory-mapped copy in the cache.

    Raises:
        ValueError: the source does not exist, cannot be read, or does not show which form it has.
    """
    if isinstance(source, pa.Table):
        source = Dataset(InMemoryTable(source), fingerprint="in-memory")
    if isinstance(source, Dataset):
        return _from_table(source, request, "the dataset")
    path = Path(source).expanduser()
    if path.exists():
        try:
            return _open_path(path, request)
        except OSError as error:
            raise ValueError(f"{str(error.filename or path)!r} cannot be read: {error.strerror or error}") from error
    if _looks_like_path(str(source)):
        raise ValueError(f"{str(source)!r} does not exist; give a file, a folder or a hub id: {_accepted()}")
    if request.data_format in PLACES:
        raise ValueError(f"data_format is {request.data_format!r}, which is for local data, but {str(source)!r} is no local file or folder")
    return _from_table(_open_hub(str(source), request), request, f"the data set {str(source)!r}", is_stored=True)


def _accepted() -> str:
    return f"accepted are {', '.join(f'{kind} ({shown})' for kind, shown in PLACES.items())} and folders made by save_to_disk"


def _looks_like_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or Path(source).suffix in _SUFFIXES or source.count("/") > 1


def _open_path(path: Path, request: Request) -> tuple[Rows, Layout, str]:
    if request.dataset_config_name:
        raise ValueError(
            f"dataset_config_name is {request.dataset_config_name!r}, but {str(path)!r} is local data, which has none; drop it"
        )
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return _from_table(_open_saved(path, request.split), request, f"save_to_disk folder {str(path)!r}", (path,), is_stored=True)
    kind, files = find_files(path, request)
    where = f"{len(files)} files in {str(files[0].parent)!r}" if len(files) > 1 else repr(str(files[0]))
    if kind == "parquet":
        return _open_parquet(files, request, where)
    rows: Rows
    if kind == "jsonl":
        rows = read_json(files, lambda names: request.layout(names, where).needed)
    elif kind == "webdataset":
        rows = read_archives(files, request.store)
    else:
        rows = read_folders(files[0])
    return rows, request.layout(rows.names, where), f"{kind}: {where}"


def find_files(path: Path, request: Request) -> tuple[str, list[Path]]:
    """The kind of local data that `path` is (a key of PLACES) and its files of the split, or the folder itself.

    Raises:
        ValueError: it is none of them, or several; the message says what was seen.
    """
    if path.is_file():
        kind = _SUFFIXES.get(path.suffix.lower())
        if kind is None or (request.data_format in PLACES and kind != request.data_format):
            wanted = f" and data_format is {request.data_format!r}" if request.data_format in PLACES else ""
            raise ValueError(f"{str(path)!r} is a file of type {path.suffix!r}{wanted}; {_accepted()}")
        return kind, [path]
    seen = _seen(path, request.split)
    if request.data_format in PLACES:
        seen = {kind: files for kind, files in seen.items() if kind == request.data_format}
    if not seen:
        shown = f"data_format is {request.data_format!r}, but there is " if request.data_format in PLACES else ""
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{shown}no data of an accepted kind in {str(path)!r} (seen: {inside}); {_accepted()}")
    named = {kind: files for kind, files in seen.items() if kind == "folder" or _named_after(files, request.split)}
    seen = named if len(named) == 1 else seen  # reports and settings may lie beside the data
    if len(seen) > 1:
        described = "; ".join(f"{kind}: {', '.join(file.name for file in files[:3])}" for kind, files in seen.items())
        raise ValueError(
            f"{str(path)!r} holds several kinds of data ({described}). Name the one that is meant with data_format ({', '.join(seen)}), "
            f"or give the file itself"
        )
    [(kind, files)] = seen.items()
    if kind not in named and len(files) > 1:
        _log.warning("no file in %s is named after the split %r: all %d files are read", files[0].parent, request.split, len(files))
    return kind, files


def _seen(folder: Path, split: str) -> dict[str, list[Path]]:
    """Every kind of data in `folder` with its files of the split; `data/` in it counts too for parquet and archives."""
    found: dict[str, list[Path]] = {}
    for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
        files = _visible(folder, pattern) or _visible(folder / "data", pattern)
        if files:
            found[kind] = _named_after(files, split) or files
    lines = _visible(folder, "*.jsonl") + _visible(folder, "*.ndjson")
    documents = [path for path in _visible(folder, "*.json") if path.name != "dataset_infos.json"]
    of_split = [path for path in documents if path.stem == split]
    if lines:
        found["jsonl"] = _named_after(lines, split) or lines
    elif of_split or len(documents) == 1:
        found["jsonl"] = of_split or documents
    for place in (folder, folder / split):
        if place.is_dir() and pair_folders(place):
            found["folder"] = [place]
            break
    return found


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _named_after(files: Sequence[Path], split: str) -> list[Path]:
    """Files named after the split. A whole word wins: split `test` does not read `test_unique-0.parquet`."""
    name = re.escape(split)
    patterns = (rf"{name}[-.]", rf".*[-.]{name}[-.]", name)
    return next((chosen for pattern in patterns if (chosen := [path for path in files if re.match(pattern, path.name)])), [])


def _open_saved(folder: Path, split: str) -> Dataset:
    """A folder made by `save_to_disk`; a single dataset has no splits, so `split` does not act on it."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{str(folder)!r} looks like a save_to_disk folder but cannot be read: {error}; save it again") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"split is {split!r}, accepted for {str(folder)!r}: {', '.join(sorted(loaded))}")
    return loaded[split]


def _open_hub(name: str, request: Request) -> Dataset:
    try:
        return datasets.load_dataset(
            name, request.dataset_config_name, split=request.split, cache_dir=request.cache_dir and str(request.cache_dir)
        )
    except Exception as error:
        # The hub client raises its own, requests' and httpx's types; for the user they all mean: not available.
        raise hub_error(name, request.split, error) from error


def hub_error(name: str, split: str, error: Exception) -> ValueError:
    """What to do when a data set cannot be had from the hub."""
    return ValueError(
        f"{name!r} is no local file or folder, and loading split {split!r} of the data set of that name from the hub failed "
        f"({type(error).__name__}: {str(error).strip()[:300]}). Pick-a-Pic v1 and v2 are reported gone from their hub names. To use a "
        f"local copy, give its folder as train_data_dir, or set HF_HUB_OFFLINE=1 if it is in the hub's cache; docs/data.md lists the "
        f"accepted forms and sets to use instead"
    )


def _from_table(
    table: Dataset, request: Request, where: str, roots: tuple[Path, ...] = (), is_stored: bool = False
) -> tuple[Rows, Layout, str]:
    layout = request.layout(list(plain_names(table.features.arrow_schema)), where)
    identity = files_identity([Path(file["filename"]) for file in table.cache_files]) if is_stored else None
    return TableRows(table, roots, identity), layout, where


def _open_parquet(files: Sequence[Path], request: Request, where: str) -> tuple[Rows, Layout, str]:
    """Only the columns that are needed are copied to the cache."""
    common: dict[str, tuple[str, str | None]] = {}
    filled = []
    for index, path in enumerate(files):
        footer = _footer(path)
        fields = plain_names(footer.schema.to_arrow_schema())
        if len(files) > 1:
            request.layout(list(fields), repr(str(path)))  # names the file that differs from the others
        common = fields if index == 0 else {name: place for name, place in common.items() if fields.get(name) == place}
        filled += [str(path)] if footer.num_rows else []
    if not filled:
        raise ValueError(f"{where} has 0 rows, accepted: 1 or more; check the source and the split")
    layout = request.layout(list(common), where)
    columns = list(dict.fromkeys(common[name][0] for name in layout.needed))
    cache_dir = None if request.cache_dir is None else str(request.cache_dir)
    try:
        table = Dataset.from_parquet(filled, columns=columns, cache_dir=cache_dir)  # which fails at a file without rows
    except Exception as error:
        # The builder hides the cause and the file in its own exception types.
        raise ValueError(_conversion_failure(files, columns, error)) from error
    return TableRows(table, (files[0].parent,), files_identity(files)), layout, f"parquet: {where}"


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
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
