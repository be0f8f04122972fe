"""Rows of any form as one table of pairs: prompt, two images, the probability that the first is better."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffpref.data.forms import Layout, score_of
from diffpref.data.rows import Rows, digest_of
from diffpref.data.schema import Problem, RankedPairs, number_problem, probability, share_of_votes
from diffpref.data.stored import FileImage, path_problem

MAX_LIST = 64
"""Images in one ranked list; their pairs grow with the square."""

_EXTRA = ("ranking_id", "model_0", "model_1", "margin")


@dataclass(frozen=True, eq=False)
class PairTable:
    """M pairs that a source claims to hold, good and bad, in its order. Images stay where they are."""

    rows: Rows
    layout: Layout
    images: tuple[str, ...]  # columns of image 0 and image 1; the same one for lists, a single one for rows of one image
    captions: list[object]  # (M,) not checked
    p0: np.ndarray  # (M,) float64, probability that image 0 is better; NaN for rows in `problems`
    problems: dict[int, Problem]  # pairs that cannot be used, as far as this is known without their captions and images
    uids: list[tuple[str, ...] | None]  # (M,) names of the images that stay the same, where the source has such names
    users: list[str | None]  # (M,)
    scores: dict[str, np.ndarray]  # (M, 2) float64 each: numbers of a scorer for image 0 and image 1, NaN where missing
    picks: np.ndarray | None = None  # (M, 2, 2) int64, row and position in the list of both images; None: pair i is row i
    left_out: np.ndarray | None = None  # (M,) bool, pairs that a filter leaves out
    own_captions: tuple[list[object], list[object]] | None = None  # (M,) each: captions of image 0 and 1 that are not shared
    negatives: list[object] | None = None  # (M,) captions that the preferred image does not show

    def __len__(self) -> int:
        return len(self.p0)

    def source_row(self, pair: int) -> int:
        """The row that pair comes from."""
        return pair if self.picks is None else int(self.picks[pair, 0, 0])

    def stored(self, pairs: Sequence[int]) -> list[tuple[object, ...]]:
        """The images of each pair as they are stored: bytes, places to read from, or something that is no image."""
        sides = []
        for side, name in enumerate(self.images):
            cells = [(pair, -1) if self.picks is None else tuple(self.picks[pair, side].tolist()) for pair in pairs]
            sides.append(self.rows.stored(name, cells))
        return list(zip(*sides, strict=True))

    def extra(self, pair: int) -> dict[str, object]:
        """What else the source says about a pair: those of ranking_id, model_0, model_1 and margin that it has."""
        columns = {ours: self.layout.columns[ours] for ours in _EXTRA if ours in self.layout.columns}
        found = self.rows.at(self.source_row(pair), list(columns.values()))
        extra = {ours: found[theirs] for ours, theirs in columns.items()}
        if self.picks is not None:
            extra.setdefault("ranking_id", self.source_row(pair))
        return extra

    def identity(self) -> str | None:
        """Changes when a file does that the pairs are read from; None when that cannot be told."""
        if self.rows.identity is None:
            return None
        if all(self.rows.image_names(name) is None for name in self.images):
            return self.rows.identity
        good = [pair for pair in range(len(self)) if pair not in self.problems]
        found = (both for start in range(0, len(good), 1024) for both in self.stored(good[start : start + 1024]))
        files = dict.fromkeys(value for value in itertools.chain.from_iterable(found) if isinstance(value, FileImage))
        return digest_of(self.rows.identity, [(file.name, file.signature()) for file in files])


def pair_table(
    rows: Rows, layout: Layout, ranked_pairs: RankedPairs = "all", choice_model: str | None = None, dreamlike_pairs_only: bool = False
) -> PairTable:
    """The pairs of `rows`, whose columns mean what `layout` says.

    `choice_model` names the scorer that decides in place of the labels: the higher score is better, equal scores are a tie.

    Raises:
        ValueError: a setting does not fit this form, or columns that it needs are missing.
    """
    if layout.form in ("ranked", "hpd"):
        table = _from_lists(rows, layout, ranked_pairs)
    elif ranked_pairs != "all":
        raise ValueError(f"ranked_pairs is {ranked_pairs!r}, but the data has the form {layout.form}; it acts on ranked lists only")
    else:
        table = _from_pairs(rows, layout, choice_model)
    if not dreamlike_pairs_only:
        return table
    if not {"model_0", "model_1"} <= layout.columns.keys():
        raise ValueError(
            f"dreamlike_pairs_only is true, but there are no columns model_0 and model_1; found: {', '.join(rows.names)}. Drop the flag"
        )
    models = [rows.values(layout.columns[name]) for name in ("model_0", "model_1")]
    others = [not all("dream" in str(name) for name in names) for names in zip(*models, strict=True)]
    return replace(table, left_out=np.array(others, dtype=bool))


def _from_pairs(rows: Rows, layout: Layout, choice_model: str | None) -> PairTable:
    columns = layout.columns
    images = tuple(columns[name] for name in ("jpg_0", "jpg_1") if name in columns)
    scores = _scores(rows, layout.scores)
    if choice_model:
        name = score_of(choice_model, scores, rows.names)
        decided = _by_score(scores[name], layout.scores[name])
    else:
        decided = _by_label(rows, layout)
    p0, problems = np.full(len(rows), np.nan), dict(rows.problems)
    for row, verdict in enumerate(decided):
        if isinstance(verdict, float):
            p0[row] = verdict
        else:
            problems.setdefault(row, verdict)
    names = [rows.image_names(name) for name in images]
    for column, found in zip(("jpg_0", "jpg_1"), names, strict=False):
        _check_paths(column, found or [], problems)
    if "image_0_uid" in columns:
        names = [rows.values(columns["image_0_uid"]), rows.values(columns["image_1_uid"])]
    uids = _uids(names, len(rows))
    own = (rows.values(columns["caption_0"]), rows.values(columns["caption_1"])) if "caption_0" in columns else None
    negatives = rows.values(columns["caption_negative"]) if "caption_negative" in columns else None
    facts = (rows.values(columns["caption"]), p0, problems, uids, _users(rows, columns), scores)
    return PairTable(rows, layout, images, *facts, own_captions=own, negatives=negatives)


def _by_label(rows: Rows, layout: Layout) -> Iterator[float | Problem]:
    columns = layout.columns
    if layout.form in ("chosen_rejected", "captions"):
        return itertools.repeat(1.0, len(rows))
    if layout.form == "labelled":
        labels = rows.values(columns["label_0"])
        return (probability(float(label) if isinstance(label, bool) else label, has_both=False) for label in labels)
    if layout.form == "votes":
        return map(share_of_votes, rows.values(columns["votes_0"]), rows.values(columns["votes_1"]))
    if "label_1" in columns:
        return map(probability, rows.values(columns["label_0"]), rows.values(columns["label_1"]))
    return (probability(label, has_both=False) for label in rows.values(columns["label_0"]))


def _by_score(scores: np.ndarray, names: tuple[str, str]) -> Iterator[float | Problem]:
    for pair in scores.tolist():
        missing = next((name for name, score in zip(names, pair, strict=True) if not np.isfinite(score)), None)
        yield (missing, "no finite score: the scorer has to decide") if missing else 0.5 + 0.5 * float(np.sign(pair[0] - pair[1]))


def _check_paths(column: str, names: Sequence[object], problems: dict[int, Problem]) -> None:
    for row, name in enumerate(names):
        if (problem := path_problem(name)) is not None:
            problems.setdefault(row, (column, problem))


def _scores(rows: Rows, candidates: Mapping[str, tuple[str, str]]) -> dict[str, np.ndarray]:
    """(M, 2) for each candidate whose two columns hold numbers."""
    found = {}
    for name, columns in candidates.items():
        first, second = (rows.numbers(column) for column in columns)
        if first is not None and second is not None:
            found[name] = np.stack([first, second], 1)
    return found


def _uids(names: Sequence[Sequence[object] | None], size: int) -> list[tuple[str, ...] | None]:
    known = [found for found in names if found is not None]
    if len(known) < len(names):
        return [None] * size
    return [None if None in found else tuple(map(str, found)) for found in zip(*known, strict=True)]


def _users(rows: Rows, columns: Mapping[str, str]) -> list[str | None]:
    if "user_id" not in columns:
        return [None] * len(rows)
    return [optional_text(user) for user in rows.values(columns["user_id"])]


def optional_text(value: object) -> str | None:
    """`value` as text; ids are integers in some data sets."""
    return None if value is None else str(value)


Cells = list[tuple[int, int]]
Judgement = tuple[int, int, float]
"""Two positions in a list and the probability that the first is better."""


def _from_lists(rows: Rows, layout: Layout, ranked_pairs: RankedPairs) -> PairTable:
    """One pair for every two images of a list, or for its best and its worst; a bad list becomes one bad pair."""
    columns = layout.columns
    captions, users, theirs = rows.values(columns["caption"]), _users(rows, columns), columns["images"]
    p0: list[float] = []
    cells: list[tuple[tuple[int, int], tuple[int, int]]] = []
    problems: dict[int, Problem] = {}
    for found, judged in _lists(rows, layout, ranked_pairs):
        if isinstance(judged, tuple):
            problems[len(p0)] = judged
            judged = [(0, 0, np.nan)]
        cells += [(found[first], found[second]) for first, second, _ in judged]
        p0 += [share for _, _, share in judged]
    picks = np.array(cells, dtype=np.int64).reshape(-1, 2, 2)
    uids = _list_uids(rows.image_names(theirs), cells, problems)
    source = picks[:, 0, 0].tolist()
    captions, users = [captions[row] for row in source], [users[row] for row in source]
    return PairTable(rows, layout, (theirs, theirs), captions, np.array(p0, dtype=np.float64), problems, uids, users, {}, picks)


def _list_uids(
    names: list[object] | None, cells: list[tuple[tuple[int, int], tuple[int, int]]], problems: dict[int, Problem]
) -> list[tuple[str, ...] | None]:
    """Names of both images of each pair of places; names that no path can have are added to `problems`."""
    uids: list[tuple[str, ...] | None] = [None] * len(cells)
    for pair, places in enumerate(cells if names is not None else []):
        if pair in problems:
            continue
        first, second = (names[row] if at < 0 else names[row][at] for row, at in places)  # type: ignore[index]  # a list, see `_lists`
        uids[pair] = str(first), str(second)
        problem = next(((c, p) for c, n in (("jpg_0", first), ("jpg_1", second)) if (p := path_problem(n)) is not None), None)
        if problem is not None:
            problems[pair] = problem
    return uids


def _lists(rows: Rows, layout: Layout, ranked_pairs: RankedPairs) -> Iterator[tuple[Cells, list[Judgement] | Problem]]:
    """For each list the places of its images and the pairs it gives, or why it gives none."""
    images = layout.columns["images"]
    if layout.form == "ranked" and not rows.holds_lists(images):
        yield from _groups(rows, layout, ranked_pairs)
        return
    column = "ranks" if layout.form == "ranked" else "preference"
    values = rows.values(layout.columns[column])
    for row, (size, found) in enumerate(zip(rows.sizes(images), values, strict=True)):
        cells = [(row, position) for position in range(size or 1)]
        if row in rows.problems:
            yield cells, rows.problems[row]
        elif size is None:
            yield cells, ("images", "not a list")
        elif not isinstance(found, list):
            yield cells, (column, f"not a list: {type(found).__name__}")
        elif len(found) != size:
            yield cells, (column, f"lists of unequal lengths: {size} images, {len(found)} values")
        else:
            yield cells, _by_preference(found) if column == "preference" else _by_rank(found, ranked_pairs)


def _by_preference(shares: list[object]) -> list[Judgement] | Problem:
    if len(shares) != 2:
        return "preference", f"wrong number of images: {len(shares)}, accepted: 2"
    p0 = probability(*shares)
    return [(0, 1, p0)] if isinstance(p0, float) else ("preference", p0[1])


def _by_rank(ranks: list[object], ranked_pairs: RankedPairs) -> list[Judgement] | Problem:
    """Pairs in the order of the list; equal ranks are ties."""
    if not 2 <= len(ranks) <= MAX_LIST:
        return "images", f"wrong number of images: {len(ranks)}, accepted: 2 to {MAX_LIST}"
    if (problem := next((problem for problem in map(number_problem, ranks) if problem), None)) is not None:
        return "ranks", problem
    order = [float(rank) for rank in ranks]  # type: ignore[arg-type]  # number_problem has checked that they are numbers
    pairs: Iterable[tuple[int, int]] = itertools.combinations(range(len(order)), 2)
    if ranked_pairs == "best_worst":
        best, worst = int(np.argmin(order)), len(order) - 1 - int(np.argmax(order[::-1]))
        pairs = [(min(best, worst), max(best, worst))]
    return [(i, j, 0.5 + 0.5 * float(np.sign(order[j] - order[i]))) for i, j in pairs]


def _groups(rows: Rows, layout: Layout, ranked_pairs: RankedPairs) -> Iterator[tuple[Cells, list[Judgement] | Problem]]:
    """Lists made of the rows that share a ranking_id (prompt_id), each row with one image and one rank."""
    if "ranking_id" not in layout.columns:
        raise ValueError(
            f"data of the form ranked has one image per row, but no column prompt_id or ranking_id that says which rows belong together; "
            f"found: {', '.join(rows.names)}"
        )
    groups: dict[object, list[int]] = {}
    for row, key in enumerate(rows.values(layout.columns["ranking_id"])):
        groups.setdefault(("row", row) if row in rows.problems or key is None else str(key), []).append(row)
    ranks, captions = rows.values(layout.columns["ranks"]), rows.values(layout.columns["caption"])
    for members in groups.values():
        cells = [(row, -1) for row in members]
        if members[0] in rows.problems:
            yield cells, rows.problems[members[0]]
        elif any(captions[row] != captions[members[0]] for row in members):
            yield cells, ("caption", "captions differ: rows of one ranking_id have several prompts")
        else:
            yield cells, _by_rank([ranks[row] for row in members], ranked_pairs)
