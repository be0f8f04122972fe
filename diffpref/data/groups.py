"""From pairs to the groups that a method compares: G groups of K pictures each, best first.

    pairs      the two pictures of a pair under its prompt
    captioned  the two pictures of a pair, each under its own caption                       (DCPO)
    captions   one picture under the caption that it shows and under one that it does not  (TDPO, TKTO)
    images     single pictures, desirable or not                                           (Diffusion-KTO)
    lists      all pictures of a ranked list                                               (RankDPO, LiPO, ListMLE)

Everything is made of the labels that the pairs have now, so that flipped labels reach every kind of group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from diffpref.core.random import uniform
from diffpref.data.pairs import PairDataset
from diffpref.data.schema import caption_problem

Grouping = Literal["pairs", "captioned", "captions", "images", "lists"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Group:
    """One group with its encoded pictures."""

    group_id: str
    user_id: str | None
    prompts: tuple[str, ...]  # (K,)
    relevance: tuple[float, ...]  # (K,)
    images: tuple[bytes, ...]  # (U,), the different pictures of the K slots
    columns: tuple[str, ...]  # (U,), where they lie, for messages
    is_in_order: bool  # whether the source had the pictures in this order


@dataclass(frozen=True, eq=False)
class Groups:
    """N groups of K slots that show U different pictures of pairs."""

    pairs: PairDataset
    cells: np.ndarray  # (N, U, 2) int64: pair and image of it, best first
    places: np.ndarray  # (N, U) int64, position of each picture in the source's own order
    group_ids: Sequence[str]  # (N,) unique
    prompts: Sequence[tuple[str, ...]]  # (N,) of K
    relevance: np.ndarray  # (N, K) float64 in [0, 1]
    slots: tuple[int, ...]  # (K,) which of the U pictures a slot shows
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # (N, K) float64 by scorer

    def __len__(self) -> int:
        return len(self.group_ids)

    def group(self, index: int) -> Group:
        """Group `index` with its pictures, read now. Raises ValueError when one cannot be read."""
        rows = {pair: self.pairs.row(pair) for pair in dict.fromkeys(self.cells[index, :, 0].tolist())}
        found = [(rows[pair].image_1 if side else rows[pair].image_0) for pair, side in self.cells[index].tolist()]
        return Group(
            self.group_ids[index],
            self.pairs.user_ids[int(self.cells[index, 0, 0])],
            self.prompts[index],
            tuple(self.relevance[index].tolist()),
            tuple(found),
            tuple(f"jpg_{side}" for side in self.cells[index, :, 1].tolist()),
            bool((np.diff(self.places[index]) > 0).all()),
        )


def pair_group(pairs: PairDataset, index: int) -> Group:
    """Pair `index` as a group: what `Groups` would hold, for pairs of which not all are known yet."""
    row = pairs.row(index)
    images, columns = (row.image_0, row.image_1), ("jpg_0", "jpg_1")
    chosen_first = row.p0 >= 0.5
    step = 1 if chosen_first else -1
    label = max(row.p0, 1 - row.p0)
    return Group(row.pair_id, row.user_id, (row.prompt,) * 2, (label, 1 - label), images[::step], columns[::step], chosen_first)


def arranged(pairs: PairDataset, grouping: Grouping, list_size: int | None = None, say: Say | None = None) -> Groups | None:
    """The groups of these pairs; None for plain pairs, which need no arranging.

    list_size: pictures of each ranked list that are used. Raises ValueError when the data has not what the groups are made of.
    """
    if list_size is not None and grouping != "lists":
        raise ValueError(f"list_size is {list_size}, but the method has groups of kind {grouping}; it is about ranked lists")
    if grouping == "images":
        return single_images(pairs)
    if not pairs.has_two_images and grouping != "captions":
        raise ValueError(
            f"the method compares pictures, but the data holds single ones (form {pairs.table.layout.form}); use pairs or ranked lists, "
            "or --method diffusion_kto for labelled pictures, tdpo for pictures with two captions"
        )
    if grouping == "lists" and pairs.table.picks is not None:
        return ranked_lists(pairs, list_size, say)
    if grouping == "pairs" or (grouping == "lists" and list_size in (None, 2)):
        return None
    if grouping == "lists":
        raise ValueError(f"list_size is {list_size}, but the data has pairs; give data of the form ranked, or leave it out")
    return of_pairs(pairs, (0, 0) if grouping == "captions" else (0, 1))


def of_pairs(pairs: PairDataset, slots: tuple[int, ...]) -> Groups:
    """Pairs in the order of their labels, each picture under its own caption; slots (0, 0) show the first picture twice."""
    captions = pairs.own_captions
    assert captions is not None, "captions are made before pairs are arranged"
    order = np.where(pairs.p0[:, None] >= 0.5, [[0, 1]], [[1, 0]])
    used = order[:, : max(slots) + 1]
    cells = np.stack([np.arange(len(pairs))[:, None].repeat(used.shape[1], 1), used], 2)
    prompts = [(str(both[first]), str(both[second])) for both, (first, second) in zip(captions, order.tolist(), strict=True)]
    chosen = np.maximum(pairs.p0, 1 - pairs.p0)
    scores = {name: np.take_along_axis(found, order, 1) for name, found in pairs.scores.items()}
    return Groups(pairs, cells, used, pairs.pair_ids, prompts, np.stack([chosen, 1 - chosen], 1), slots, scores)


def single_images(pairs: PairDataset) -> Groups:
    """Each picture alone: desirable if it was preferred at least once, as the authors of Diffusion-KTO label Pick-a-Pic.

    A picture counts once per prompt; one that only ever tied is left out. Labelled pictures keep their own labels.
    """
    if not pairs.has_two_images:
        cells = np.stack([np.arange(len(pairs)), np.zeros(len(pairs), dtype=np.int64)], 1)[:, None]
        prompts = [(prompt,) for prompt in pairs.prompts]
        return Groups(pairs, cells, cells[:, :, 1], pairs.pair_ids, prompts, pairs.p0[:, None], (0,))
    found: dict[tuple[str, str], tuple[int, int]] = {}
    liked: dict[tuple[str, str], float] = {}
    for index, names in enumerate(pairs.image_ids):
        for side, probability in enumerate((pairs.p0[index], 1 - pairs.p0[index])):
            key = pairs.prompts[index], names[side] if names else f"{pairs.pair_ids[index]}/{side}"
            if probability != 0.5:
                found.setdefault(key, (index, side))
                liked[key] = max(liked.get(key, 0.0), float(probability > 0.5))
    where = list(found.values())
    cells = np.array(where, dtype=np.int64).reshape(-1, 1, 2)
    ids, prompts = [f"{pairs.pair_ids[i]}/{side}" for i, side in where], [(prompt,) for prompt, _ in found]
    scores = {name: values[cells[:, 0, 0], cells[:, 0, 1]][:, None] for name, values in pairs.scores.items()}
    return Groups(pairs, cells, cells[:, :, 1], ids, prompts, np.array(list(liked.values()))[:, None], (0,), scores)


def ranked_lists(pairs: PairDataset, size: int | None, say: Say | None = None) -> Groups:
    """Lists put together again from their pairs; relevance is the share of the other pictures that a picture beats, ties half.

    size: longer lists keep this many pictures, spread from best to worst, and shorter ones are left out; without it all lists
    must have the same length. Raises ValueError otherwise.
    """
    lists = [_one_list(pairs, members) for members in _lists_of(pairs)]
    lengths = sorted({len(found) for found in lists})
    if size is None and len(lengths) > 1:
        raise ValueError(
            f"the ranked lists have {' and '.join(map(str, lengths))} pictures, but the lists of a batch need the same number; "
            f"give list_size, for example {lengths[-1]}: longer lists are thinned out and shorter ones left out"
        )
    length = size or lengths[0]
    if length < 2:
        raise ValueError(f"list_size is {length}; a ranking needs at least two pictures")
    kept = [(found, [found[i] for i in _spread(len(found), length)]) for found in lists if len(found) >= length]
    if not kept:
        raise ValueError(f"list_size is {length}, but the longest ranked list has {lengths[-1]} pictures; lower it")
    if say is not None:
        say(f"{len(kept)} ranked lists of {length} pictures, {len(lists) - len(kept)} shorter ones left out")
    cells = np.array([[entry.cell for entry in chosen] for _, chosen in kept], dtype=np.int64)
    first = [min(entry.cell[0] for entry in whole) for whole, _ in kept]
    return Groups(
        pairs,
        cells,
        np.array([[entry.place for entry in chosen] for _, chosen in kept]),
        [f"{pairs.pair_ids[i]}/list" for i in first],
        [(pairs.prompts[i],) * length for i in first],
        np.array([[entry.relevance for entry in chosen] for _, chosen in kept]),
        tuple(range(length)),
    )


def ranked_gaps(pairs: PairDataset) -> np.ndarray | None:
    """How many ranks apart the pictures of each pair stand in their list, float64 (N,); None where there are no lists."""
    if not pairs.has_two_images or pairs.table.picks is None:
        return None
    gaps = np.zeros(len(pairs))
    for members in _lists_of(pairs):
        entries = _one_list(pairs, members)
        found = {entry.cell: entry.relevance * (len(entries) - 1) for entry in entries}
        cells = {tuple(pairs.table.picks[pairs.rows[i]][side].tolist()): (i, side) for i, side in found}
        by_cell = {place: found[cell] for place, cell in cells.items()}
        for index in members:
            first, second = (tuple(cell) for cell in pairs.table.picks[pairs.rows[index]].tolist())
            gaps[index] = round(abs(by_cell[first] - by_cell[second]), 9)
    return gaps


@dataclass
class _Entry:
    """A picture of a ranked list."""

    cell: tuple[int, int]  # a pair that shows it, and which image of it
    place: int
    relevance: float = 0.0


def _lists_of(pairs: PairDataset) -> list[list[int]]:
    """Indices of pairs, those of one list together: pairs that share a picture, directly or through others."""
    assert pairs.table.picks is not None
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(cell: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(cell, cell) != cell:
            cell = parent[cell]
        return cell

    sides = [((a, b), (c, d)) for (a, b), (c, d) in pairs.table.picks[pairs.rows].tolist()]
    for first, second in sides:
        parent[root(second)] = root(first)
    found: dict[tuple[int, int], list[int]] = {}
    for index, (first, _) in enumerate(sides):
        found.setdefault(root(first), []).append(index)
    return list(found.values())


def _one_list(pairs: PairDataset, members: Sequence[int]) -> list[_Entry]:
    """The pictures of one list, best first."""
    assert pairs.table.picks is not None
    entries: dict[tuple[int, int], _Entry] = {}
    met: dict[tuple[int, int], int] = {}
    for index in members:
        cells = [(row, position) for row, position in pairs.table.picks[pairs.rows[index]].tolist()]
        for side, (cell, share) in enumerate(zip(cells, (pairs.p0[index], 1 - pairs.p0[index]), strict=True)):
            entry = entries.setdefault(cell, _Entry((index, side), 0))
            entry.relevance += float(share)
            met[cell] = met.get(cell, 0) + 1
    others = len(entries) - 1
    for place, cell in enumerate(sorted(entries)):
        entries[cell].place = place
        entries[cell].relevance = (entries[cell].relevance + 0.5 * (others - met[cell])) / others  # a pair that is missing was a tie
    return sorted(entries.values(), key=lambda entry: (-entry.relevance, entry.place))


def _spread(length: int, size: int) -> list[int]:
    """`size` positions of 0..length-1, from first to last, as evenly as possible."""
    return [round(i * (length - 1) / (size - 1)) for i in range(size)]


def with_captions(
    pairs: PairDataset, grouping: Literal["captioned", "captions"], edits: Sequence[str], seed: int, say: Say | None = None
) -> PairDataset:
    """Pairs whose two images have captions of their own; rows without them are left out and counted.

    captions: image 0 and image 1 are both the preferred picture, once under the prompt and once under a caption that it does not show
    (`negatives`, or an edited prompt). captioned: the pair's own captions, or else the prompt for the preferred image and such a
    caption for the other one. edits: sets of words that may be exchanged, see `edited`. Raises ValueError when there is no caption.
    """
    if grouping == "captions" or pairs.own_captions is None:
        wrong = pairs.negatives
        if wrong is None:
            rules = [tuple(words.split()) for words in edits]
            wrong = [edited(prompt, rules, seed, pair_id) for prompt, pair_id in zip(pairs.prompts, pairs.pair_ids, strict=True)]
            if not rules:
                raise ValueError(
                    "the method needs a second caption, but the data has no column caption_negative"
                    + ("" if grouping == "captions" else " and no columns caption_0, caption_1")
                    + "; add it, or give caption_edits, for example --caption_edits 'red green blue' 'small large'"
                )
        first = pairs.p0 >= 0.5
        both: list[tuple[object, object]] = list(zip(pairs.prompts, wrong, strict=True))
        if grouping == "captions":
            shown = np.where(first, 0, 1)[:, None].repeat(2, 1) if pairs.has_two_images else np.zeros((len(pairs), 2), np.int64)
            pairs = replace(pairs, shown=shown, p0=np.ones(len(pairs)), own_captions=both, scores={})
        else:
            pairs = replace(pairs, own_captions=[b if f else b[::-1] for b, f in zip(both, first.tolist(), strict=True)])
    assert pairs.own_captions is not None
    usable = [not any(map(caption_problem, both)) for both in pairs.own_captions]
    if grouping == "captions":  # equal ones would teach nothing
        usable = [fine and both[0] != both[1] for fine, both in zip(usable, pairs.own_captions, strict=True)]
    good = [index for index, fine in enumerate(usable) if fine]
    if not good:
        raise ValueError(f"none of {len(pairs)} pairs has two usable captions; check the columns, or give other caption_edits")
    if say is not None and len(good) < len(pairs):
        say(f"{len(pairs) - len(good)} pairs without a second caption left out")
    return pairs.select(good) if len(good) < len(pairs) else pairs


def edited(caption: str, rules: Sequence[Sequence[str]], seed: int, key: str) -> str | None:
    """`caption` with one word exchanged for another of its set, a keyed draw; None when it holds no word of any set.

    rules: sets of words that exclude each other, such as colours. The new word does not occur in the caption yet.
    """
    words = caption.split(" ")
    bare = [word.strip(",.;:!?").lower() for word in words]
    options = [(place, other) for place, word in enumerate(bare) for rule in rules if word in rule for other in rule if other not in bare]
    places = list(dict.fromkeys(place for place, _ in options))
    if not places:
        return None
    place = places[int(uniform(seed, "caption_edit_place", key) * len(places))]
    others = [other for p, other in options if p == place]
    new = others[int(uniform(seed, "caption_edit_word", key) * len(others))]
    words[place] = words[place].lower().replace(bare[place], new, 1)
    return " ".join(words)
