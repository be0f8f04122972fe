"""Preference pairs as a map-style dataset: labels checked, bad rows set aside, image bytes read when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from diffpref.core.random import uniform
from diffpref.data.forms import COLUMN_FLAGS
from diffpref.data.images import ImageError
from diffpref.data.reading import Request, Source, open_rows
from diffpref.data.scan import BadRowsError, Scan, check_share, scan
from diffpref.data.schema import PairRow, RankedPairs, Rejected, TiePolicy, number_problem
from diffpref.data.stored import image_bytes
from diffpref.data.tables import PairTable, optional_text, pair_table
from diffpref.data.verdicts import kept_verdicts


@dataclass(frozen=True, eq=False)
class PairDataset:
    """N pairs of a source. Everything but the images is in memory; `load_pairs` makes one."""

    table: PairTable  # M >= N pairs, good and bad, images where they lie
    rows: np.ndarray  # (N,) int64, position of each pair in `table`
    pair_ids: list[str]  # (N,) unique
    prompts: list[str]  # (N,)
    p0: np.ndarray  # (N,) float64, probability that image 0 is better
    user_ids: list[str | None]  # (N,)
    rejected: list[Rejected]  # rows set aside when the source was read
    ties: int  # ties among the valid rows, before the tie policy acted
    left_out: int = 0  # pairs that dreamlike_pairs_only left out
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # (N, 2) float64 per scorer: image 0 and image 1, NaN where missing
    image_ids: list[tuple[str, ...] | None] = field(default_factory=list)  # (N,) names of the images that the source has for them
    own_captions: list[tuple[object, object]] | None = None  # (N,) not checked; captions of image 0 and 1 that are not shared
    negatives: list[object] | None = None  # (N,) not checked; captions that the preferred image does not show
    shown: np.ndarray | None = None  # (N, 2) int64, which stored image serves as image 0 and image 1; None for 0 and 1

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> PairRow:
        """Pair `index` with its encoded images, read now.

        Raises:
            IndexError: `index` is not in 0..N-1.
            ValueError: an image cannot be read; only possible when the images were not checked on loading.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair index is {index}, accepted: 0..{len(self) - 1}")
        pair = int(self.rows[index])
        [stored] = self.table.stored([pair])
        try:
            images = [image_bytes(value) for value in stored]
        except ImageError as error:
            raise ValueError(
                f"pair {self.pair_ids[index]} (row {self.table.source_row(pair)}): image is {error}; set check_images to true to have such "
                f"rows set aside"
            ) from error
        first, second = (0, 1) if self.shown is None else self.shown[index].tolist()
        extra = self.table.extra(pair)
        names = {name: optional_text(extra.get(name)) for name in ("ranking_id", "model_0", "model_1")}
        margin = extra.get("margin")
        return PairRow(
            pair_id=self.pair_ids[index],
            prompt=self.prompts[index],
            image_0=images[first],
            image_1=images[min(second, len(images) - 1)],
            p0=float(self.p0[index]),
            user_id=self.user_ids[index],
            margin=None if number_problem(margin) else float(margin),  # type: ignore[arg-type]  # it is a number
            **names,
        )

    @property
    def has_two_images(self) -> bool:
        """Whether a row compares two images; else it is one image, labelled or with two captions."""
        return len(self.table.images) == 2

    def select(self, indices: Iterable[int]) -> PairDataset:
        """The pairs at `indices`, in that order. `rejected`, `ties` and `left_out` still describe the source."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            pair_ids=[self.pair_ids[index] for index in chosen],
            prompts=[self.prompts[index] for index in chosen],
            p0=self.p0[chosen],
            user_ids=[self.user_ids[index] for index in chosen],
            scores={name: scores[chosen] for name, scores in self.scores.items()},
            image_ids=[self.image_ids[index] for index in chosen],
            own_captions=None if self.own_captions is None else [self.own_captions[index] for index in chosen],
            negatives=None if self.negatives is None else [self.negatives[index] for index in chosen],
            shown=None if self.shown is None else self.shown[chosen],
        )

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over the pair ids and p0, in order: equal for equal data, wherever it lies."""
        digest = hashlib.blake2b("\n".join(self.pair_ids).encode(), digest_size=16)
        digest.update(b"\0" + np.ascontiguousarray(self.p0, dtype="<f8").tobytes())
        return digest.hexdigest()


def load_pairs(
    source: Source,
    split: str = "train",
    *,
    data_format: str = "auto",
    caption_column: str | None = None,
    image_0_column: str | None = None,
    image_1_column: str | None = None,
    label_column: str | None = None,
    user_column: str | None = None,
    dataset_config_name: str | None = None,
    ranked_pairs: RankedPairs = "all",
    choice_model: str | None = None,
    dreamlike_pairs_only: bool = False,
    tie_policy: TiePolicy = "drop",
    max_samples: int | None = None,
    check_images: bool = True,
    cache_dir: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> PairDataset:
    """Read pairs, check every row and set the bad ones aside. docs/data.md shows every accepted form.

    `source`: a file or folder in one of these forms, a `save_to_disk` folder, a hub id, or a table in memory. The settings have
    the names and meanings of a run's (`TrainConfig`). `max_samples` stops after that many accepted pairs, in file order.
    `check_images` decodes every image once; without it a damaged image shows up only when it is used. `say` gets one line about
    what was found.

    Raises:
        ValueError: a setting is wrong, or the source cannot be read or does not show which form it has.
        BadRowsError: (a ValueError) there are no pairs, or more than 10 rows and more than 1 % of them are bad.
    """
    columns = dict(zip(COLUMN_FLAGS, (caption_column, image_0_column, image_1_column, label_column, user_column), strict=True))
    request = Request(
        split=split,
        data_format=data_format,
        given={flag: column for flag, column in columns.items() if column is not None},
        dataset_config_name=dataset_config_name,
        ranked_pairs=ranked_pairs,
        choice_model=choice_model,
        dreamlike_pairs_only=dreamlike_pairs_only,
        tie_policy=tie_policy,
        max_samples=max_samples,
        check_images=check_images,
        cache_dir=cache_dir,
    )
    return read_pairs(source, request, say)


def read_pairs(
    source: Source, request: Request, say: Callable[[str], None] | None = None, stop: Callable[[str], None] | None = None
) -> PairDataset:
    """`load_pairs` with its settings in one object. `stop` gets the text of a BadRowsError in place of its being raised."""
    rows, layout, where = open_rows(source, request)
    if say is not None:
        say(f"data: {where}, {len(rows)} rows of the form {layout.describe()}")
    table = pair_table(rows, layout, request.ranked_pairs, request.choice_model, request.dreamlike_pairs_only)
    with kept_verdicts(table, request.check_images, request.store) as known:
        found = scan(table, request.tie_policy, request.max_samples, request.check_images, Scan(verdicts=known))
    try:
        check_share(found)
    except BadRowsError as error:
        if stop is None:
            raise
        stop(str(error))
    return PairDataset(
        # what is not needed any more, and large, goes
        table=replace(table, captions=[], uids=[], users=[], problems={}, scores={}, own_captions=None, negatives=None),
        rows=np.array(found.pairs, dtype=np.int64),
        pair_ids=found.pair_ids,
        prompts=[str(table.captions[pair]) for pair in found.pairs],
        p0=table.p0[found.pairs],
        user_ids=[table.users[pair] for pair in found.pairs],
        rejected=sorted(found.rejected, key=lambda entry: entry.row),
        ties=found.ties,
        left_out=found.left_out,
        scores={name: scores[found.pairs] for name, scores in table.scores.items()},
        image_ids=[table.uids[pair] for pair in found.pairs],
        own_captions=[(table.own_captions[0][pair], table.own_captions[1][pair]) for pair in found.pairs] if table.own_captions else None,
        negatives=[table.negatives[pair] for pair in found.pairs] if table.negatives else None,
    )


def write_rejected(dataset: PairDataset | BadRowsError, path: str | Path) -> None:
    """Write the rows that were set aside as JSON lines: row, pair_id, column, reason. A BadRowsError has them too."""
    lines = (json.dumps(asdict(entry)) + "\n" for entry in dataset.rejected)
    Path(path).write_text("".join(lines), encoding="utf-8")


def split_held_out(dataset: PairDataset, num_pairs: int, seed: int) -> tuple[PairDataset, PairDataset]:
    """(train, held out): whole prompts are held out, in a keyed random order, until at least `num_pairs` pairs are.

    Prompts that differ only in case or white space count as one, so that none is on both sides. Both sides keep the order of
    `dataset`.

    Raises:
        ValueError: `num_pairs` is negative, or nothing would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(dataset.prompts):
        groups.setdefault(" ".join(prompt.casefold().split()), []).append(index)
    held: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: (uniform(seed, "held_out", prompt), prompt)):
        if len(held) >= num_pairs:
            break
        held.update(groups[prompt])
    if num_pairs < 0 or len(held) == len(dataset):
        raise ValueError(
            f"num_pairs is {num_pairs}, accepted: 0 or more, leaving at least one prompt to train on; the dataset has {len(dataset)} "
            f"pairs of {len(groups)} prompts, and all pairs of a prompt are held out together"
        )
    train = (index for index in range(len(dataset)) if index not in held)
    return dataset.select(train), dataset.select(sorted(held))
