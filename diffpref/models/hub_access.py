"""Whether the hub answers, asked before anything is loaded from it: its client may wait without an end, or blame the name of a model."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_session, try_to_load_from_cache

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries."""
TIMEOUT = 8.0
"""Seconds for one try: with the pauses less than a minute in all."""


T = TypeVar("T")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def may_be_downloaded(source: str) -> bool:
    """Whether a model is asked for by its name on the hub, and the hub may be asked. A path that does not exist is no such name."""
    return _HUB_NAME.fullmatch(source) is not None and not Path(source).exists() and not constants.HF_HUB_OFFLINE


def downloaded(source: str, load: Callable[[], T]) -> T:
    """`load()`, tried again when it may have failed because a file did not arrive: the hub's client asks for some files only once."""
    for pause in PAUSES[1:3] if may_be_downloaded(source) else ():
        try:
            return load()
        except Exception as error:  # an error of the transport, or that of a reader who misses a file
            print(f"{source}: {' '.join(str(error).split())[:200]}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    return load()


def check_hub_answers(setting: str, source: str, revision: str | None = None) -> None:
    """Raises ValueError, naming the setting, when `source` has to be downloaded and the hub does not answer for about a minute.

    Nothing is asked for a local path, a model in the cache, and with HF_HUB_OFFLINE. What the answer says is not looked at.
    """
    if not may_be_downloaded(source) or isinstance(try_to_load_from_cache(source, "model_index.json", revision=revision), str):
        return
    why = ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            code = get_session().get(f"{constants.ENDPOINT}/api/models/{source}", timeout=TIMEOUT).status_code
        except Exception as error:  # the types of the client's transport differ between its versions
            why = f"{type(error).__name__}: {error}"
            continue
        if code < 500 and code != 429:
            return
        why = f"status {code}"
    raise ValueError(
        f"{setting} {source!r} is no local file or folder, and the hub {constants.ENDPOINT} did not answer in {len(PAUSES) + 1} tries "
        f"({why}). Try later, give a local folder, or set HF_HUB_OFFLINE=1 if the model is in the hub's cache"
    )
