"""Released weight files of scorers: where they are, what is in them, and their checksum. Nothing in a file is executed.

A scorer's files come from its hub repository, from a local folder, or from one named file; what goes with the weights (a
tokenizer, a configuration) is looked for beside them first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Position indices and rotary frequencies: constants that some releases saved and others did not.
_CONSTANTS = ("position_ids", "inv_freq", "attn_mask")


@dataclass(frozen=True)
class WeightSource:
    """Where the files of one scorer are looked for."""

    scorer: str
    place: str | None
    """A file, a folder or a hub id `owner/name`; None is the released repository."""
    repo: str | None
    """The hub id of the release, or None where it is not on the hub."""
    homepage: str = ""
    """Where the files can be had by hand."""

    def weights(self, names: Sequence[str]) -> Path:
        """The weight file: the one that was named, or the first of `names` in the folder or repository.

        Raises ValueError, naming file and place, if there is none.
        """
        local = self._local()
        if local and local.is_file():
            return local
        if local:
            found = [local / name for name in names if (local / name).is_file()]
            if not found:
                present = ", ".join(sorted(p.name for p in local.iterdir())[:8]) or "nothing"
                raise ValueError(f"{self.scorer}: {local} has no {' or '.join(names)}; it holds {present}. {self._remedy(names)}")
            return found[0]
        repo = self.place or self.repo
        if repo is None:
            raise ValueError(f"{self.scorer}: its weights are not on the hub. {self._remedy(names)}")
        return self._from_hub(repo, names)

    def companion(self, names: Sequence[str], repo: str | None) -> Path:
        """A file that goes with the weights: beside them if it is there, else from the hub's `repo`.

        Raises ValueError, naming file and place, if it is in neither.
        """
        if beside := self.beside(names):
            return beside
        if repo is None:
            raise ValueError(f"{self.scorer}: {' or '.join(names)} is missing. {self._remedy(names)}")
        return self._from_hub(repo, names)

    def beside(self, names: Sequence[str]) -> Path | None:
        """The first of `names` in the folder that was given, in the folder of the file, or in the hub id; None without one."""
        local = self._local()
        if local:
            folder = local if local.is_dir() else local.parent
            return next((folder / name for name in names if (folder / name).is_file()), None)
        return None if self.place is None else _download(self.place, names)

    def _local(self) -> Path | None:
        if self.place is None:
            return None
        path = Path(self.place).expanduser()
        if path.exists():
            return path
        if not _HUB_ID.fullmatch(self.place):
            raise ValueError(f"{self.scorer}: weights is {self.place!r}; accepted: a file or folder that exists, or a hub id owner/name")
        return None

    def _from_hub(self, repo: str, names: Sequence[str]) -> Path:
        if path := _download(repo, names):
            return path
        raise ValueError(
            f"{self.scorer}: {' or '.join(names)} of the hub repository {repo} is not in the local cache and could not be downloaded. "
            f"{self._remedy(names, repo)}"
        )

    def _remedy(self, names: Sequence[str], repo: str | None = None) -> str:
        url = f"https://huggingface.co/{repo}" if repo else self.homepage
        return f"Put {' or '.join(names)}{f' from {url}' if url else ''} into a folder and pass {self.scorer}=FOLDER."


def _download(repo: str, names: Sequence[str]) -> Path | None:
    """The first of `names` in a hub repository, from the cache if it is there; None if none can be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except EntryNotFoundError:  # not in this repository, or neither cached nor reachable: another name may be
            continue
        except (HfHubHTTPError, OSError, ValueError):
            return None
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, accepted: a JSON object")
    return found


def sha256(*paths: Path) -> str:
    """The SHA-256 of each file in hexadecimal, joined by "+"."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "+".join(digests)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch checkpoint by name, on the CPU; an outer "state_dict" is opened.

    Raises ValueError for a file that is broken, or that needs code to be run to be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers answer a bad file with many types of error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as plain tensors: {reason}. It is broken, or it holds pickled objects, which could run code and are "
            "refused; download it again, or use a safetensors conversion"
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} does not hold tensors by name; accepted: a state dict, or one under the key 'state_dict'")
    return {str(name): value for name, value in loaded.items()}


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fill(module: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Give a module made on the meta device its weights in float32, frozen and in eval mode; returns it.

    Every parameter has to be there in its shape and nothing may be left over, except constants such as position indices.
    what: named in the error. Raises ValueError with the first missing, unexpected and misshapen names.
    """
    wanted = module.state_dict()
    given = {name: value for name, value in state.items() if name in wanted or not name.endswith(_CONSTANTS)}
    misshapen = [f"{n} {tuple(given[n].shape)} instead of {tuple(wanted[n].shape)}" for n in wanted if _differs(given, wanted, n)]
    problems = {
        "missing": [n for n in wanted if n not in given],
        "unexpected": [n for n in given if n not in wanted],
        "of another shape": misshapen,
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}, as {', '.join(names[:3])}" for kind, names in problems.items() if names)
        raise ValueError(f"{what} does not fit: {listed}. It is another model's file, or its config.json describes another size")
    module.load_state_dict({name: value.float() for name, value in given.items()}, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            assert name.endswith("position_ids"), f"{name} is in no checkpoint"
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval().requires_grad_(False)


def _differs(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> bool:
    return name in given and given[name].shape != wanted[name].shape
