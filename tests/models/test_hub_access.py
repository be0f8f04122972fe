"""Only names on the hub are asked for, and only where the hub may be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffpref.models import hub_access
from diffpref.models.hub_access import check_hub_answers, downloaded, may_be_downloaded


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "PAUSES", (0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("source", "expected"), [("owner/name", True), ("name", True), ("./a/b", False), ("/a/b", False), ("a/b/c", False), ("~/a", False)]
)
def test_what_is_a_name(source: str, expected: bool) -> None:
    assert may_be_downloaded(source) is expected


def test_nothing_is_asked_for_a_folder_or_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access, "get_session", lambda: pytest.fail("the hub was asked"))
    check_hub_answers("setting", str(tmp_path))
    monkeypatch.setattr(hub_access.constants, "HF_HUB_OFFLINE", True)
    check_hub_answers("setting", "owner/name")


def test_a_hub_that_does_not_answer_is_named_with_a_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ValueError, match=r"setting 'owner/name' .* did not answer in 5 tries .*HF_HUB_OFFLINE=1"):
        check_hub_answers("setting", "owner/name")


def test_a_download_is_tried_again_and_a_folder_is_not(tmp_path: Path) -> None:
    tries: list[str] = []

    def load() -> str:
        tries.append("")
        if len(tries) < 3:
            raise OSError("half a file")
        return "whole"

    assert downloaded("owner/name", load) == "whole"
    tries.clear()
    with pytest.raises(OSError, match="half"):
        downloaded(str(tmp_path), load)
    assert len(tries) == 1
