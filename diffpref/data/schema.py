"""One validated row of preference data, and the rules a row must meet.

Internal column names are those of Pick-a-Pic v2. `label_0` is the probability that image 0 is better; 0.5 is a tie.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

IMAGE_COLUMNS = ("jpg_0", "jpg_1")

TiePolicy = Literal["drop", "keep", "error"]
RankedPairs = Literal["all", "best_worst"]

LABEL_TOLERANCE = 1e-6
MAX_CAPTION_LENGTH = 10_000

Problem: TypeAlias = tuple[str, str]
"""Why a row cannot be used: (column, reason), the reason as in `Rejected`."""


@dataclass(frozen=True)
class PairRow:
    """One pair as it lies in the source: images still encoded, order not yet changed."""

    pair_id: str
    prompt: str
    image_0: bytes
    image_1: bytes  # image_0 again in data of single images
    p0: float  # probability in [0, 1] that image 0 is better, 0.5 = tie
    ranking_id: str | None = None  # shared by the pairs of one ranked list
    user_id: str | None = None
    model_0: str | None = None
    model_1: str | None = None
    margin: float | None = None  # how much better, in the unit of the source


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
    if any("\ud800" <= character <= "\udfff" for character in caption):
        return "not Unicode: a lone surrogate"  # JSON can hold one, no encoder can
    return None


def number_problem(value: object) -> str | None:
    """Why `value` is no finite number, or None. Booleans and strings are refused: they hide a different convention."""
    if value is None:
        return "null"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"not a number: {type(value).__name__} {str(value)[:40]!r}"
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number of more than 300 digits
        finite = False
    return None if finite else f"not finite: {str(value)[:40]}"


def label_problem(label: object) -> str | None:
    """Why one label is no probability, or None."""
    problem = number_problem(label)
    if problem is None and not 0 <= label <= 1:  # type: ignore[operator]  # number_problem has checked that it is a number
        problem = f"outside [0, 1]: {label}"
    return problem


def probability(label_0: object, label_1: object = None, *, has_both: bool = True) -> float | Problem:
    """The probability that image 0 is better from one label or, with `has_both`, from two that must sum to 1."""
    if (problem := label_problem(label_0)) is not None:
        return "label_0", problem
    assert isinstance(label_0, int | float)
    if not has_both:
        return float(label_0)
    if (problem := label_problem(label_1)) is not None:
        return "label_1", problem
    assert isinstance(label_1, int | float)
    if abs(label_0 + label_1 - 1) > LABEL_TOLERANCE:
        return "label_0", f"labels do not sum to 1: {label_0} + {label_1}"
    return float(label_0)


def share_of_votes(votes_0: object, votes_1: object) -> float | Problem:
    """The share of votes for image 0; equal votes are a tie."""
    for column, votes in (("votes_0", votes_0), ("votes_1", votes_1)):
        problem = number_problem(votes)
        if problem is None and votes < 0:  # type: ignore[operator]  # number_problem has checked that it is a number
            problem = f"negative: {votes}"
        if problem is not None:
            return column, problem
    assert isinstance(votes_0, int | float)
    assert isinstance(votes_1, int | float)
    half_0, half_1 = votes_0 / 2, votes_1 / 2  # the sum of two huge weights would overflow
    if half_0 + half_1 == 0:
        return "votes_0", "no votes: 0 + 0"
    return half_0 / (half_0 + half_1)


def is_tie(p0: float) -> bool:
    """True when `p0` says that neither image is better."""
    return abs(p0 - 0.5) <= LABEL_TOLERANCE


def pair_id_from_uids(*uids: str) -> str:
    """32 hex digits that depend on the image uids and their order."""
    return _digest(b"uids", *map(_encoded, uids))


def pair_id_from_content(prompt: str, *images: bytes) -> str:
    """32 hex digits that depend on the prompt, the encoded images and their order."""
    return _digest(b"content", _encoded(prompt), *images)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # names of files may hold what is no Unicode


def _digest(*parts: bytes) -> str:
    """Hash of `parts`; each goes in with its length, so that no two lists of parts share one stream."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
