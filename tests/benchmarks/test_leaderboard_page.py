"""What the pages say of the leaderboard is what its files hold."""

from __future__ import annotations

import re

import leaderboard_page
import pytest

from diffpref.testbed.protocol import load_protocol


@pytest.fixture(scope="module")
def wanted() -> dict[str, str]:
    """Pages by their place below the root, as they should read."""
    return {path.relative_to(leaderboard_page.ROOT).as_posix(): text for path, text in leaderboard_page.pages().items()}


def test_the_pages_are_up_to_date(wanted: dict[str, str]) -> None:
    old = [name for name, text in wanted.items() if text != (leaderboard_page.ROOT / name).read_text()]
    assert not old, f"write them again: python benchmarks/leaderboard_page.py ({', '.join(old)})"


def test_every_method_of_the_protocol_has_its_line(wanted: dict[str, str]) -> None:
    named = [name for text in wanted.values() for block in re.findall(r"<!-- leaderboard: ([\w ]+) -->", text) for name in block.split()]
    assert sorted(named) == sorted(load_protocol().entries)
    assert "<!-- leaderboard -->\n" in wanted["docs/leaderboard.md"]
    cells = re.findall(r"^\| [^|\n]+ \| `diffusion_dpo` \|.*\| ([^|\n]+) \|$", wanted["README.md"], re.MULTILINE)
    assert re.fullmatch(r"\d+ %, [+-]\d\.\d\d", cells[0])
