"""Code in the documentation runs as it is printed, but for its sizes; links between pages lead somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from diffpref.training.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def shortened(code: str, **sizes: str) -> str:
    """The code with smaller numbers; each must be there."""
    for old, new in sizes.items():
        assert old.replace("_eq_", "=") in code
        code = code.replace(old.replace("_eq_", "="), new)
    return code


def test_the_method_of_ones_own_trains_on_the_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    method, training, own = blocks("docs/extend.md")
    assert len(method.strip().splitlines()) <= 32
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(method, "extend.md", "exec", dont_inherit=True), names)
    small = "max_train_steps=2, train_batch_size=4, validation_steps=None, max_train_samples=150, held_out_pairs=0"
    exec(shortened(training, max_train_steps_eq_260=small).replace("aligned.timings, 500", "aligned.timings, 6"), names)
    folder = tmp_path / "outputs" / "focal"
    assert Objective(names["FocalDPO"]()).name == "focal_dpo"  # type: ignore[operator]
    settings = json.loads((folder / "run_manifest.json").read_text())["settings"]
    assert settings["method"] == "focal_dpo"
    assert settings["gamma"] == 1.0
    assert json.loads((folder / "report.json").read_text())["win_rate"]
    exec(own, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)  # code has brackets of its own
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
