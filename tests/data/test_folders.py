"""Folders of pairs: equal stems, captions beside the images, nothing lost without a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from diffpref.data.scan import BadRowsError


@pytest.mark.parametrize("sides", [("w", "l"), ("chosen", "rejected")])
@pytest.mark.parametrize("where", ["", "10_cats/", "train/"])
def test_round_trip(load: Any, put: Any, make_columns: Any, found: Any, tmp_path: Path, sides: tuple[str, str], where: str) -> None:
    columns = make_columns(3)
    for row in range(3):
        put(f"f/{where}{sides[0]}/{row}.png", columns["jpg_0"][row])
        put(f"f/{where}{sides[1]}/{row}.jpg", columns["jpg_1"][row])
    put(f"f/{where}{sides[0]}/0.txt", "prompt 0\n")
    put(f"f/{where}{sides[1]}/1.caption", "\ufeffprompt 1")
    put(f"f/{where}2.txt", "prompt 2")
    pairs = load(tmp_path / "f")
    want = [(c, a, b, 1.0) for c, a, b in zip(columns["caption"], columns["jpg_0"], columns["jpg_1"], strict=True)]
    assert found(pairs) == want
    assert load(tmp_path / "f", check_images=False).pair_ids == pairs.pair_ids
    assert load(tmp_path / "f", data_format="folder").pair_ids == pairs.pair_ids


def test_several_subsets(load: Any, put: Any, make_columns: Any, tmp_path: Path) -> None:
    columns = make_columns(2)
    for row, name in enumerate(("1_a", "5_b")):
        put(f"f/{name}/w/x.png", columns["jpg_0"][row])
        put(f"f/{name}/l/x.png", columns["jpg_1"][row])
        put(f"f/{name}/w/x.txt", name)
    put("f/other/readme.txt", "not a folder of pairs")
    assert load(tmp_path / "f").prompts == ["1_a", "5_b"]


def test_hostile_folders_cost_their_pairs(load: Any, put: Any, encode: Any, tmp_path: Path) -> None:
    for number, stem in enumerate(("ok", "double", "alone", "mute", "torn", "long", "differ", "empty", "gif", "leak")):
        for side in ("w", "l"):
            put(f"f/{side}/{stem}.png", encode(2 * number + (side == "l")))
            put(f"f/{side}/{stem}.txt", f"the {stem} one")
    put("f/w/double.jpg", encode(40))
    (tmp_path / "f/l/alone.png").unlink()
    for side in ("w", "l"):
        (tmp_path / f"f/{side}/mute.txt").unlink()
    put("f/w/torn.txt", b"\xff\xfe broken")
    put("f/w/long.txt", "x" * 50_000)
    put("f/l/differ.txt", "something else")
    put("f/l/empty.png", b"")
    (tmp_path / "f/l/gif.png").rename(tmp_path / "f/l/gif.gif")
    put("f/l/gif.gif", encode(50, "GIF"))
    put("secret.png", encode(51))
    (tmp_path / "f/l/leak.png").unlink()
    (tmp_path / "f/l/leak.png").symlink_to(tmp_path / "secret.png")
    put("f/l/.hidden.png", b"x")
    put("f/l/notes.npz", b"x")
    pairs = load(tmp_path / "f")
    assert pairs.prompts == ["the ok one"]
    reasons = {entry.kind: entry for entry in pairs.rejected}
    wanted = ["no partner", "captions differ", "duplicate stem", "empty", "not a JPEG, PNG or WebP image", "outside the data folder"]
    assert sorted(reasons) == sorted([*wanted, "too long", "no caption", "not UTF-8"])
    assert reasons["no partner"].reason == "no partner: w/alone.png has no l/alone image"
    assert "w/double.jpg, w/double.png" in reasons["duplicate stem"].reason
    assert reasons["outside the data folder"].column == "jpg_1"


def test_captions_may_not_lead_out(load: Any, put: Any, encode: Any, tmp_path: Path) -> None:
    put("secret.txt", "secret")
    put("f/w/x.png", encode(1))
    put("f/l/x.png", encode(2))
    (tmp_path / "f/w/x.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadRowsError, match="outside the data folder"):
        load(tmp_path / "f")


def test_a_side_that_is_a_link_out(load: Any, put: Any, encode: Any, tmp_path: Path) -> None:
    put("elsewhere/x.png", encode(1))
    put("f/w/x.png", encode(2))
    put("f/w/x.txt", "x")
    (tmp_path / "f/l").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadRowsError, match="outside the data folder"):
        load(tmp_path / "f")


def test_names_that_are_no_unicode(load: Any, put: Any, encode: Any, tmp_path: Path) -> None:
    put("f/w/x.png", encode(1))
    put("f/l/x.png", encode(2))
    put("f/w/x.txt", "x")
    for side in ("w", "l"):
        os.rename(tmp_path / f"f/{side}/x.png", os.fsencode(tmp_path / f"f/{side}") + b"/\xff.png")
    os.rename(tmp_path / "f/w/x.txt", os.fsencode(tmp_path / "f/w") + b"/\xff.txt")
    assert load(tmp_path / "f").prompts == ["x"]


def test_both_namings_at_once(load: Any, put: Any, tmp_path: Path) -> None:
    for side in ("w", "l", "chosen", "rejected"):
        put(f"f/{side}/x.png", b"x")
    with pytest.raises(ValueError, match=r"has w/, l/ and also chosen/, rejected/"):
        load(tmp_path / "f")
