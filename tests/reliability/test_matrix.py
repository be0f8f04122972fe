"""Every case of the fault matrix has a test, or stands on the page with the reason why it has none."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"R": 15, "D": 13, "N": 5, "O": 2, "M": 5, "H": 3, "S": 9}


def test_every_case_is_tried_or_explained() -> None:
    cases = {f"{letter}{number}" for letter, size in SIZES.items() for number in range(1, size + 1)}
    marks = [
        mark
        for path in (ROOT / "tests").rglob("test_*.py")
        for mark in re.findall(r"mark\.reliability(?:_full)?\(([^)]*)\)", path.read_text())
    ]
    tried = {case for mark in marks for case in re.findall(r'"([A-Z]\d+)"', mark)}
    explained = set(re.findall(r"^- \*\*([A-Z]\d+)\*\*", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE))
    assert cases - tried == explained, (
        f"without test or reason: {sorted(cases - tried - explained)}; with both: {sorted(explained & tried)}"
    )
