"""What preference data holds, looked at before training: what is refused, doubled, contradictory, enlarged or lopsided."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffpref.data.images import ImageError, image_size
from diffpref.data.pairs import PairDataset
from diffpref.data.schema import Rejected, is_tie

SIDES = (256, 384, 512, 768, 1024, 1536)
"""Limits of the size classes: shorter side in pixels."""
ENLARGED = (1.0, 1.5, 2.0)
"""Factors by which a picture has to be enlarged to cover the training resolution."""
TOKENS = 75
"""Words and signs that fit into a CLIP text encoder; a word is at least one token, so that this counts too few as cut."""


@dataclass(frozen=True)
class Agreement:
    """How often a stored score prefers the picture that the label prefers."""

    agreeing: float  # equal scores count one half
    compared: int  # decided pairs with both scores
    missing: int


@dataclass
class PairFacts:
    """Counts and shares; everything that has a `num_` is a number of pairs unless it says otherwise."""

    source: str
    num_pairs: int
    num_ties: int
    num_left_out: int
    rejected: dict[str, int]  # "column: kind" -> rows
    examples: dict[str, str]  # the same -> "row 7: the whole reason"
    num_prompts: int
    pairs_per_prompt: float
    num_cut_captions: int  # of more than TOKENS words
    longest_caption: int  # characters
    num_repeated: int  # pairs that are there before, with the same prompt and pictures in any order
    num_contradictions: int  # of these, those whose label says the opposite
    num_pictures: int  # different ones, by content
    most_used: int  # pairs with the picture that is in most of them
    share_first: float  # of decided pairs, those whose first picture is preferred
    num_soft: int  # labels other than 0, 0.5 and 1
    sizes: dict[str, int] = field(default_factory=dict)  # class of the shorter side -> pictures
    enlarged: dict[str, float] = field(default_factory=dict)  # factor -> share of pictures
    num_unequal: int = 0  # pairs whose pictures differ in size
    widest_ratio: float = 1.0
    agreement: dict[str, Agreement] = field(default_factory=dict)
    users: dict[str, float] = field(default_factory=dict)  # number, and pairs per user: fewest, median, most
    resolution: int = 512

    def warnings(self) -> list[str]:
        """What deserves a look, in the order of its weight."""
        found = []
        bad = sum(self.rejected.values())
        if bad:
            found.append(f"{bad} of {bad + self.num_pairs} rows are set aside; more than 10 rows and 1 % stop a run")
        if self.num_contradictions:
            found.append(f"labels that contradict an earlier one of the same pictures and prompt: {self.num_contradictions}")
        if self.num_pairs and abs(self.share_first - 0.5) > 0.1:
            found.append(f"the first picture is preferred in {self.share_first:.0%} of the pairs: was the order drawn at random?")
        if self.num_pictures and self.enlarged.get("1.5", 0) > 0.1:
            found.append(f"{self.enlarged['1.5']:.0%} of the pictures are enlarged more than 1.5 times at resolution {self.resolution}")
        for name, seen in self.agreement.items():
            if seen.compared >= 50 and seen.agreeing / seen.compared < 0.5:
                found.append(f"score {name} prefers the other picture more often than not: are its columns exchanged?")
        if self.num_cut_captions:
            found.append(f"captions that are longer than a CLIP text encoder reads, so that their rest is cut off: {self.num_cut_captions}")
        if self.most_used > max(20, self.num_pairs // 20):
            found.append(f"one picture is in {self.most_used} pairs")
        return found


def pair_facts(pairs: PairDataset, source: str, resolution: int) -> PairFacts:
    """Look at all pairs and read every picture's header and content once. resolution: side of the training pictures in pixels.

    Pictures that cannot be read count as rejected rows, too, where they were not checked before.
    """
    pictures = _Pictures(resolution)
    seen: dict[tuple[str, frozenset[bytes]], tuple[bytes, float]] = {}
    repeated = contradictions = 0
    rejected = list(pairs.rejected)
    for index in range(len(pairs)):
        try:
            row = pairs.row(index)
            keys = [pictures.add(data) for data in (row.image_0, row.image_1)[: 1 + pairs.has_two_images]]
        except ValueError as error:
            rejected.append(Rejected(int(pairs.rows[index]), pairs.pair_ids[index], "image", f"cannot be read: {error}"))
            continue
        pictures.end_of_pair()
        p0 = float(pairs.p0[index])
        key = (" ".join(row.prompt.casefold().split()), frozenset(keys))
        if key in seen:
            repeated += 1
            first, before = seen[key]
            now = p0 if keys[0] == first else 1 - p0
            contradictions += (now - 0.5) * (before - 0.5) < 0
        else:
            seen[key] = keys[0], p0
    kinds = Counter(f"{entry.column}: {entry.kind}" for entry in rejected)
    decided = np.array([p for p in pairs.p0 if not is_tie(float(p))])
    lengths = [len(prompt.split()) for prompt in pairs.prompts]
    return PairFacts(
        source=source,
        num_pairs=len(pairs),
        num_ties=pairs.ties,
        num_left_out=pairs.left_out,
        rejected=dict(kinds.most_common()),
        examples={f"{e.column}: {e.kind}": f"row {e.row}: {e.reason[:200]}" for e in reversed(rejected)},
        num_prompts=len(set(pairs.prompts)),
        pairs_per_prompt=len(pairs) / max(1, len(set(pairs.prompts))),
        num_cut_captions=sum(length > TOKENS for length in lengths),
        longest_caption=max(map(len, pairs.prompts), default=0),
        num_repeated=repeated,
        num_contradictions=contradictions,
        share_first=float((decided > 0.5).mean()) if len(decided) else 0.5,
        num_soft=int(((decided != 0) & (decided != 1)).sum()),
        agreement={name: _agreement(scores, pairs.p0) for name, scores in pairs.scores.items()},
        users=_users(pairs),
        resolution=resolution,
        **pictures.facts(),
    )


class _Pictures:
    """Sizes and contents of the pictures as they come by."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self.uses: Counter[bytes] = Counter()
        self.shapes: dict[bytes, tuple[int, int]] = {}
        self.unequal = 0
        self._pair: list[tuple[int, int]] = []

    def add(self, data: bytes) -> bytes:
        """A key of its content. Raises ValueError when its header cannot be read."""
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key not in self.shapes:
            try:
                self.shapes[key] = image_size(data)
            except ImageError as error:
                raise ValueError(str(error)) from error
        self.uses[key] += 1
        self._pair.append(self.shapes[key])
        return key

    def end_of_pair(self) -> None:
        """Compare the sizes of the two that were added."""
        self.unequal += self._pair[-1] != self._pair[0]
        self._pair.clear()

    def facts(self) -> dict[str, Any]:
        """By their names in PairFacts."""
        shorter = np.array([min(shape) for shape in self.shapes.values()])
        longer = np.array([max(shape) for shape in self.shapes.values()])
        sizes: defaultdict[str, int] = defaultdict(int)
        for low, high in zip((0, *SIDES), (*SIDES, None), strict=True):
            here = (shorter >= low) & (shorter < (high or np.inf)) if len(shorter) else np.zeros(0)
            name = f"below {high}" if low == 0 else f"{low} and more" if high is None else f"{low} to {high - 1}"
            sizes[name] = int(here.sum())
        factors = self.resolution / shorter if len(shorter) else np.zeros(0)
        return {
            "num_pictures": len(self.shapes),
            "most_used": max(self.uses.values(), default=0),
            "sizes": dict(sizes),
            "enlarged": {f"{f:g}": float((factors > f).mean()) if len(factors) else 0.0 for f in ENLARGED},
            "num_unequal": self.unequal,
            "widest_ratio": float((longer / shorter).max()) if len(shorter) else 1.0,
        }


def _agreement(scores: np.ndarray, p0: np.ndarray) -> Agreement:
    known = np.isfinite(scores).all(1) & (np.abs(p0 - 0.5) > 1e-6)
    difference, side = (scores[:, 0] - scores[:, 1])[known], np.sign(p0 - 0.5)[known]
    agreeing = float((difference * side > 0).sum() + 0.5 * (difference == 0).sum())
    return Agreement(agreeing, int(known.sum()), int((~np.isfinite(scores).all(1)).sum()))


def _users(pairs: PairDataset) -> dict[str, float]:
    counts = Counter(user for user in pairs.user_ids if user is not None)
    if not counts:
        return {}
    per_user = sorted(counts.values())
    return {"number": len(counts), "fewest": per_user[0], "median": float(np.median(per_user)), "most": per_user[-1]}
