"""The crash cases are put to a script that is not ours, and find what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.any_script import crash_cases

SCRIPT = Path(__file__).with_name("careless_trainer.py")


@pytest.mark.reliability_full("R1")
def test_a_careless_script_is_found_out(tmp_path: Path) -> None:
    words = [str(SCRIPT), "--out", "{folder}", "--steps", "{steps}", "--every", "{every}", "{resume:--continue}"]
    rows = {row.case: row for row in crash_cases(words, 12, 3, "{folder}/result.bin", 2, tmp_path)}
    assert {case for case, row in rows.items() if row.passed} >= {"R1", "R2"}
    assert {case for case, row in rows.items() if not row.passed} >= {"R5", "R6", "R7", "R14", "N2"}
    assert rows["R6"].lost == 1
    assert "nothing saved" in rows["R6"].note
    assert "the resume ends with 1" in rows["R7"].note or "another result" in rows["R7"].note
