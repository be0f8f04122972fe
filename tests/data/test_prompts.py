"""Prompt sets: every file form, the hash, what is left out and why."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.data.prompts import load_prompt_set, own_prompts

TEXTS = ["a red ring", "zwei Katzen, nass", 'a "quoted" sign']


def write(path: Path) -> Path:
    """TEXTS in the form of the suffix."""
    if path.suffix == ".txt":
        path.write_text("\n".join(TEXTS) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(TEXTS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"prompt": t, "tag": "x"}) for t in TEXTS))
    elif path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        quoted = ['"' + t.replace('"', '""') + '"' for t in TEXTS]
        path.write_text("\n".join([f"Prompt{mark}Category", *(f"{q}{mark}animals" for q in quoted)]))
    else:
        pq.write_table(pa.table({"caption": TEXTS}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_form_gives_the_same_prompts(suffix: str, tmp_path: Path) -> None:
    found = load_prompt_set(str(write(tmp_path / f"set{suffix}")))
    assert found.texts == TEXTS
    assert found.hash == own_prompts(TEXTS).hash
    assert found.rejected == []
    assert found.groups == {".jsonl": ["x"] * 3, ".csv": ["animals"] * 3, ".tsv": ["animals"] * 3}.get(suffix, [""] * 3)


def test_our_own_set() -> None:
    found = load_prompt_set("diffpref")
    assert len(found.texts) == len(set(found.texts)) == 96
    assert len(set(found.groups)) == 12
    assert load_prompt_set("diffpref", 5).texts == found.texts[:5]
    assert load_prompt_set("diffpref", 5).hash != found.hash


def test_a_folder_gives_its_files_as_groups(tmp_path: Path) -> None:
    for style in ("anime", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(2)]))
    found = load_prompt_set(f"hpdv2={tmp_path}")
    assert found.name == "hpdv2"
    assert found.texts == ["anime 0", "anime 1", "photo 0", "photo 1"]
    assert found.groups == ["anime", "anime", "photo", "photo"]


def test_empty_entries_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(["a", " ", {"other": 1}, None, {"text": "b"}]))
    found = load_prompt_set(str(path))
    assert found.texts == ["a", "b"]
    assert [r.split(":")[0] for r in found.rejected] == ["entry 2", "entry 3", "entry 4"]
    lines = tmp_path / "set.txt"
    lines.write_text("a\n\nb\n")
    assert load_prompt_set(str(lines)).rejected == ["entry 2: empty"]


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("[1", "x.json", "cannot be read"),
        ('{"a": 1}', "x.json", "it holds a dict"),
        ("[]", "x.json", "has no prompt"),
        ("\n\n", "x.txt", "has no prompt"),
        ("a", "x.docx", "is of type '.docx'"),
    ],
)
def test_unusable_files_are_named(content: str, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_prompt_set(str(tmp_path / name))


def test_unknown_and_unreachable_sets() -> None:
    with pytest.raises(ValueError, match="no set called so: diffpref, partiprompts"):
        load_prompt_set("partyprompts")
    with pytest.raises(ValueError, match=r"partiprompts=PATH"):
        load_prompt_set("partiprompts")  # tests have no network
    with pytest.raises(ValueError, match="max_prompts is 0"):
        load_prompt_set("diffpref", 0)
    with pytest.raises(ValueError, match="empty prompt"):
        own_prompts(["a", " "])
