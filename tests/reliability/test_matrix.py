"""Every case of the fault matrix has a test, and the page shows what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.reliability.matrix import CASES, PAGE, RESULTS, as_table

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"R": 15, "D": 13, "N": 5, "O": 2, "M": 5, "H": 3, "S": 9}


def test_every_case_is_tried() -> None:
    cases = {f"{letter}{number}" for letter, size in SIZES.items() for number in range(1, size + 1)}
    marks = [
        mark
        for path in (ROOT / "tests").rglob("test_*.py")
        for mark in re.findall(r"mark\.reliability(?:_full)?\)?\(([^)]*)\)", path.read_text())
    ]
    tried = {case for mark in marks for case in re.findall(r'"([A-Z]\d+)"', mark)}
    assert cases <= tried, f"without a test: {sorted(cases - tried)}"
    assert tried == CASES.keys(), f"without words: {sorted(tried - CASES.keys())}; without a test: {sorted(CASES.keys() - tried)}"


def test_every_case_is_tried_from_outside() -> None:
    """Through the harness, on whole runs; tests beside the code come on top."""
    names = re.compile(r'"([A-Z]\d+)"')
    found = {case for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__) for case in names.findall(path.read_text())}
    assert CASES.keys() <= found, f"only beside the code: {sorted(CASES.keys() - found)}"


def test_the_page_shows_what_was_measured() -> None:
    found = json.loads(RESULTS.read_text())
    assert as_table(found) in PAGE.read_text(), "write it again: python tests/reliability/matrix.py"
    assert {row["case"] for row in found["ours"]["rows"]} == CASES.keys()
