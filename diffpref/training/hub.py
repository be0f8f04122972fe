"""Uploading what a run leaves: checked before training, done after it. The token is never written anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token

from diffpref.training.config import TrainConfig

_ABSOLUTE = re.compile(r"(?<![\w.~/:])~?/[^\s,;=]+")


def claim_repository(config: TrainConfig, folder: Path) -> str | None:
    """Create the repository of the run, or find it, and return its full id; None without push_to_hub.

    Raises ValueError when there is no token, or none that may write there: now, and not after hours of training.
    """
    if not config.push_to_hub:
        return None
    if not (config.hub_token or get_token()):
        raise ValueError("push_to_hub is true, but there is no token: log in with `hf auth login`, set HF_TOKEN, or add --hub_token")
    wanted = config.hub_model_id or folder.resolve().name
    try:
        return str(HfApi(token=config.hub_token).create_repo(wanted, exist_ok=True).repo_id)
    except Exception as error:  # the client passes on its transport's errors, whose types differ between its versions
        raise ValueError(
            f"push_to_hub is true, but hub_model_id {wanted!r} cannot be created or written ({_reason(error, config)}); "
            "check the name, the token's rights and the connection, or leave push_to_hub out"
        ) from error


def upload(config: TrainConfig, repository: str, folder: Path, names: Iterable[str], message: str) -> str | None:
    """Upload these files and folders of `folder` in one commit; the settings go without the paths of this machine.

    Returns None, or why it failed and how to repeat it: the run is done, and its files stay where they are.
    """
    operations = [
        CommitOperationAdd(file.relative_to(folder).as_posix(), _content(file)) for name in names for file in _files(folder / name)
    ]
    try:
        HfApi(token=config.hub_token).create_commit(repository, operations, commit_message=message)
    except Exception as error:  # as above
        return (
            f"warning: the run is complete in {str(folder)!r}, but uploading to hub_model_id {repository!r} failed "
            f"({_reason(error, config)}); repeat it with: hf upload {repository} {folder} . --exclude 'checkpoint-*'"
        )
    return None


def _files(path: Path) -> Iterator[Path]:
    """The file, or all files of the folder; nothing for what does not exist."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    return (file for file in found if file.is_file())


def _content(file: Path) -> str | bytes:
    """The path of a file to upload, or the bytes of settings without local folders."""
    if file.suffix != ".yaml":
        return str(file)
    settings = yaml.safe_load(file.read_text())
    return yaml.safe_dump({name: without_places(value) for name, value in settings.items()}, sort_keys=False).encode()


def without_places(value: object) -> object:
    """A setting whose absolute paths are reduced to their last name."""
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return _ABSOLUTE.sub(lambda path: Path(path[0]).name, value) if isinstance(value, str) else value


def _reason(error: Exception, config: TrainConfig) -> str:
    """One line of the client's error, never with the token."""
    text = " ".join(str(error).split())
    return text.replace(config.hub_token, "***") if config.hub_token else text
