"""One validated row of preference data, and the rules a row must meet.

Column names are those of Pick-a-Pic v2. `label_0` is the probability that image 0 is better; 0.5 is a tie.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

REQUIRED_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL_COLUMNS = ("image_0_uid", "image_1_uid", "ranking_id", "user_id", "model_0", "model_1")
COLUMNS = REQUIRED_COLUMNS + OPTIONAL_COLUMNS
IMAGE_COLUMNS = ("jpg_0", "jpg_1")

LABEL_TOLERANCE = 1e-6
MAX_CAPTION_LENGTH = 10_000


@dataclass(frozen=True)
class PairRow:
    """One pair as it lies in the source: images still encoded, order not yet changed."""

    pair_id: str
    prompt: str
    image_0: bytes
    image_1: bytes
    p0: float  # probability in [0, 1] that image 0 is better, 0.5 = tie
    ranking_id: str | None = None
    user_id: str | None = None
    model_0: str | None = None
    model_1: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A row that was set aside. `reason` reads "kind: detail"; rows are counted by kind."""

    row: int  # position in the source, from 0
    pair_id: str | None  # None when the row is too damaged to be named
    column: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its detail."""
        return self.reason.split(":", 1)[0]


def caption_problem(caption: object) -> str | None:
    """Why `caption` cannot be used, or None. Control characters, markup and any language are accepted as they are."""
    if caption is None:
        return "null"
    if not isinstance(caption, str):
        return f"not a string: {type(caption).__name__}"
    if not caption.strip():
        return "empty"
    if len(caption) > MAX_CAPTION_LENGTH:
        return f"too long: {len(caption)} characters, at most {MAX_CAPTION_LENGTH}"
    return None


def label_problem(label: object) -> str | None:
    """Why one label cannot be used, or None. Booleans and strings are refused: they hide a different convention."""
    if label is None:
        return "null"
    if isinstance(label, bool) or not isinstance(label, int | float):
        return f"not a number: {type(label).__name__} {str(label)[:40]!r}"
    if not math.isfinite(label):
        return f"not finite: {label}"
    if not 0 <= label <= 1:
        return f"outside [0, 1]: {label}"
    return None


def row_problem(caption: object, label_0: object, label_1: object) -> tuple[str, str] | None:
    """(column, reason) of the first broken rule among caption and labels, or None when all hold."""
    problems = (("caption", caption_problem(caption)), ("label_0", label_problem(label_0)), ("label_1", label_problem(label_1)))
    for column, problem in problems:
        if problem is not None:
            return column, problem
    assert isinstance(label_0, int | float)
    assert isinstance(label_1, int | float)
    if abs(label_0 + label_1 - 1) > LABEL_TOLERANCE:
        return "label_0", f"labels do not sum to 1: {label_0} + {label_1}"
    return None


def is_tie(p0: float) -> bool:
    """True when `p0` says that neither image is better."""
    return abs(p0 - 0.5) <= LABEL_TOLERANCE


def pair_id_from_uids(uid_0: str, uid_1: str) -> str:
    """32 hex digits that depend on the two image uids and their order."""
    return _digest(b"uids", uid_0.encode(), uid_1.encode())


def pair_id_from_content(prompt: str, image_0: bytes, image_1: bytes) -> str:
    """32 hex digits that depend on the prompt, the encoded images and their order."""
    return _digest(b"content", prompt.encode(), image_0, image_1)


def _digest(*parts: bytes) -> str:
    """Hash of `parts`; each goes in with its length, so that no two lists of parts share one stream."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
