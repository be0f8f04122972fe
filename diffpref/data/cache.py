"""Latents and prompts that were encoded once, in a folder that many runs read.

    manifest.json                     what made them; a run compares it with its own settings
    latents-<checksum>.safetensors    moments (n, F, 2, C, h, w): mean and deviation; time_ids (n, F, 6); key (n, 2); sum (n, F).
                                      F = 2 has mirrored pictures too. All pictures of a file have one shape
    prompts-<checksum>.safetensors    the fields of Conditioning (n, ...); key (n, 2); sum (n, 1)
    index.safetensors                 in which file and row each picture of each pair lies; written last: with it a folder is complete

A picture is stored once per content and shape, a prompt once per text, however often they occur. A file is named after the checksum
of its bytes, so that files of an interrupted build can be trusted and kept. Files are mapped into memory: opening a folder reads its
index, and the pages that a batch touches can be dropped again. What is read is compared with its own CRC-32 each time: reading a
whole folder to find a flipped bit would take longer than many a training.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpref.core.types import Conditioning

MANIFEST, INDEX = "manifest.json", "index.safetensors"
VERSION = 2
LATENTS, PROMPTS = "latents", "prompts"

Key = bytes  # 16 bytes of BLAKE2


def key(*parts: bytes | str | int) -> Key:
    """The name of what the parts describe; no two lists of parts share one stream."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def picture_key(pair_id: str, position: int) -> Key:
    """A picture by its place in the data: `position` among those of its pair, as the source has them."""
    return key("picture", pair_id, position)


def content_key(data: bytes, shape: tuple[int, int]) -> Key:
    """A picture by its encoded bytes and the height and width to which it is brought."""
    return key("content", *shape, data)


def prompt_key(prompt: str) -> Key:
    """A prompt by its text."""
    return key("prompt", prompt)


def write_shard(folder: Path, kind: str, keys: Sequence[Key], tensors: Mapping[str, Tensor]) -> str:
    """Write n rows under their keys, complete or not at all; returns the name of the file. Raises OSError."""
    hidden = folder / f".{kind}-{uuid.uuid4().hex}.part"  # machines that share the folder may have equal process numbers
    entries = {name: x.contiguous() for name, x in tensors.items()}
    save_file({"key": as_int64(keys), "sum": _sums(kind, entries), **entries}, hidden)
    hidden.chmod(0o644)  # safetensors makes files that nobody else can read
    name = f"{kind}-{checksum(hidden)}.safetensors"
    hidden.replace(folder / name)
    return name


def _sums(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """CRC-32 of each row, for latents of each view of it: (n, F) or (n, 1) int64."""
    rows = [list(x.flatten(0, 1) if kind == LATENTS else x) for _, x in sorted(tensors.items())]
    views = next(iter(tensors.values())).shape[1] if kind == LATENTS else 1
    return torch.tensor([crc(parts) for parts in zip(*rows, strict=True)]).reshape(-1, views)


def crc(parts: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors, one after the other."""
    found = 0
    for part in parts:
        found = zlib.crc32(part.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found


def checksum(path: Path) -> str:
    """32 hex digits over the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def stored(folder: Path, kind: str) -> dict[Key, tuple[str, int]]:
    """What the files of one kind hold: key -> (file, row). Names only are trusted: `damaged` reads everything."""
    found = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: (path.name, row) for row, name in enumerate(_as_bytes(file.get_tensor("key")))})
    return found


def damaged(folder: Path, check_sums: bool = True) -> list[str]:
    """Files whose bytes are not those that were written; without check_sums only those that are cut short, which costs next to nothing."""
    is_bad = _has_changed if check_sums else _is_cut
    return [path.name for path in sorted(folder.glob("*-*.safetensors")) if is_bad(path)]


def _has_changed(path: Path) -> bool:
    return path.stem.partition("-")[2] != checksum(path)


def _is_cut(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return False
    except SafetensorError:
        return True


def write_index(folder: Path, pictures: Mapping[Key, Key]) -> None:
    """Complete the folder. `pictures`: picture key -> content key, which must be stored; pictures of earlier builds stay."""
    latents, prompts = stored(folder, LATENTS), stored(folder, PROMPTS)
    names = sorted({name for name, _ in (*latents.values(), *prompts.values())})
    places = {picture: latents[content] for picture, content in _indexed(folder).items() if content in latents}
    places |= {picture: latents[content] for picture, content in pictures.items()}
    number = {name: i for i, name in enumerate(names)}
    tensors = {}
    for kind, found in ((LATENTS, places), (PROMPTS, prompts)):
        keys = sorted(found)
        tensors[f"{kind}.key"] = as_int64(keys)
        tensors[f"{kind}.place"] = torch.tensor([(number[found[k][0]], found[k][1]) for k in keys], dtype=torch.int32).reshape(-1, 2)
    hidden = folder / f".index-{os.getpid()}.part"
    content = {place: key for key, place in latents.items()}
    tensors["content"] = as_int64(content[places[k]] for k in sorted(places))
    facts = {"files": json.dumps([[name, (folder / name).stat().st_size] for name in names])}
    save_file(tensors, hidden, facts | {"sum": str(crc(tensors[name] for name in sorted(tensors)))})
    hidden.chmod(0o644)
    hidden.replace(folder / INDEX)


def _indexed(folder: Path) -> dict[Key, Key]:
    """Picture key -> content key of the index that is there."""
    if not (folder / INDEX).exists():
        return {}
    with safe_open(folder / INDEX, "pt") as file:
        return dict(zip(_as_bytes(file.get_tensor(f"{LATENTS}.key")), _as_bytes(file.get_tensor("content")), strict=True))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What made the folder; None if nothing has. Raises ValueError for a file that is not ours."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        if found["format"] != VERSION:
            raise ValueError(f"latent_cache {str(folder)!r} has format {found['format']}, accepted: {VERSION}; build it again")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"latent_cache {str(folder)!r}: {MANIFEST} cannot be read ({error}); build the cache again elsewhere") from error
    return dict(found)


def differences(made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Every value in which a cache and a run differ, with both: "resolution is 512 in the cache and 1024 in this run"."""
    names = [*wanted, *(name for name in made_with if name not in wanted)]
    return [
        f"{name} is {made_with.get(name)} in the cache and {wanted.get(name)} in this run"
        for name in names
        if made_with.get(name) != wanted.get(name)
    ]


@dataclass(frozen=True, eq=False)
class LatentStore:
    """An open cache folder."""

    folder: Path
    manifest: dict[str, Any]
    files: list[str]
    pictures: Places
    prompts: Places
    _open: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # (file, tensor) -> its pages

    @classmethod
    def open(cls, folder: str | Path) -> LatentStore:
        """Read manifest and index. Raises ValueError when the folder is no complete cache, or files are missing or cut short."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None or not (folder / INDEX).exists():
            state = "is no cache of latents" if manifest is None else "is not complete"
            raise ValueError(f"latent_cache {str(folder)!r} {state}; build it: diffpref cache, with the settings of this run")
        try:
            with safe_open(folder / INDEX, "pt") as file:
                listed, wanted = json.loads(file.metadata()["files"]), int(file.metadata()["sum"])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, TypeError, KeyError):
            tensors, wanted = {}, -1
        if crc(tensors.values()) != wanted:
            raise ValueError(f"latent_cache {str(folder)!r}: {INDEX} is damaged; delete this file, and diffpref cache makes it anew")
        pictures, prompts = (Places(tensors[f"{kind}.key"].numpy(), tensors[f"{kind}.place"].numpy()) for kind in (LATENTS, PROMPTS))
        for name, size in listed:
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(
                    f"latent_cache {str(folder)!r}: {name} is missing or does not have its {size} bytes; build the cache again, which "
                    "makes what is missing"
                )
        return cls(folder, manifest, [name for name, _ in listed], pictures, prompts)

    def moments(self, places: np.ndarray, views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Moments (n, 2, C, h, w) and time_ids (n, 6), both float32, of n pictures of one shape at `places` (n, 2).

        Raises ValueError when they are not what was written.
        """
        rows = [self._row(file, ("moments", "time_ids"), row, view) for (file, row), view in zip(places.tolist(), views, strict=True)]
        return torch.stack([moments for moments, _ in rows]).float(), torch.stack([time_ids for _, time_ids in rows])

    def content(self, place: Sequence[int]) -> Key:
        """Content key of the picture at a place."""
        return _as_bytes(self._tensor(int(place[0]), "key")[int(place[1])][None])[0]

    def prompt(self, prompt: str) -> Conditioning:
        """The encoded prompt, (1, 1, ...). Raises ValueError when it is not there, or not what was written."""
        ((file, row),) = self.prompts.find([prompt_key(prompt)]).tolist()
        if file < 0:
            raise ValueError(f"latent_cache {str(self.folder)!r} lacks the prompt {prompt!r}; {ADD}")
        names = sorted(self.manifest["prompt_fields"])
        return Conditioning(**{name: x[None, None] for name, x in zip(names, self._row(file, names, row), strict=True)})

    def _row(self, file: int, names: Sequence[str], row: int, view: int | None = None) -> list[Tensor]:
        """A row of tensors of a file, whose names are in order, or a view of it, compared with its sum."""
        found = [self._tensor(file, name)[row] for name in names]
        if view is not None:
            found = [x[view] for x in found]
        if crc(found) != int(self._tensor(file, "sum")[row, view or 0]):
            raise ValueError(
                f"latent_cache {str(self.folder)!r}: {self.files[file]} is damaged at row {row}; mend it: diffpref cache with the "
                "settings of this run and --check_sums true"
            )
        return found

    def _tensor(self, file: int, name: str) -> Tensor:
        """A tensor of a file, whose pages are read when they are touched."""
        if (file, name) not in self._open:
            try:
                with safe_open(self.folder / self.files[file], "pt") as opened:
                    self._open[file, name] = opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"latent_cache {str(self.folder)!r}: {self.files[file]} cannot be read ({error})") from error
        return self._open[file, name]


ADD = "add it: diffpref cache, with the settings of this run"


@dataclass(frozen=True, eq=False)
class Places:
    """Keys in rising order and where each lies."""

    key: np.ndarray  # (N, 2) int64, see as_int64
    place: np.ndarray  # (N, 2) int32: file and row

    def find(self, keys: Sequence[Key]) -> np.ndarray:
        """(n, 2) int32: file and row of each key, -1 and -1 for what is not there."""
        wanted = as_int64(keys).numpy()
        at = np.searchsorted(self.key[:, 0], wanted[:, 0])
        at[at == len(self.key)] = 0
        found = self.place[at] if len(self.key) else np.zeros((len(wanted), 2), np.int32)
        known = (self.key[at] == wanted).all(1) if len(self.key) else np.zeros(len(wanted), bool)
        return np.where(known[:, None], found, np.int32(-1))


def as_int64(keys: Iterable[Key]) -> Tensor:
    """Keys as (n, 2) int64 whose first column rises as the keys do."""
    raw = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return torch.from_numpy((raw ^ np.uint64(1 << 63)).view(np.int64))  # turns the order of unsigned numbers into that of signed ones


def _as_bytes(rows: Tensor) -> list[Key]:
    raw = (rows.numpy().view(np.uint64) ^ np.uint64(1 << 63)).astype(">u8").tobytes()
    return [raw[i : i + 16] for i in range(0, len(raw), 16)]


def fields_of(cond: Conditioning) -> dict[str, Tensor]:
    """The fields that are present."""
    return {f.name: x for f in fields(cond) if (x := getattr(cond, f.name)) is not None}
