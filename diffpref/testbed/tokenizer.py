"""A CLIP byte-pair tokenizer in which every word of the captions is one token and any other text falls back to bytes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from diffpref.testbed.world import BACKGROUNDS, COLOURS, SHAPES, SIZES

MODEL_MAX_LENGTH = 24
_FILLER = ("a", "an", "on", "with", "picture", "of", "background", "the", "and", "next", "to", "left", "right")
_MORE_FILLER = ("upright", "leaning", "photo", "no")
WORDS = tuple(dict.fromkeys([*_FILLER, *_MORE_FILLER, *SIZES, *COLOURS, *BACKGROUNDS, *SHAPES, ","]))


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol that ends in `</w>`."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(s) > 1 for s in spelled):
        pairs = Counter(pair for s in spelled for pair in itertools.pairwise(s))
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        spelled = [_merge(s, best) for s in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def write_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """Save vocabulary, merges and the tokenizer files of today's and older libraries to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    merges = learn_merges(WORDS)
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MODEL_MAX_LENGTH, pad_token=pad_token)
    tokenizer.save_pretrained(folder)
    return tokenizer
