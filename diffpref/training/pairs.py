"""The pairs of a run: loaded, checked, split, and with label noise where a control asks for it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np

from diffpref.core.random import uniform
from diffpref.data.groups import Grouping, with_captions
from diffpref.data.pairs import PairDataset, read_pairs, split_held_out
from diffpref.data.reading import request_of
from diffpref.data.streaming import stream_pairs
from diffpref.training.config import TrainConfig


def load_run_pairs(config: TrainConfig, is_main: bool, grouping: Grouping = "pairs") -> tuple[PairDataset, PairDataset | None]:
    """(training pairs, held-out pairs or None), with a caption per image where `grouping` asks for it. Their numbers go to stderr.

    Raises ValueError for data that cannot be used, in one line that names the setting; a table of bad rows goes to stderr.
    """
    try:
        pairs = _load(config, _print if is_main else None)
    except ValueError as error:
        head, _, table = str(error).partition("\n")
        if is_main and table:
            print(table, file=sys.stderr)
        raise ValueError(f"{config.named_data}: {head.removesuffix(':')}") from error
    if is_main:
        what = {"drop": "dropped", "keep": "kept as probability 0.5", "error": "refused"}[config.tie_policy]
        other = f", {pairs.left_out} pairs of other models left out" if config.dreamlike_pairs_only else ""
        print(f"{len(pairs)} pairs, {pairs.ties} ties {what}, {len(pairs.rejected)} rows rejected{other}", file=sys.stderr)
    say = _print if is_main else None
    if config.caption_edits and grouping not in ("captioned", "captions"):
        raise ValueError(f"caption_edits is given, but method {config.method} takes one caption per pair; leave it out")
    if grouping == "captions":  # before labels are flipped: they then say which caption is right
        pairs = with_captions(pairs, grouping, config.caption_edits, config.seed, say)
    held_out = None
    if config.held_out_pairs:
        if not pairs.has_two_images and grouping != "captions":
            raise ValueError(f"held_out_pairs is {config.held_out_pairs}, but the data has single pictures and no pairs; leave it out")
        if config.held_out_pairs >= len(pairs):
            raise ValueError(f"held_out_pairs is {config.held_out_pairs}, but the data has {len(pairs)} pairs; leave some to train on")
        pairs, held_out = split_held_out(pairs, config.held_out_pairs, config.seed)
    if not len(pairs):
        raise ValueError(f"held_out_pairs is {config.held_out_pairs}, which leaves no pair to train on; lower it")
    if config.label_noise_prob:
        pairs = flip_labels(pairs, config.label_noise_prob, config.seed)
    if grouping == "captioned":  # after: the image that counts as preferred keeps the prompt
        pairs = with_captions(pairs, grouping, config.caption_edits, config.seed, say)
        held_out = held_out and with_captions(held_out, grouping, config.caption_edits, config.seed)
    return pairs, held_out


def _print(text: str) -> None:
    print(text, file=sys.stderr)


def _load(config: TrainConfig, say: Callable[[str], None] | None) -> PairDataset:
    request = request_of(config)
    if config.streaming:
        return stream_pairs(str(config.data_source), request, config.seed, say)
    return read_pairs(str(config.data_source), request, say)


def flip_labels(pairs: PairDataset, probability: float, seed: int) -> PairDataset:
    """Flip each pair's label with `probability`, a keyed draw per pair: 1 inverts all of them, 0.5 makes them random."""
    flips = np.array([uniform(seed, "label_noise", pair_id) < probability for pair_id in pairs.pair_ids])
    return dataclasses.replace(pairs, p0=np.where(flips, 1 - pairs.p0, pairs.p0))
