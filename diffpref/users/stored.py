"""User embeddings on disk: a safetensors file and a manifest that says what they are of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

EMBEDS_FILE = "user_embeds.safetensors"
_MANIFEST = "user_embeds.json"
"""Written last: a folder without it holds no complete embeddings."""


def save_embeds(folder: Path, embeds: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write embeddings by user, any shapes, and the facts that they depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    draft = folder / f".{EMBEDS_FILE}.{os.getpid()}"
    save_file({user: x.contiguous() for user, x in embeds.items()}, draft)
    draft.replace(folder / EMBEDS_FILE)
    (folder / _MANIFEST).write_text(json.dumps(dict(facts), indent=1))


def load_embeds(folder: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Tensor] | None:
    """What `save_embeds` wrote, or None where nothing complete is.

    facts: what they must have been made with. Raises ValueError, naming what differs, for embeddings of other facts.
    """
    manifest = folder / _MANIFEST
    if not manifest.exists():
        return None
    stored = json.loads(manifest.read_text())
    wanted = json.loads(json.dumps(dict(facts))) if facts is not None else stored
    differ = [f"{name}: {stored.get(name)} -> {wanted.get(name)}" for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if differ:
        raise ValueError(
            f"user_cache {str(folder)!r} holds embeddings of other users or settings ({'; '.join(differ)}); give another folder"
        )
    return load_file(folder / EMBEDS_FILE)
